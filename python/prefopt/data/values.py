"""The check of every key and value of a row, whatever field it is in: that it can be written and printed."""

from collections.abc import Mapping
from typing import Any

from prefopt.data.rows import RowError, show

DEEPEST = 100  # levels of lists and objects in a row


def check_values(raw: Mapping[str, Any]) -> None:
    """Refuse what no later step can write or print: half of a surrogate pair in any key or value, and deep nesting.

    Raises:
        RowError: with the place in the row.
    """
    waiting: list[tuple[str, Any, int]] = [("", raw, 0)]
    while waiting:
        where, value, level = waiting.pop()
        if isinstance(value, str):
            _check_utf8(value, where)
        elif isinstance(value, (Mapping, list, tuple)):
            if level == DEEPEST:
                raise RowError(f"{where[:60]} is nested more than {DEEPEST} levels deep")
            if isinstance(value, Mapping):
                for key, part in value.items():
                    _check_utf8(str(key), f"key {show(key)}")
                    waiting.append((f"{where}.{key}" if where else str(key), part, level + 1))
            else:
                waiting += [(f"{where}[{i}]", part, level + 1) for i, part in enumerate(value)]


def _check_utf8(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{where:.60} holds half of a surrogate pair at character {error.start}") from None
