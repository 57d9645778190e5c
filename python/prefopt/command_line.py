"""What every command of `prefopt` is made with; nothing heavy is imported here."""

import argparse
import difflib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from prefopt.recipe.error import RecipeError

WHOLE = "none"
QUANTIZATIONS = ("nf4", WHOLE)  # of the base's weights under an adapter

BNB_KERNEL = "kernels-community/quantization-bitsandbytes"


def disable_hub_kernels() -> None:
    """Keep libraries from downloading compiled kernels from the hub; call it before they are imported.

    Where the package kernels is installed, transformers downloads kernels for some architectures, and bitsandbytes one for
    CPUs with AVX512-BF16 whenever it is imported. Both have implementations of their own. Variables that are set already
    are kept.
    """
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    # bitsandbytes has no switch, so its kernel is looked up in a place that has none
    os.environ.setdefault("LOCAL_KERNELS", f"{BNB_KERNEL}={os.devnull}")


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
