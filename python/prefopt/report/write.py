"""Write all files of a report, each atomically."""

from pathlib import Path

from prefopt.files import write_whole
from prefopt.report.card_backup import back_up_if_edited, with_digest
from prefopt.report.charts import draw_suite
from prefopt.report.figures import placed
from prefopt.report.markdown import csv_text
from prefopt.report.page import card, page
from prefopt.report.plots import draw, drawable
from prefopt.report.read import Run, read_run
from prefopt.report.summary import summarize

# JSON allows lone surrogates, UTF-8 does not
ERRORS = "replace"


def write_report(run_dir: str | Path) -> Path:
    """Write plots, eval_summary.csv, README.md and, last, report.html into a run folder.

    Reads run.json and metrics.jsonl and, if there, eval.json, samples.json, summary.json, memory.json,
    adapter_config.json, bad_rows.jsonl and recipe.yaml. The report names missing or broken files. Each file is written
    under a temporary name and renamed; an edited README.md is kept as README.edited.md, with a warning.

    Returns:
        Path of report.html.

    Raises:
        FileNotFoundError: no such folder, or neither run.json nor metrics.jsonl in it.
        OSError: the folder cannot be written to.
    """
    run = read_run(run_dir)
    summary = summarize(run)
    plots, evaluated = [], {}
    chosen = drawable(run)
    if chosen or run.suites:
        with placed(run.path / "plots") as folder:
            plots = [draw(run, plot, folder) for plot in chosen]
            evaluated = {suite.name: draw_suite(suite, folder) for suite in run.suites}
    table = _evaluations(run)
    # `prefopt eval` writes a richer file of that name, and eval.json beside it.
    if table and not (run.path / "eval.json").is_file():
        write_whole(run.path / "eval_summary.csv", table, ERRORS)
    readme = run.path / "README.md"
    text = with_digest(card(run, summary, plots, evaluated), ERRORS)
    back_up_if_edited(readme)
    write_whole(readme, text, ERRORS)
    report = run.path / "report.html"
    write_whole(report, page(run, summary, plots, evaluated), ERRORS)
    return report


def _evaluations(run: Run) -> str:
    """CSV with a row for each evaluation: step, epoch and all eval_ metrics; empty without evaluations."""
    logs = [log for log in run.logs if any(key.startswith("eval_") for key in log)]
    keys = sorted({key for log in logs for key in log if key.startswith("eval_")})
    return csv_text(["step", "epoch", *keys], logs) if logs else ""
