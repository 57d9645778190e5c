"""What is made of compare.json: compare.csv, compare.md, plots and report.html, and the tables for the terminal."""

from collections.abc import Sequence
from pathlib import Path

from prefopt.compare.notes import notes_of
from prefopt.compare.page import page, title_of
from prefopt.compare.plots import draw
from prefopt.compare.summary import MEASURES, SECOND, TABLES, Line, lines_of, whole_rounds
from prefopt.files import write_whole
from prefopt.report.figures import placed
from prefopt.report.markdown import csv_text, plain, table
from prefopt.report.score import BASE

CSV_NAME, MARKDOWN_NAME, PAGE_NAME = "compare.csv", "compare.md", "report.html"
OUTPUTS = (CSV_NAME, MARKDOWN_NAME, PAGE_NAME)


def write_report(out: Path, content: dict) -> Path:
    """Write everything that is made of compare.json, report.html last, and print the tables.

    Args:
        out: the folder.
        content: of compare.json; only rounds that are whole are shown.

    Returns:
        Path of report.html.
    """
    content = content | {"runs": whole_rounds(content)}
    lines = lines_of(content)
    notes = notes_of(content, lines)
    with placed(out / "plots") as folder:
        pictures = draw(lines, folder)
    write_whole(out / CSV_NAME, as_csv(lines), "replace")
    write_whole(out / MARKDOWN_NAME, markdown(content, lines, notes), "replace")
    write_whole(out / PAGE_NAME, page(content, lines, notes, pictures), "replace")
    print(terminal(lines, notes))
    return out / PAGE_NAME


def as_csv(lines: Sequence[Line]) -> str:
    """A line for each method and for the base model; three columns for each measure."""
    heads = [f"{one.key}{end}" for one in MEASURES for end in ("", "_low", "_high")]
    rows = []
    for line in lines:
        row = {"method": line.method, "runs": line.runs, "learned": line.learned}
        row["sequences_per_step"] = line.sequences_per_step
        if line.method == BASE:
            row |= {"runs": "", "learned": "", "sequences_per_step": ""}
        for one in MEASURES:
            found = line.values.get(one.key)
            three = (line.absent.get(one.key, ""),) * 3 if found is None else found
            row |= dict(zip((one.key, f"{one.key}_low", f"{one.key}_high"), three, strict=True))
        rows.append(row)
    return csv_text(["method", "runs", "learned", "sequences_per_step", *heads], rows)


def terminal(lines: Sequence[Line], notes: Sequence[str]) -> str:
    """The tables in columns, and the notes."""
    parts = []
    for name in TABLES:
        rows = _cells(lines, name)
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        told = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        parts.append("\n".join([told[0], "-" * max(map(len, told)), *told[1:]]))
    return "\n\n".join([*parts, "\n".join(notes)])


def markdown(content: dict, lines: Sequence[Line], notes: Sequence[str]) -> str:
    """Both tables and the notes, ready for a README."""
    parts = [f"## {plain(title_of(content))}"]
    for name in TABLES:
        head, *body = _cells(lines, name)
        parts.append(table(head, body))
    parts.append("\n".join(f"- {plain(note)}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _cells(lines: Sequence[Line], name: str) -> list[list[str]]:
    """Head and body of a table; training costs are none of the base model's."""
    measures = TABLES[name]
    rows = [["method", SECOND[name], *(one.head for one in measures)]]
    for line in lines:
        if name != "Cost" or line.method != BASE:
            rows.append([line.title, line.second(name), *(line.cell(one) for one in measures)])
    return rows
