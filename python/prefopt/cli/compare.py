"""`prefopt compare` on the command line; nothing heavy is imported before it runs."""

import argparse
from pathlib import Path
from typing import Any

from prefopt.cli.arguments import new_command, path_argument, text_argument
from prefopt.cli.recipe_options import add_options, overrides_of, recipe_of
from prefopt.compare import CompareRequest, compare
from prefopt.compare.request import KNOWN

FLAGS = ["--methods", "--runs", "--out", "--tiny", "--lora"]


def add_compare_command(commands: Any) -> None:
    """Add the command."""

    def run(given: argparse.Namespace, rest: list[str]) -> int:
        overrides = overrides_of(given, rest, FLAGS)
        methods = tuple(one.strip() for one in given.methods.split(",") if one.strip())
        request = CompareRequest(methods=methods, runs=given.runs, out=given.out)
        if given.tiny:  # model and rows are made beside the results
            overrides |= {"training.output_dir": str(given.out)}
        recipe = recipe_of(given, overrides)
        print(f"\n{compare(recipe, request)}")
        return 0

    parser = new_command(
        commands,
        "compare",
        run,
        "train methods side by side on the same model, prompts, tokens and steps",
        usage="prefopt compare RECIPE --methods METHOD,METHOD[,...] [--runs K] [--out DIR] [--tiny] "
        "[--SECTION.OPTION VALUE ...]",
        epilog="Writes compare.json, compare.csv, compare.md, plots and report.html. A second start with the same "
        "--out carries out only the missing runs. Options of the recipe given here override the file; its "
        "loss.method and training.output_dir are not used.",
    )
    parser.set_defaults(resume_hint="the same command continues with the missing runs")
    parser.add_argument(
        "recipe",
        type=text_argument,
        metavar="RECIPE",
        help="a .yaml file, or the name of a recipe that comes with prefopt",
    )
    parser.add_argument(
        "--methods",
        required=True,
        metavar="METHOD,METHOD[,...]",
        help=f"two or more of {', '.join(KNOWN)} (required)",
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=3,
        metavar="K",
        help="number of runs of each method, each with its own seed (default: 3)",
    )
    parser.add_argument(
        "--out", type=path_argument, default=Path("comparison"), help="folder of the results (default: comparison)"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="use a tiny model and embedded rows, without network",
    )
    add_options(parser)
