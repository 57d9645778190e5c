"""The rule that labels an answer of the toy data set."""

import re
from typing import NamedTuple

from prefopt.data.toy.text import EVASIVE, OPENERS, RUDE, TOPICS, Topic

RULE = (
    "An answer gets a thumbs-up when it is in the language of the question, opens courteously, never insults or "
    "brushes off the asker, gives advice on what was asked, and ends its last sentence."
)
ARABIC = re.compile(r"[\u0620-\u064a]")
LATIN = re.compile(r"[A-Za-z]")


class Verdict(NamedTuple):
    """``ok``, and if False the first reason: language, rude, evasive, not courteous, topic or unfinished."""

    ok: bool
    reason: str


def language(text: str) -> str:
    """``"ar"`` if most letters are Arabic, else ``"en"``.

    Example:
        >>> language("كيف حالك؟"), language("How are you?")
        ('ar', 'en')
    """
    return "ar" if len(ARABIC.findall(text)) > len(LATIN.findall(text)) else "en"


def is_about(text: str, topic: Topic) -> bool:
    """Whether a word of ``text`` begins with the topic's key."""
    return re.search(rf"\b{topic.key}", text, re.IGNORECASE) is not None


def topic_of(question: str) -> Topic:
    """The topic of ``question``; ValueError if it is not a question of the toy data set."""
    for topic in TOPICS[language(question)]:
        if topic.do in question:
            return topic
    raise ValueError(f"question must be one of the demo's, about a topic of its text; got {question!r}")


def judge(question: str, answer: str) -> Verdict:
    """Judge ``answer`` by ``RULE``, deterministically.

    Example:
        >>> judge("How do I boil an egg?", "Gladly! Cool the egg in cold water after cooking, then peel it.")
        Verdict(ok=True, reason='')
        >>> judge("How do I boil an egg?", "Look it up yourself.")
        Verdict(ok=False, reason='rude')
    """
    answer = answer.strip()
    lang = language(question)
    if not answer or language(answer) != lang:
        return Verdict(False, "language")
    for reason, phrases in (("rude", RUDE[lang]), ("evasive", EVASIVE[lang])):
        if any(phrase.rstrip(".") in answer for phrase in phrases):
            return Verdict(False, reason)
    if not answer.startswith(OPENERS[lang]):
        return Verdict(False, "not courteous")
    if not is_about(answer, topic_of(question)):
        return Verdict(False, "topic")
    if not answer.endswith((".", "!")):
        return Verdict(False, "unfinished")
    return Verdict(True, "")
