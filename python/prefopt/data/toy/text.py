"""The sentences of the toy data set, read from text.json: questions, topics, phrases of good and of bad answers.

``{do}`` in a question is filled with a topic's ``do`` (in Arabic a verbal noun). A topic's ``key`` begins a word of
each of its tips and of no other topic's. Topics are in the same order in both languages.
"""

import json
from pathlib import Path
from typing import NamedTuple


class Topic(NamedTuple):
    """A topic to ask about, in one language."""

    do: str
    key: str
    tips: tuple[str, str]


_TEXT = json.loads(Path(__file__).with_name("text.json").read_text(encoding="utf-8"))


def _phrases(name: str) -> dict[str, tuple[str, ...]]:
    return {language: tuple(phrases) for language, phrases in _TEXT[name].items()}


QUESTIONS, OPENERS, CLOSERS = _phrases("questions"), _phrases("openers"), _phrases("closers")
RUDE, EVASIVE = _phrases("rude"), _phrases("evasive")
TOPICS = {
    language: tuple(Topic(topic["do"], topic["key"], tuple(topic["tips"])) for topic in topics)
    for language, topics in _TEXT["topics"].items()
}
