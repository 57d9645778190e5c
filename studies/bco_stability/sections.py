"""The answers as sections of sentences and tables, for the page and for the Markdown file alike."""

from typing import NamedTuple

from studies.bco_stability.findings import effects, find, remedy_cells
from studies.bco_stability.plots import label, remedy_label
from studies.bco_stability.price import variants
from studies.bco_stability.table import Cell


class Table(NamedTuple):
    """A table of texts."""

    caption: str
    head: list[str]
    body: list[list[str]]


class Section(NamedTuple):
    """A heading, sentences, and the tables that support them."""

    title: str
    sentences: list[str]
    tables: list[Table]


def sections(rows: list[dict]) -> list[Section]:
    """What causes it, what cures it, what it costs."""
    findings = find(rows)
    return [
        Section("What causes it", findings.cause, _effects(rows)),
        Section("What cures it", findings.cure, _remedies(rows)),
        Section("What it costs", findings.price, _variants(rows)),
    ]


def numbers(cell: Cell) -> list[str]:
    """Unstable share, median accuracy and median margin, in words."""
    return [cell.unstable.words(), f"{cell.accuracy:.3f}", f"{cell.margin:.2f}"]


def _effects(rows: list[dict]) -> list[Table]:
    body = []
    for precision in ("fp32", "bf16"):
        for effect in effects([row for row in rows if row["precision"] == precision]):
            mean, low, high = (100 * value for value in effect.difference)
            digits = 0 if high - low >= 2 else 1  # so that a narrow interval does not round to width 0
            body.append(
                [
                    f"{effect.component}, {precision}",
                    effect.without.words(),
                    effect.with_it.words(),
                    f"{mean:+.{digits}f} points ({low:+.{digits}f} to {high:+.{digits}f})",
                    effect.word,
                ]
            )
    head = ["component", "unstable without", "unstable with", "difference", "effect"]
    return _filled("Naive form, pairs of runs that differ in one component alone:", head, body)


def _remedies(rows: list[dict]) -> list[Table]:
    tables = []
    for (precision, components), cells in remedy_cells(rows).items():
        caption = f"Naive form, {label(tuple(components.split('+')))}, {precision}:"
        body = [[remedy_label(changes), *numbers(cell)] for changes, cell in cells.items()]
        tables += _filled(caption, ["remedy", "unstable", "accuracy", "margin"], body)
    return tables


def _variants(rows: list[dict]) -> list[Table]:
    body = [
        [
            " + ".join(one.changes) or "as it is",
            *numbers(one.cell),
            f"{one.margin[0]:+.3f} ({one.margin[1]:+.3f} to {one.margin[2]:+.3f})",
            f"{one.accuracy[0]:+.3f} ({one.accuracy[1]:+.3f} to {one.accuracy[2]:+.3f})",
        ]
        for one in variants(rows)
    ]
    head = "change,unstable,accuracy,margin,margin less KTO's,accuracy less KTO's".split(",")
    return _filled("Our form, all components, fp32, with some parts changed:", head, body)


def _filled(caption: str, head: list[str], body: list[list[str]]) -> list[Table]:
    return [Table(caption, head, body)] if body else []
