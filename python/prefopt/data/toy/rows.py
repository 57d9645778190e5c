"""Questions of the toy data set, split into seen and held-out ones, and rows with answers and labels."""

import random
from typing import NamedTuple

from prefopt.data.toy.rule import judge
from prefopt.data.toy.text import CLOSERS, EVASIVE, OPENERS, QUESTIONS, RUDE, TOPICS

LANGUAGES = ("en", "ar")
HELD_OUT_PER_TOPIC = 4  # of twelve phrasings
BAD_KINDS = ("rude", "evasive", "language")


class Question(NamedTuple):
    """One question: language, index of its topic, text."""

    lang: str
    topic: int
    text: str


def split_questions(seed: int) -> tuple[list[Question], list[Question]]:
    """All questions as (seen, held out): the same number of each for every topic and language, shuffled by ``seed``."""
    rng = random.Random(f"questions {seed}")
    seen, held_out = [], []
    for lang in LANGUAGES:
        for index, topic in enumerate(TOPICS[lang]):
            questions = [Question(lang, index, text.format(do=topic.do)) for text in QUESTIONS[lang]]
            rng.shuffle(questions)
            held_out += questions[:HELD_OUT_PER_TOPIC]
            seen += questions[HELD_OUT_PER_TOPIC:]
    rng.shuffle(seen)
    rng.shuffle(held_out)
    return seen, held_out


def good_answer(question: Question, rng: random.Random) -> str:
    """A courteous opening, a tip on the topic, and sometimes a friendly closing."""
    return _helpful(question.lang, question.topic, rng)


def bad_answer(question: Question, rng: random.Random, kinds: tuple[str, ...] = BAD_KINDS) -> str:
    """An answer that fails the rule: rude, evasive, or in the other language."""
    kind = rng.choice(kinds)
    if kind == "language":
        return _helpful("ar" if question.lang == "en" else "en", question.topic, rng)
    phrases = (RUDE if kind == "rude" else EVASIVE)[question.lang]
    return " ".join(rng.sample(phrases, rng.choice((1, 2))))


def _helpful(lang: str, index: int, rng: random.Random) -> str:
    parts = [rng.choice(OPENERS[lang]), rng.choice(TOPICS[lang][index].tips)]
    if rng.random() < 0.5:
        parts.append(rng.choice(CLOSERS[lang]))
    return " ".join(parts)


def unpaired_rows(
    questions: list[Question],
    per_question: int,
    good_share: float,
    name: str,
    seed: int,
    bad_kinds: tuple[str, ...] = BAD_KINDS,
) -> list[dict]:
    """Chat rows {prompt, completion, label}, shuffled; exactly ``good_share`` of them have a good answer.

    The label is the rule's verdict. ``name`` and ``seed`` are the random seed.
    """
    rng = random.Random(f"{name} {seed}")
    asked = questions * per_question
    rng.shuffle(asked)
    good = round(good_share * len(asked))
    rows = []
    for i, question in enumerate(asked):
        if i < good:
            answer = good_answer(question, rng)
        else:
            answer = bad_answer(question, rng, bad_kinds)
        rows.append(
            {
                "prompt": [{"role": "user", "content": question.text}],
                "completion": [{"role": "assistant", "content": answer}],
                "label": judge(question.text, answer).ok,
            }
        )
    rng.shuffle(rows)
    return rows


def pair_rows(questions: list[Question], name: str, seed: int) -> list[dict]:
    """Chat rows {prompt, chosen, rejected}, shuffled: for each question a good answer and a bad one.

    ``name`` and ``seed`` are the random seed.
    """
    rng = random.Random(f"{name} {seed}")
    rows = [
        {
            "prompt": [{"role": "user", "content": question.text}],
            "chosen": [{"role": "assistant", "content": good_answer(question, rng)}],
            "rejected": [{"role": "assistant", "content": bad_answer(question, rng)}],
        }
        for question in questions
    ]
    rng.shuffle(rows)
    return rows
