"""`prefopt demo` on the command line; nothing heavy is imported before it runs."""

import argparse
from pathlib import Path
from typing import Any, get_args, get_type_hints

from prefopt.cli.arguments import new_command, path_argument, reject_unknown
from prefopt.demo import run_demo
from prefopt.options import Loss


def add_demo_command(commands: Any) -> None:
    """Add the command."""

    def run(given: argparse.Namespace, rest: list[str]) -> int:
        reject_unknown(rest, ["--out", "--seed", "--method"])
        print(run_demo(given.out, given.seed, given.method))
        return 0

    demo = new_command(
        commands,
        "demo",
        run,
        "train a tiny model on embedded data, in minutes, without network",
    )
    demo.add_argument(
        "--method",
        choices=get_args(get_type_hints(Loss)["method"]),
        default="kto",
        help="instead of KTO (default: kto)",
    )
    demo.add_argument(
        "--out",
        type=path_argument,
        default=Path("demo-run"),
        help="run folder (default: demo-run)",
    )
    demo.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
