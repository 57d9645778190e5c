"""Write eval.json and eval_summary.csv atomically, and format the table for the terminal."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.files import write_whole
from prefopt.report.facts import hub_id
from prefopt.report.markdown import csv_text
from prefopt.report.score import CHANGE, RUN, Score, interval, number

FORMAT = 1  # of eval.json
JSON_NAME, CSV_NAME = "eval.json", "eval_summary.csv"
COLUMNS = (
    "suite", "task", "metric", "model", "value", "stderr", "low", "high", "n", "n_shot", "unit", "chance", "at_chance",
)  # fmt: skip


@dataclass
class Results:
    """Results of a suite: scores, sentences about them, and further details as JSON values."""

    scores: list[Score]
    how: list[str] = field(default_factory=list)  # description of the measurement
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    # the data of each task: name, and hub, split and revision if they are known
    data: dict[str, dict[str, str | None]] = field(default_factory=dict)


def chance_sentences(scores: Sequence[Score]) -> list[str]:
    """One sentence for each score of the run, or change, at or below chance."""
    said = []
    for score in scores:
        if score.model == RUN and score.at_chance and score.chance:
            said.append(
                f"{score.task}, {score.metric}: {number(score.value)} is indistinguishable from chance "
                f"({number(score.chance)}); its 95 % interval is {interval(score)}."
            )
        elif score.model == RUN and score.chance and score.high < score.chance:
            said.append(
                f"{score.task}, {score.metric}: {number(score.value)} is below chance ({number(score.chance)}): "
                "guessing would do better, so look at how the answers are scored before the model."
            )
        elif score.chance == 0 and score.at_chance:
            what = "the change from base to run" if score.model == CHANGE else number(score.value)
            said.append(
                f"{score.task}, {score.metric}: {what} is indistinguishable from 0 (95 % interval {interval(score)})."
            )
    return said


def asked_on(source: str, split: str | None, revision: str | None = None) -> dict[str, str | None]:
    """The published description of rows: the hub id, or the last part of a path.

    Example:
        >>> asked_on("/home/me/rows.jsonl", None)["name"], asked_on("TIGER-Lab/MMLU-Pro", "test")["hub"]
        ('rows.jsonl', 'TIGER-Lab/MMLU-Pro')
    """
    hub = hub_id(source)
    name = hub or Path(source).name
    return {"name": name, "hub": hub, "split": split, "revision": revision if hub else None}


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a training run."""
    return (folder / "run.json").is_file()


def write_results(out: Path, suite: str, entry: dict[str, Any]) -> Path:
    """Add a suite's results to eval.json, and write all of them to eval_summary.csv.

    Args:
        out: folder, created if it is missing.
        suite: whose earlier results are replaced.
        entry: with ``scores``, a list of ``Score.as_dict()``.

    Returns:
        Path of eval.json, which is written last.

    Raises:
        UserError: there is an eval.json of another program or format.
    """
    out.mkdir(parents=True, exist_ok=True)
    suites = _known(out / JSON_NAME) | {suite: entry}
    rows = [
        {"suite": name} | {key: score[key] for key in COLUMNS[1:]}
        for name, one in suites.items()
        for score in one["scores"]
    ]
    write_whole(out / CSV_NAME, csv_text(COLUMNS, rows), "replace")
    content = {"format": FORMAT, "suites": suites}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(out / JSON_NAME, text, "replace")
    return out / JSON_NAME


def check_writable(out: Path) -> None:
    """Raise ``UserError`` if ``write_results`` would fail."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a folder")
    there = next(one for one in (out, *out.absolute().parents) if one.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"{there} cannot be written to; choose a folder for the results with --out")
    _known(out / JSON_NAME)


def plain(value: Any) -> Any:
    """Replace non-finite numbers by None, for JSON."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def text_table(scores: Sequence[Score]) -> str:
    """A table of the scores for the terminal."""
    rows = [("task", "metric", "model", "value", "std. error", "95 % interval", "chance", "n")]
    for score in scores:
        rows.append(
            (
                score.asked,
                score.metric,
                score.model,
                number(score.value),
                "-" if score.stderr is None else number(score.stderr),
                interval(score),
                "" if score.chance is None else number(score.chance),
                str(score.n),
            )
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _known(path: Path) -> dict[str, dict]:
    """The suites of an existing eval.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        content = None
    suites = content.get("suites") if isinstance(content, dict) else None
    if not isinstance(suites, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a file of `prefopt eval` (format {FORMAT}); move it away, or choose another --out"
        )
    return suites
