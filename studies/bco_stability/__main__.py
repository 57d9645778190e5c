"""Run the study: `python -m studies.bco_stability`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prefopt.cli.exit import finish_progress_bars
from prefopt.errors import UserError
from prefopt.files import only_writer
from studies.bco_stability.findings import verdict
from studies.bco_stability.grid import Plan, full_plan, quick_plan
from studies.bco_stability.pool import RESULTS, read_lines, run_plan
from studies.bco_stability.report import write_report


def run_study(plan: Plan, out: Path, processes: int = 1) -> Path:
    """Run the missing part of a plan, and write its table, plots and report.

    Args:
        plan: cells and seeds.
        out: a new folder, or the folder of an earlier start; finished runs are kept.
        processes: number of single-threaded worker processes.

    Returns:
        Path of report.html.

    Raises:
        UserError: ``out`` holds other files, or runs of other settings.
    """
    with only_writer(out, "--out"):
        run_plan(plan, out, processes)
        report = write_report(out)
    print(verdict(read_lines(out / RESULTS))[1])
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for wrong input, 130 after an interruption."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.bco_stability",
        description="Measure when BCO's shift makes training unstable, and what prevents it, on a tiny policy.",
        epilog="A second start with the same --out runs only what is missing.",
        allow_abbrev=False,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="part of the grid, about a minute (default)")
    size.add_argument("--full", action="store_true", help="the whole grid, about 45 minutes on one core")
    parser.add_argument("--out", type=Path, default=Path("bco-stability"), help="folder (default: bco-stability)")
    parser.add_argument("--processes", type=int, default=1, help="single-threaded worker processes (default: 1)")
    parser.add_argument("--seeds", type=int, help="seeds per cell (default: set by the plan)")
    given = parser.parse_args(arguments)
    for name, value in (("--processes", given.processes), ("--seeds", given.seeds)):
        if value is not None and value < 1:
            parser.error(f"{name} is {value}; expected 1 or more")
    plan = full_plan(given.seeds) if given.full else quick_plan(given.seeds)
    try:
        print(run_study(plan, given.out.expanduser(), given.processes))
    except KeyboardInterrupt:
        finish_progress_bars()
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
