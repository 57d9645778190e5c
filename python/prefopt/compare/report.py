"""compare.csv, compare.md, plots, report.html and the tables for the terminal, made from compare.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from prefopt.compare.notes import notes_of
from prefopt.compare.plots import draw
from prefopt.compare.summary import MEASURES, SECOND, TABLES, Line, lines_of, whole_rounds
from prefopt.files import write_whole
from prefopt.report.facts import hub_id
from prefopt.report.figures import Picture, placed
from prefopt.report.markdown import csv_text, plain, table
from prefopt.report.render import render
from prefopt.report.score import BASE

TEMPLATE = Path(__file__).parent / "templates" / "comparison.html.j2"
CSV_NAME, MARKDOWN_NAME, PAGE_NAME = "compare.csv", "compare.md", "report.html"
OUTPUTS = (CSV_NAME, MARKDOWN_NAME, PAGE_NAME)


def write_report(out: Path, content: dict[str, Any]) -> Path:
    """Write all files made from compare.json, report.html last, and print the tables.

    Args:
        out: the folder.
        content: of compare.json; incomplete rounds are left out.

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


def page(content: dict[str, Any], lines: Sequence[Line], notes: Sequence[str], pictures: Sequence[Picture]) -> str:
    """report.html, from compare.json, its ``lines_of`` and ``notes_of``, and the charts."""
    runs = content["runs"]
    return render(
        TEMPLATE,
        title=title_of(content),
        model=hub_id(content["model"]) or Path(content["model"]).name,
        tables=TABLES,
        second=SECOND,
        lines=lines,
        notes=notes,
        pictures=pictures,
        runs=[_run(run) for run in runs],
        versions=runs[0]["versions"] if runs else {},
        settings=yaml.safe_dump(content["settings"], allow_unicode=True, sort_keys=False),
    )


def title_of(content: dict[str, Any]) -> str:
    """The recipe's name, without folder and suffix."""
    name = Path(content["recipe"]).name.removesuffix(".yaml").removesuffix(".yml")
    return f"{name}: methods compared"


def _run(run: dict[str, Any]) -> list[Any]:
    """A row of the table of runs."""
    losses = [f"{loss:.4f}" for loss in run["losses"]] if "losses" in run else ["", ""]
    return [f"{run['method']}, seed {run['seed']}", run.get("stopped", "ended"), run["device"], run["threads"], *losses]


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
        text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        parts.append("\n".join([text[0], "-" * max(map(len, text)), *text[1:]]))
    return "\n\n".join([*parts, "\n".join(notes)])


def markdown(content: dict[str, Any], lines: Sequence[Line], notes: Sequence[str]) -> str:
    """Both tables and the notes, ready for a README."""
    parts = [f"## {plain(title_of(content))}"]
    for name in TABLES:
        head, *body = _cells(lines, name)
        parts.append(table(head, body))
    parts.append("\n".join(f"- {plain(note)}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _cells(lines: Sequence[Line], name: str) -> list[list[str]]:
    """Head and body of a table; the base model has no costs of training."""
    measures = TABLES[name]
    rows = [["method", SECOND[name], *(one.head for one in measures)]]
    for line in lines:
        if name != "Cost" or line.method != BASE:
            rows.append([line.title, line.second(name), *(line.cell(one) for one in measures)])
    return rows
