"""`prefopt study` on the command line; nothing heavy is imported before it runs."""

import argparse
from pathlib import Path
from typing import Any

from prefopt.cli.arguments import command_group, new_command, path_argument, reject_unknown
from prefopt.study import run_study


def add_study_commands(commands: Any) -> None:
    """Add `study` with its one command."""
    study = commands.add_parser(
        "study",
        help="run an experiment again",
        description="Run an experiment again.",
        allow_abbrev=False,
    )
    _bco_command(command_group(study))


def _bco_command(studies: Any) -> None:
    def run(given: argparse.Namespace, rest: list[str]) -> int:
        reject_unknown(rest, ["--quick", "--full", "--out", "--processes", "--seeds"])
        print(run_study(given.out, full=given.full, processes=given.processes, seeds=given.seeds))
        return 0

    bco = new_command(
        studies,
        "bco-stability",
        run,
        "when BCO's shift makes training unstable, and what cures it, on an embedded tiny policy",
        epilog="A second start with the same --out runs only what is missing.",
    )
    size = bco.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a part of the grid, in about a minute (default)")
    size.add_argument("--full", action="store_true", help="the whole grid: about 45 minutes of one core")
    bco.add_argument(
        "--out",
        type=path_argument,
        default=Path("bco-stability"),
        help="folder (default: bco-stability)",
    )
    bco.add_argument("--processes", type=int, default=1, help="of one thread each (default: 1)")
    bco.add_argument("--seeds", type=int, help="of each cell (default: what the plan says)")
