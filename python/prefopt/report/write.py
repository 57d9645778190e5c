"""Everything a report consists of, written so that no reader ever meets half a file."""

from pathlib import Path

from prefopt.files import write_whole
from prefopt.report.charts import draw_suite
from prefopt.report.edited import keep_if_edited, marked
from prefopt.report.figures import placed
from prefopt.report.markdown import csv_text
from prefopt.report.page import card, page
from prefopt.report.plots import draw, drawable
from prefopt.report.read import Run, read_run
from prefopt.report.words import tell

# a lone surrogate, which JSON allows and UTF-8 does not, must not cost the whole report
ERRORS = "replace"


def write_report(run_dir: str | Path) -> Path:
    """Write plots, eval_summary.csv, README.md and, last, report.html into a run folder.

    Reads run.json and metrics.jsonl and, if there, eval.json, samples.json, summary.json, memory.json,
    adapter_config.json, bad_rows.jsonl and recipe.yaml. What is missing or broken is said in the report. Each file is
    written beside its place and renamed; a README.md that was changed by hand is kept as README.edited.md, with a
    warning.

    Returns:
        Path of report.html.

    Raises:
        FileNotFoundError: no such folder, or neither run.json nor metrics.jsonl in it.
        OSError: the folder cannot be written to.
    """
    run = read_run(run_dir)
    story = tell(run)
    plots, evaluated = [], {}
    chosen = drawable(run)
    if chosen or run.suites:
        with placed(run.path / "plots") as folder:
            plots = [draw(run, plot, folder) for plot in chosen]
            evaluated = {suite.name: draw_suite(suite, folder) for suite in run.suites}
    summary = _evaluations(run)
    # `prefopt eval` writes a richer file of that name, and eval.json beside it.
    if summary and not (run.path / "eval.json").is_file():
        write_whole(run.path / "eval_summary.csv", summary, ERRORS)
    readme = run.path / "README.md"
    text = marked(card(run, story, plots, evaluated), ERRORS)
    keep_if_edited(readme)
    write_whole(readme, text, ERRORS)
    report = run.path / "report.html"
    write_whole(report, page(run, story, plots, evaluated), ERRORS)
    return report


def _evaluations(run: Run) -> str:
    """A row for each evaluation: its step, then every eval_ metric that was ever logged; empty without evaluations."""
    logs = [log for log in run.logs if any(key.startswith("eval_") for key in log)]
    keys = sorted({key for log in logs for key in log if key.startswith("eval_")})
    return csv_text(["step", "epoch", *keys], logs) if logs else ""
