"""Run one evaluation: inputs are checked first, and results are written when they are complete."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluate import benchmarks, classify, preference
from prefopt.evaluate.held_out import Texts, read_rows, tokenized
from prefopt.evaluate.request import EvalRequest
from prefopt.evaluate.results import (
    Results,
    chance_sentences,
    check_writable,
    is_run,
    plain,
    text_table,
    write_results,
)
from prefopt.evaluate.rules import make_rule
from prefopt.evaluate.subject import Subject, find_subject, load_subject
from prefopt.files import only_writer
from prefopt.redact import redacted
from prefopt.report import write_report
from prefopt.report.charts import draw_suite
from prefopt.report.figures import placed
from prefopt.report.score import Suite
from prefopt.runs import Source
from prefopt.train.run_folder import versions


def run(request: EvalRequest) -> Path:
    """Evaluate, print the table, write eval.json, eval_summary.csv and plots, and update the report of a run folder.

    Returns:
        Path of eval.json.

    Raises:
        UserError: the run, the request or the questions are not usable, or another process writes into the folder.
        DataError: rows that cannot be used.
    """
    source = find_subject(request.run, request.base)
    check_writable(request.folder)
    if request.rule is not None:
        make_rule(request.rule)
    asked = _asked(source, request)
    with only_writer(request.folder, "--out"):
        return _run(asked, request)


def _run(asked: Any, request: EvalRequest) -> Path:
    subject = load_subject(request.run, request.base, request.quantization)
    results = _SUITES[request.suite](subject, asked, request)
    warnings = subject.warnings + results.warnings + chance_sentences(results.scores)
    if request.limit is not None and request.suite != "benchmarks":
        warnings.insert(0, f"Only the first {request.limit} rows were used.")
    entry = {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": subject.about(),
        "settings": redacted(request.settings()),
        "versions": versions(),
        "how": results.how,
        "warnings": warnings,
        "scores": [score.as_dict() for score in results.scores],
        "data": results.data,
        "pictures": _draw(request, results),
        "details": results.details,
    }
    path = write_results(request.folder, request.suite, plain(entry))
    print(text_table(results.scores))
    if request.suite == "classify":
        print("\n" + _category_table(results))
    for sentence in [*results.how, *warnings]:
        print(f"\n{sentence}" if sentence is results.how[0] else sentence)
    if is_run(request.folder):
        print(f"\n{write_report(request.folder)}")
    return path


def _asked(source: Source, request: EvalRequest) -> Any:
    """Read the questions or rows of the suite, before a model is loaded."""
    if request.suite == "benchmarks":
        return benchmarks.prepare_questions(request)
    if request.suite == "preference":
        return read_rows(source, request)
    if request.data is None:
        raise UserError(
            "--data is missing: questions with their category (MMLU-Pro's schema, or rows that `prefopt data build` "
            "made)"
        )
    return classify.read_questions(request, source.row_options)


def _preference(subject: Subject, texts: Texts, request: EvalRequest) -> Results:
    return preference.evaluate(subject, tokenized(texts, subject), request)


_SUITES: dict[str, Callable[[Subject, Any, EvalRequest], Results]] = {
    "benchmarks": benchmarks.evaluate,
    "preference": _preference,
    "classify": classify.evaluate,
}


def _draw(request: EvalRequest, results: Results) -> list[str]:
    """Draw into plots/ and return the names of the files."""
    suite = Suite(request.suite, results.scores, details=results.details)
    with placed(request.folder / "plots") as folder:
        drawn = draw_suite(suite, folder)
    return [f"plots/{one.name}.{end}" for one in drawn for end in ("png", "svg")]


def _category_table(results: Results) -> str:
    table = results.details["categories"]
    heads = list(table[0])
    rows = [heads] + [
        [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()] for row in table
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
