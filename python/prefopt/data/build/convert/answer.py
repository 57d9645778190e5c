"""What a converter makes of a row: rated answers, or the reason why there are none.

A converter takes the rows of one published schema and says of every one of them, in order, what became of it: a list of
``Answer``, a ``Dropped`` (the schema has such rows, they are of no use, and they are counted by reason), or a
``RowError`` (a row that the schema should not have: bad input).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prefopt.data.rows import RowError, Text, rated_rows, show


class Answer(NamedTuple):
    """One rated answer. Rows of one ``group`` stay in one split; a source can be balanced by ``category``."""

    prompt: Text
    completion: Text
    label: bool
    group: str
    category: str = ""


class Dropped(Exception):
    """A row that is left out on purpose; the message is the reason under which it is counted."""


Outcome = list[Answer] | Dropped | RowError
Raws = Iterable[tuple[int, Mapping[str, Any]]]
Outcomes = Iterator[tuple[int, Outcome]]


def each(raws: Raws, one: Callable[[Mapping[str, Any]], list[Answer]]) -> Outcomes:
    """The converter of a schema whose rows stand for themselves."""
    for line, raw in raws:
        try:
            outcome: Outcome = one(raw)
        except (Dropped, RowError) as reason:
            outcome = reason
        yield line, outcome


def pair(prompt: list[dict[str, str]], chosen: str, rejected: str, group: str, category: str = "") -> list[Answer]:
    """Two answers to one conversation, desirable first.

    Raises:
        Dropped: one of them is empty, or both are the same.
        RowError: the conversation is none.
    """
    if not chosen.strip() or not rejected.strip():
        raise Dropped("an answer is empty")
    if chosen.strip() == rejected.strip():
        raise Dropped("both answers are the same")
    return [answer(prompt, text.strip(), label, group, category) for text, label in ((chosen, True), (rejected, False))]


def answer(prompt: list[dict[str, str]], text: str, label: bool, group: str, category: str = "") -> Answer:
    """One answer, checked as a training row is checked."""
    completion = [{"role": "assistant", "content": text}]
    rated = rated_rows({"prompt": prompt, "completion": completion, "label": label})[0]
    return Answer(*rated, group=group, category=category)


def user(text: str) -> dict[str, str]:
    """A message of the user."""
    return {"role": "user", "content": text}


def text_of(raw: Mapping[str, Any], name: str) -> str:
    """A field that must hold text."""
    value = raw.get(name)
    if not isinstance(value, str):
        raise RowError(f"{name} is {show(value)}; expected text")
    return value


def number_of(raw: Mapping[str, Any], name: str) -> float:
    """A field that must hold a number."""
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RowError(f"{name} is {show(value)}; expected a number")
    return value
