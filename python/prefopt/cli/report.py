"""`prefopt report` on the command line; nothing heavy is imported before it runs."""

import argparse
from typing import Any

from prefopt.cli.arguments import new_command, path_argument, reject_unknown
from prefopt.errors import UserError
from prefopt.report import write_report


def add_report_command(commands: Any) -> None:
    """Add the command."""

    def run(given: argparse.Namespace, rest: list[str]) -> int:
        reject_unknown(rest, [])
        if not (given.run / "run.json").is_file():
            raise UserError(f"{given.run} is not a run folder: it has no run.json")
        print(write_report(given.run))
        return 0

    report = new_command(commands, "report", run, "rewrite report.html, plots and model card of a run")
    report.add_argument("run", type=path_argument, metavar="RUN", help="run folder")
