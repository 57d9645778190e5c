"""Embedded rows in the schemas of the published sets: the demo's questions and answers, and questions of 14 fields.

Each source has one row that its converter must leave out, so that the table of counts has something to show.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from prefopt.data.toy.rows import pair_rows, split_questions
from prefopt.data.toy.rule import language

QUESTIONS = 240  # of the demo's, shared out among the sources of a plan
SEED = 0  # of the embedded rows; a recipe's own seed decides what is made of them
ASK = ("What is meant by {}?", "Give an example of {}.", "Who should know about {}?")

Pair = tuple[str, str, str]  # question, better and worse answer


def raw_rows(kind: str, part: int = 0, parts: int = 1) -> list[dict]:
    """Rows as the published set has them.

    Args:
        kind: one of ``prefopt.data.build.convert.KINDS``.
        part, parts: which share of the questions; the shares of different parts have no question in common.

    Example:
        >>> sorted(raw_rows("kto-mix-14k")[0])
        ['completion', 'label', 'prompt']
    """
    return _WRITERS[kind](_pairs()[part::parts])


@cache
def _pairs() -> list[Pair]:
    seen, _ = split_questions(SEED)
    return [
        (row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in pair_rows(seen[:QUESTIONS], "tiny", SEED)
    ]


def _turns(*texts: str) -> list[dict]:
    return [{"content": text, "role": "assistant" if place % 2 else "user"} for place, text in enumerate(texts)]


def _ultrafeedback(pairs: Sequence[Pair]) -> list[dict]:
    rows = []
    for number, (question, good, bad) in enumerate(pairs):
        tie = number == 0
        rows.append(
            {
                "prompt": question,
                "prompt_id": f"tiny-{number}",
                "chosen": _turns(question, good),
                "rejected": _turns(question, bad),
                "messages": _turns(question, good),
                "score_chosen": 8.0,
                "score_rejected": 8.0 if tie else 3.0,
            }
        )
    return rows


def _hh_rlhf(pairs: Sequence[Pair]) -> list[dict]:
    start = "\n\nHuman: {}\n\nAssistant: {}"
    rows = [
        {"chosen": start.format(question, good), "rejected": start.format(question, bad)}
        for question, good, bad in pairs
    ]
    rows[0]["rejected"] = rows[0]["chosen"]
    return rows


def _shp(pairs: Sequence[Pair]) -> list[dict]:
    rows = []
    for number, (question, good, bad) in enumerate(pairs):
        first = number % 2 == 0  # which of A and B is the better
        scores = (40, 10) if first else (10, 40)
        rows.append(
            {
                "post_id": f"tiny{number}",
                "domain": "askculinary_train",
                "upvote_ratio": 0.9,
                "history": question,
                "c_root_id_A": f"a{number}",
                "c_root_id_B": f"b{number}",
                "created_at_utc_A": 1600000000,
                "created_at_utc_B": 1600000100,
                "score_A": 10 if number == 0 else scores[0],
                "score_B": scores[1],
                "human_ref_A": good if first else bad,
                "human_ref_B": bad if first else good,
                "labels": int(first),
                "seconds_difference": 100.0,
                "score_ratio": 1.0 if number == 0 else 4.0,
            }
        )
    return rows


def _oasst1(pairs: Sequence[Pair]) -> list[dict]:
    rows = []
    for number, (question, good, bad) in enumerate(pairs):
        tree = f"tiny-{number}"

        def message(name, parent, text, rank, tree=tree, question=question, number=number):
            return {
                "message_id": name,
                "parent_id": parent,
                "user_id": "x",
                "created_date": "2023-02-05T14:23:50+00:00",
                "text": text,
                "role": "prompter" if parent is None else "assistant",
                "lang": language(question),
                "review_count": 3,
                "review_result": True,
                "deleted": number == 0,
                "rank": rank,
                "synthetic": False,
                "model_name": None,
                "message_tree_id": tree,
                "tree_state": "ready_for_export",
            }

        rows += [
            message(tree, None, question, None),
            message(f"{tree}-a", tree, good, 0),
            message(f"{tree}-b", tree, bad, 1),
        ]
    return rows


def _kto_mix(pairs: Sequence[Pair]) -> list[dict]:
    rows = [
        {"prompt": _turns(question), "completion": _answer(text), "label": label}
        for question, good, bad in pairs
        for text, label in ((good, True), (bad, False))
    ]
    return [*rows, rows[0]]


def _answer(text: str) -> list[dict]:
    return [{"content": text, "role": "assistant"}]


def _mmlu_pro(_: Sequence[Pair]) -> list[dict]:
    path = Path(__file__).with_name("fields.json")
    fields = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        {
            "question_id": number,
            "question": question,
            "options": ["yes", "no"],
            "answer": "A",
            "answer_index": 0,
            "cot_content": "",
            "category": category,
            "src": f"tiny-{category}",
        }
        for number, (category, question) in enumerate(
            (category, ask.format(term)) for category, terms in fields.items() for term in terms for ask in ASK
        )
    ]
    return [*rows, rows[0]]


def _generic(pairs: Sequence[Pair]) -> list[dict]:
    rows = [
        {"prompt": _turns(question), "chosen": _answer(good), "rejected": _answer(bad)} for question, good, bad in pairs
    ]
    return rows


_WRITERS: dict[str, Callable[[Sequence[Pair]], list[dict]]] = {
    "ultrafeedback_binarized": _ultrafeedback,
    "hh-rlhf": _hh_rlhf,
    "shp": _shp,
    "oasst1": _oasst1,
    "kto-mix-14k": _kto_mix,
    "mmlu-pro": _mmlu_pro,
    "rows": _generic,
}
