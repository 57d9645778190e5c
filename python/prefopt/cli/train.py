"""`prefopt train` on the command line; nothing heavy is imported before it runs."""

import argparse
from typing import Any

from prefopt.cli.arguments import new_command, reject_unknown, text_argument
from prefopt.cli.recipe_options import add_options, overrides_of, recipe_of
from prefopt.errors import is_first_rank
from prefopt.recipe.named import recipe_list

FLAGS = ("--list", "--tiny", "--resume", "--lora")


def add_train_command(commands: Any) -> None:
    """Add the command."""

    def run(given: argparse.Namespace, rest: list[str]) -> int:
        if given.list:
            reject_unknown(rest, FLAGS)
            print(recipe_list())
            return 0
        if given.recipe is None:
            train.error("the following arguments are required: RECIPE")
        recipe = recipe_of(given, overrides_of(given, rest, FLAGS))
        from prefopt.recipe import run_recipe
        from prefopt.train.group import leave_process_group

        folder = run_recipe(recipe, resume=given.resume)
        leave_process_group()
        if is_first_rank():
            print(folder / "report.html")
        return 0

    train = new_command(
        commands,
        "train",
        run,
        "train as a recipe says",
        usage="prefopt train RECIPE [--tiny] [--resume] [--SECTION.OPTION VALUE ...]\n       prefopt train --list",
        epilog="Any option of the recipe can be set here, over what the file says: --loss.beta 0.2. "
        "`--lora null` trains all weights instead of an adapter.",
    )
    train.set_defaults(resume_hint="the same command with --resume continues from the last checkpoint, if there is one")
    train.add_argument(
        "recipe",
        type=text_argument,
        nargs="?",
        metavar="RECIPE",
        help="a .yaml file, or the name of a recipe that comes with prefopt",
    )
    train.add_argument("--list", action="store_true", help="the recipes that come with prefopt, and nothing else")
    train.add_argument(
        "--tiny",
        action="store_true",
        help="try the recipe on a tiny model and embedded rows, without network, in under a minute",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the run folder from its newest whole checkpoint; the recipe must be the same but for "
        "budget, logging, saving and evaluation",
    )
    add_options(train)
