"""report.html of a comparison: one file that needs nothing else, in the style of a run's report."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import yaml

from prefopt.compare.summary import TABLES, Line, Measure, learned_cell
from prefopt.report.facts import hub_id
from prefopt.report.figures import Picture
from prefopt.report.html import bullets, document, fold, gallery, grid, mapping, section, text
from prefopt.report.score import BASE

# Narrow columns: a range goes below its median, and a head may break.
OWN_STYLE = """
.compared th { white-space: normal; } .compared small { color: var(--soft); display: block; }
.compared thead th { overflow-wrap: normal !important; }
"""


def page(content: dict, lines: Sequence[Line], notes: Sequence[str], pictures: Sequence[Picture]) -> str:
    """The whole page.

    Args:
        content: of compare.json.
        lines: of ``lines_of``.
        notes: of ``notes_of``.
        pictures: to be shown.
    """
    title = title_of(content)
    model = hub_id(content["model"]) or Path(content["model"]).name
    sections = [
        section("Cost", _table(lines, "sequences in a step", TABLES["Cost"])),
        section("Learning", _table(lines, "learned", TABLES["Learning"])),
        section("Charts", gallery(pictures)),
        section("How it was measured", bullets(notes)),
        section("Runs", _runs(content)),
        section("Settings", _settings(content)),
    ]
    header = f"{text(title, 'h1')}\n{text(f'Base model: {model}', 'p', 'soft')}"
    return document(title, header, sections, OWN_STYLE)


def title_of(content: dict) -> str:
    """The recipe's name, without folder and ending."""
    name = Path(content["recipe"]).name.removesuffix(".yaml").removesuffix(".yml")
    return f"{name}: methods compared"


def _table(lines: Sequence[Line], second: str, measures: Sequence[Measure]) -> str:
    """Medians with the range of the runs below; the base model's line where it has any value."""
    head = "".join(text(one, "th") for one in ("method", second, *(one.head for one in measures)))
    body = []
    for line in lines:
        if line.method == BASE and not any(one.key in line.values for one in measures):
            continue
        first = learned_cell(line) if second == "learned" else str(line.sequences_per_step)
        cells = "".join(_cell(line, one) for one in measures)
        body.append(f'<tr>{text(line.title, "th")}<td class="number">{first}</td>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="compared"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(line: Line, measure: Measure) -> str:
    if measure.key not in line.values:
        return text(line.absent.get(measure.key, ""), "td")
    median, low, high = map(measure.write, line.values[measure.key])
    ends = "" if low == high else f"<small>{low} to {high}</small>"
    return f'<td class="number">{median}{ends}</td>'


def _runs(content: dict) -> str:
    """Every run by itself."""
    body = [
        [
            f"{run['method']}, seed {run['seed']}",
            run.get("stopped", "ended"),
            run["device"],
            run["threads"],
            *(f"{loss:.4f}" for loss in run.get("losses", ())),
        ]
        for run in content["runs"]
    ]
    head = ["run", "training", "device", "threads", "first loss", "last loss"]
    versions = content["runs"][0]["versions"] if content["runs"] else {}
    return grid(head, body, "compared") + fold("Versions", mapping(versions))


def _settings(content: dict) -> str:
    said = yaml.safe_dump(content["settings"], allow_unicode=True, sort_keys=False)
    return fold("Settings of all runs", f'<pre dir="ltr">{escape(said)}</pre>')
