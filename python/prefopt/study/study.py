"""``prefopt study bco-stability`` from end to end."""

from pathlib import Path

from prefopt.errors import UserError
from prefopt.files import only_writer
from prefopt.study.findings import find
from prefopt.study.grid import full_plan, quick_plan
from prefopt.study.pool import RESULTS, read_lines, run_plan
from prefopt.study.report import write_report


def run_study(out: str | Path, *, full: bool = False, processes: int = 1, seeds: int | None = None) -> Path:
    """Run what is missing of the study, and write its table, plots and report.

    Args:
        out: folder, new or of an earlier start with the same ``full``; finished runs are kept.
        full: the whole grid instead of a part in shorter runs.
        processes: from 1, of one thread each.
        seeds: of each cell, from 1; None is what the plan says.

    Returns:
        Path of report.html.

    Raises:
        UserError: an argument is out of range, or ``out`` holds something else.
    """
    for name, value in (("--processes", processes), ("--seeds", seeds)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected a number from 1")
    out = Path(out)
    plan = full_plan(seeds) if full else quick_plan(seeds)
    with only_writer(out, "--out"):
        run_plan(plan, out, processes)
        report = write_report(out)
    print(find(read_lines(out / RESULTS)).verdict)
    return report
