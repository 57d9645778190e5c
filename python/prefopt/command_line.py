"""What every command of `prefopt` is made with; nothing heavy is imported here."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any

from prefopt.recipe.error import RecipeError

WHOLE = "none"
QUANTIZATIONS = ("nf4", WHOLE)  # of the base's weights under an adapter


def new_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace, list[str]], int],
    summary: str,
    **texts: str,
) -> argparse.ArgumentParser:
    """A command's parser.

    Args:
        commands: of argparse, where it belongs.
        name: as it is typed.
        run: what it does, from what was parsed and the words that no option took; returns the exit code.
        summary: a few words, for the list of commands and the head of its help.
        texts: usage, epilog.
    """
    text = summary[0].upper() + summary[1:] + "."
    parser = commands.add_parser(name, help=summary, description=text, allow_abbrev=False, **texts)
    parser.add_argument(
        "--traceback", action="store_true", help="on an error, show where it happened as well"
    )
    parser.set_defaults(command=run)
    return parser


def no_more(rest: Sequence[str], known: Sequence[str]) -> None:
    """Refuse what no option took, with the nearest one that exists."""
    if rest:
        name = rest[0].partition("=")[0]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"command line: {name} is unknown{hint}")
