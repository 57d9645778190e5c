"""The counts of `prefopt data build`, as JSON and as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt.data.build.choose import REASONS, Answers
from prefopt.data.build.plan import Plan

BAD = "bad row (listed in bad_rows.jsonl)"


@dataclass
class Reading:
    """The counts of one source: ``read`` is ``used`` plus the sum of ``left_out``.

    ``without_use`` counts the unused fields of a source without a published schema.
    """

    read: int = 0
    blank_lines: int = 0
    used: int = 0
    left_out: Counter = field(default_factory=Counter)
    without_use: Counter = field(default_factory=Counter)


def count(
    readings: Sequence[Reading],
    answers: Answers,
    splits: Mapping[str, Sequence[int]],
    plan: Plan,
) -> dict[str, Any]:
    """All counts, by source and in total.

    For each source ``read`` = ``used`` + ``left_out`` (rows), ``answers`` = ``kept`` + ``dropped`` (answers), and
    ``kept`` = the sum of ``splits``. A group that two sources share is counted in both, and once in the total.
    """
    numbers = range(len(answers))

    def of(source: int, some: Sequence[int]) -> list[int]:
        return [number for number in some if answers.source[number] == source]

    by_source = [
        _counted(reading, of(index, numbers), answers, {name: of(index, split) for name, split in splits.items()})
        for index, reading in enumerate(readings)
    ]
    total = Reading(
        sum(one.read for one in readings),
        sum(one.blank_lines for one in readings),
        sum(one.used for one in readings),
        sum((one.left_out for one in readings), Counter()),
        sum((one.without_use for one in readings), Counter()),
    )
    return {
        "sources": {source.name: counts for source, counts in zip(plan.sources, by_source, strict=True)},
        "total": _counted(total, numbers, answers, splits),
    }


def _counted(
    reading: Reading, numbers: Sequence[int], answers: Answers, splits: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    reasons = Counter(answers.reason[number] for number in numbers)
    kept = [number for split in splits.values() for number in split]
    return {
        "read": reading.read,
        "blank_lines": reading.blank_lines,
        "left_out": {name: reading.left_out[name] for name in sorted(reading.left_out)},
        "without_use": {name: reading.without_use[name] for name in sorted(reading.without_use)},
        "used": reading.used,
        "answers": len(numbers),
        "dropped": {name: reasons[name] for name in REASONS if reasons[name]},
        "kept": len(kept),
        **_labels(kept, answers),
        "splits": {name: {"rows": len(split), **_labels(split, answers)} for name, split in splits.items()},
    }


def _labels(numbers: Sequence[int], answers: Answers) -> dict[str, int]:
    desirable = sum(answers.label[number] for number in numbers)
    return {
        "desirable": desirable,
        "undesirable": len(numbers) - desirable,
        "groups": len({answers.group_name(number) for number in numbers}),
    }


def table(counts: Mapping[str, Any]) -> str:
    """The counts as text: a column for each source, a line for each stage."""
    columns = {**counts["sources"], "all": counts["total"]}
    total = counts["total"]
    lines: list[tuple[str, list[str]]] = []

    def line(title: str, *path: str) -> None:
        values = []
        for column in columns.values():
            for key in path:
                column = column.get(key, 0)
            values.append(f"{column:,}")
        lines.append((title, values))

    line("rows read", "read")
    if total["blank_lines"]:
        line("  and blank lines", "blank_lines")
    for reason in total["left_out"]:
        line(f"  - {reason}", "left_out", reason)
    line("rows used", "used")
    line("answers made of them", "answers")
    for reason in total["dropped"]:
        line(f"  - {reason}", "dropped", reason)
    line("answers kept", "kept")
    for name in ("desirable", "undesirable", "groups"):
        line(f"    {name}", name)
    for split in total["splits"]:
        line(split, "splits", split, "rows")
        for name in ("desirable", "undesirable", "groups"):
            line(f"    {name}", "splits", split, name)
    first = max(len(title) for title, _ in lines)
    widths = [max(len(name), *(len(values[index]) for _, values in lines)) for index, name in enumerate(columns)]
    text = [
        "  ".join((f"{title:<{first}}", *(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))))
        for title, values in [("", list(columns)), *lines]
    ]  # fmt: skip
    fields = [f"{name} ({many:,})" for name, many in total["without_use"].items()]
    return "\n".join([*text, *([f"unused fields: {', '.join(fields)}"] if fields else [])])
