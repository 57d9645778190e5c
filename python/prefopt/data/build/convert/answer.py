"""The result of a converter: answers, or the reason why a row has none.

A converter reads the rows of one published schema. For each it yields, in order, a list of ``Answer``, a ``Dropped``
(a valid but unusable row, counted by reason), or a ``RowError`` (bad input).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prefopt.data.rows import RowError, Text, show, unpaired_rows


class Answer(NamedTuple):
    """One answer and its label. A ``group`` stays in one split; a source can be balanced by ``category``."""

    prompt: Text
    completion: Text
    label: bool
    group: str
    category: str = ""


class Dropped(Exception):
    """A row that is omitted on purpose; the message is the reason to count."""


Outcome = list[Answer] | Dropped | RowError
Raws = Iterable[tuple[int, Mapping[str, Any]]]
Outcomes = Iterator[tuple[int, Outcome]]


def each(raws: Raws, one: Callable[[Mapping[str, Any]], list[Answer]]) -> Outcomes:
    """Convert each row by itself."""
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
        RowError: the conversation is invalid.
    """
    if not chosen.strip() or not rejected.strip():
        raise Dropped("an answer is empty")
    if chosen.strip() == rejected.strip():
        raise Dropped("both answers are the same")
    return [answer(prompt, text.strip(), label, group, category) for text, label in ((chosen, True), (rejected, False))]


def answer(prompt: list[dict[str, str]], text: str, label: bool, group: str, category: str = "") -> Answer:
    """One answer, with the checks of a training row."""
    completion = [{"role": "assistant", "content": text}]
    rated = unpaired_rows({"prompt": prompt, "completion": completion, "label": label})[0]
    return Answer(*rated, group=group, category=category)


def user(text: str) -> dict[str, str]:
    """A user's message."""
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
