"""Values of options: the type and the bounds that an option declares, and how a message shows a value."""

import difflib
import math
import operator
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

LARGEST = 2**63 - 1  # of an integer that torch and Arrow can hold


def converted(value: Any, hint: Any) -> Any:
    """The value, if it is of the type; otherwise a ValueError that says what is expected."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _one_of(value, get_args(hint))
    if origin is Literal:
        if value is False:  # YAML 1.1 reads off and no as false
            value = next((name for name in ("off", "no") if name in get_args(hint)), value)
        if isinstance(value, str) and value in get_args(hint):
            return value
        raise ValueError(f"one of {', '.join(get_args(hint))}{nearest(value, get_args(hint))}")
    if origin is list:
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return value
        raise ValueError("a list of names")
    if origin is tuple:
        kinds = get_args(hint)
        if isinstance(value, (list, tuple)) and len(value) == len(kinds):
            return tuple(converted(one, kind) for one, kind in zip(value, kinds, strict=True))
        raise ValueError(f"a list of {len(kinds)} numbers")
    if hint is type(None):
        if value is None:
            return None
        raise ValueError("null")
    return _plain(value, hint)


def in_bounds(value: Any, bounds: Mapping[str, float | None]) -> Any:
    """The value, unless it is a number outside ``bounds``.

    Args:
        value: of any type; only numbers are compared.
        bounds: some of least, above, below and most.

    Raises:
        ValueError: with what is expected.

    Example:
        >>> in_bounds(0.5, {"least": 0, "below": 0.5})
        Traceback (most recent call last):
        ValueError: a number at least 0 and below 0.5
    """
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    holds = {"least": operator.ge, "above": operator.gt, "below": operator.lt, "most": operator.le}
    if isinstance(value, (int, float)) and not all(holds[name](value, bound) for name, bound in given.items()):
        words = {"least": "at least", "above": "above", "below": "below", "most": "at most"}
        shown = (
            f"{words[name]} {bound:g}" if isinstance(bound, float) else f"{words[name]} {bound}"
            for name, bound in given.items()
        )
        raise ValueError(f"a number {' and '.join(shown)}")
    return value


def _one_of(value: Any, hints: tuple) -> Any:
    expected = []
    for hint in hints:
        try:
            return converted(value, hint)
        except ValueError as error:
            expected.append(str(error))
    raise ValueError(" or ".join(sorted(expected, key=lambda text: "; did you mean" in text)))  # the hint comes last


def _plain(value: Any, hint: type) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > LARGEST:
            raise ValueError("a whole number of at most 64 bits")
        return value
    if hint is float:
        if isinstance(value, str):  # YAML reads 1e-5, without a dot, as text
            try:
                value = float(value)
            except ValueError:
                raise ValueError("a number") from None
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError("a number of at most 64 bits")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    if hint is str and isinstance(value, str) and value.strip():
        if re.search("[\0\ud800-\udfff]", value):
            raise ValueError("text in UTF-8 without NUL")
        return value
    if hint is dict and isinstance(value, dict):
        return value
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "keys with values",
    }
    raise ValueError(names[hint])


def nearest(key: Any, known: Iterable[str], prefix: str = "", after: str = "") -> str:
    """A hint that names the known word nearest to ``key``; empty if there is none."""
    near = difflib.get_close_matches(str(key), list(known), n=1)
    return f"; did you mean {prefix}{near[0]}{after}?" if near else ""


def show(value: Any) -> str:
    """A value in a message, at most 60 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
