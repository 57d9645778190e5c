"""report.html of a comparison: one file without references to others, in the style of a run's report."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from prefopt.compare.summary import SECOND, TABLES, Line
from prefopt.report.facts import hub_id
from prefopt.report.figures import Picture
from prefopt.report.render import render

TEMPLATE = Path(__file__).parent / "templates" / "comparison.html.j2"


def page(content: dict, lines: Sequence[Line], notes: Sequence[str], pictures: Sequence[Picture]) -> str:
    """The whole page.

    Args:
        content: of compare.json.
        lines: of ``lines_of``.
        notes: of ``notes_of``.
        pictures: to be shown.
    """
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


def title_of(content: dict) -> str:
    """The recipe's name, without folder and suffix."""
    name = Path(content["recipe"]).name.removesuffix(".yaml").removesuffix(".yml")
    return f"{name}: methods compared"


def _run(run: dict) -> list:
    """A row of the table of runs."""
    losses = [f"{loss:.4f}" for loss in run["losses"]] if "losses" in run else ["", ""]
    return [f"{run['method']}, seed {run['seed']}", run.get("stopped", "ended"), run["device"], run["threads"], *losses]
