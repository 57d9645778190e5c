"""The command line: `prefopt demo`, `train`, `eval`, `data`, `report` and `study`.

Nothing heavy is imported before a command runs, so that help is there at once.
"""

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from prefopt import __version__
from prefopt.command_line import disable_hub_kernels, new_command, no_more
from prefopt.compare.commands import add_compare_command
from prefopt.data.commands import add_data_commands
from prefopt.errors import UserError
from prefopt.evaluate.commands import add_eval_command
from prefopt.recipe.commands import add_train_command
from prefopt.recipe.error import RecipeError
from prefopt.recipe.schema import Loss
from prefopt.termination import TERMINATED, Terminated, sigterm_raises
from prefopt.use.commands import add_use_commands

USAGE_ERROR = 2  # as argparse exits on a wrong argument
INTERRUPTED = 130  # as a shell reports Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code.

    0 if it went well; 1 if `data check` found something to mend; 2, with one message on stderr, if something given to it was
    wrong; 130 if it was interrupted, 143 if it was terminated.
    """
    parser = build_parser()
    given, rest = parser.parse_known_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    disable_hub_kernels()
    # where it is installed it is imported by peft, whether used or not, and then misses an optional package aloud
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with sigterm_raises():
            return given.command(given, rest) or 0
    except (KeyboardInterrupt, Terminated) as end:
        on = getattr(given, "goes_on", None)
        hint = f"; {on}" if on else ""
        stopped = isinstance(end, Terminated)
        print(f"prefopt: {'terminated' if stopped else 'interrupted'}{hint}", file=sys.stderr)
        return TERMINATED if stopped else INTERRUPTED
    except _user_errors() as error:
        if given.traceback:
            traceback.print_exc()
        print(f"prefopt: {error}", file=sys.stderr)
        return USAGE_ERROR


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="prefopt",
        description="Train language models on thumbs up and thumbs down.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"prefopt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _demo_command(commands)
    add_train_command(commands)
    add_eval_command(commands)
    add_compare_command(commands)
    add_data_commands(commands)
    _report_command(commands)
    _study_command(commands)
    add_use_commands(commands)
    return parser


def _demo_command(commands: Any) -> None:
    demo = new_command(
        commands,
        "demo",
        _demo,
        "train a tiny model on embedded data, in minutes, without network",
    )
    demo.add_argument(
        "--method",
        choices=get_args(get_type_hints(Loss)["method"]),
        default="kto",
        help="instead of KTO (default: kto)",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-run"), help="run folder (default: demo-run)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")


def _demo(given: argparse.Namespace, rest: list[str]) -> int:
    no_more(rest, ["--out", "--seed", "--method"])
    from prefopt.demo import run_demo

    print(run_demo(given.out, given.seed, given.method))
    return 0


def _report_command(commands: Any) -> None:
    report = new_command(
        commands, "report", _report, "write report.html, plots and model card of a run again"
    )
    report.add_argument("run", type=Path, metavar="RUN", help="run folder")


def _report(given: argparse.Namespace, rest: list[str]) -> int:
    no_more(rest, [])
    if not (given.run / "run.json").is_file():
        raise RecipeError(f"{given.run} is not a run folder: it has no run.json")
    from prefopt.report import write_report

    print(write_report(given.run))
    return 0


def _study_command(commands: Any) -> None:
    study = commands.add_parser(
        "study", help="run an experiment again", description="Run an experiment again."
    )
    studies = study.add_subparsers(title="commands", metavar="COMMAND", required=True)
    bco = new_command(
        studies,
        "bco-stability",
        _study_bco,
        "when BCO's shift makes training unstable, and what cures it, on an embedded tiny policy",
        epilog="A second start with the same --out runs only what is missing.",
    )
    size = bco.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a part of the grid, in about a minute (default)"
    )
    size.add_argument(
        "--full", action="store_true", help="the whole grid: about 45 minutes of one core"
    )
    bco.add_argument(
        "--out", type=Path, default=Path("bco-stability"), help="folder (default: bco-stability)"
    )
    bco.add_argument("--processes", type=int, default=1, help="of one thread each (default: 1)")
    bco.add_argument("--seeds", type=int, help="of each cell (default: what the plan says)")


def _study_bco(given: argparse.Namespace, rest: list[str]) -> int:
    no_more(rest, ["--quick", "--full", "--out", "--processes", "--seeds"])
    from prefopt.study import run_study

    print(run_study(given.out, full=given.full, processes=given.processes, seeds=given.seeds))
    return 0


def _user_errors() -> tuple[type[Exception], ...]:
    """What ends in one message: OSError for full disks and lost permissions, the rest are ours."""
    errors = [UserError, OSError]
    finite = sys.modules.get("prefopt.train.finite")  # what was not imported was not raised
    return (*errors, finite.NonFiniteError) if finite else tuple(errors)


if __name__ == "__main__":
    sys.exit(main())
