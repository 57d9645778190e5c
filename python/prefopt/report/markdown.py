"""Markdown and CSV of texts that come from outside: names of folders and recipes, labels, notes."""

import csv
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\n")  # how a cell begins that a spreadsheet runs


def plain(text: str) -> str:
    """A text on one line in which Markdown and HTML find nothing to interpret.

    Example:
        >>> plain("a_b <i> [x](y)")
        'a\\\\_b &lt;i&gt; \\\\[x\\\\](y)'
    """
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A table of texts, each made plain."""
    lines = [[plain(str(one)) for one in line] for line in (head, *body)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str, language: str) -> str:
    """A block of code, in a fence that nothing in the text can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def csv_text(head: Sequence[str], rows: Iterable[Mapping[str, Any] | Sequence[Any]]) -> str:
    """CSV in which no cell is a formula: a text that a spreadsheet would run begins with an apostrophe; numbers stay.

    Args:
        head: names of the columns.
        rows: a sequence of cells each, or a mapping from the names of columns; a missing cell is empty.

    Example:
        >>> csv_text(["a", "b"], [["=1+1", "-0.5"]])
        "a,b\\n'=1+1,-0.5\\n"
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_cell, head))
    for row in rows:
        cells = [row.get(name) for name in head] if isinstance(row, Mapping) else row
        writer.writerow(map(_cell, cells))
    return out.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = value.replace("\r\n", "\n").replace("\r", "\n")  # a bare \r is not quoted, and ends a row for a reader
    if not value.startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
