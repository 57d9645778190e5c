"""Everything a report consists of, written so that no reader ever meets half a file."""

import csv
import io
import os
import tempfile
from pathlib import Path

from prefopt.files import write_whole
from prefopt.report.card import card
from prefopt.report.page import page
from prefopt.report.plots import Plot, draw, drawable
from prefopt.report.read import Run, read_run
from prefopt.report.words import tell

# a lone surrogate, which JSON allows and UTF-8 does not, must not cost the whole report
ERRORS = "replace"


def write_report(run_dir: str | Path) -> Path:
    """Write plots, eval_summary.csv, README.md and, last, report.html into a run folder.

    Reads run.json and metrics.jsonl and, if there, samples.json, summary.json, adapter_config.json, bad_rows.jsonl and
    recipe.yaml. What is missing or broken is said in the report. Each file is written beside its place and renamed.

    Returns:
        Path of report.html.

    Raises:
        FileNotFoundError: no such folder, or neither run.json nor metrics.jsonl in it.
        OSError: the folder cannot be written to.
    """
    run = read_run(run_dir)
    story = tell(run)
    plots = _plots(run)
    summary = _evaluations(run)
    # `prefopt eval` writes a richer file of that name, and eval.json beside it.
    if summary and not (run.path / "eval.json").is_file():
        write_whole(run.path / "eval_summary.csv", summary, ERRORS)
    write_whole(run.path / "README.md", card(run, story, [plot for plot, _ in plots]), ERRORS)
    report = run.path / "report.html"
    write_whole(report, page(run, story, plots), ERRORS)
    return report


def _plots(run: Run) -> list[tuple[Plot, str]]:
    chosen = drawable(run)
    if not chosen:
        return []
    folder = run.path / "plots"
    folder.mkdir(exist_ok=True)
    drawn = []
    with tempfile.TemporaryDirectory(dir=run.path, prefix=".plots-") as scratch:
        for plot in chosen:
            drawn.append((plot, draw(run, plot, Path(scratch))))
        for file in Path(scratch).iterdir():
            os.replace(file, folder / file.name)
    return drawn


def _evaluations(run: Run) -> str:
    """A row for each evaluation: its step, then every eval_ metric that was ever logged; empty without evaluations."""
    logs = [log for log in run.logs if any(key.startswith("eval_") for key in log)]
    keys = sorted({key for log in logs for key in log if key.startswith("eval_")})
    table = io.StringIO()
    writer = csv.DictWriter(
        table, ["step", "epoch", *keys], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(logs)
    return table.getvalue() if logs else ""
