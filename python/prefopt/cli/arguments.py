"""What every command of `prefopt` is made with; nothing heavy is imported here."""

import argparse
import difflib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import UserError

BNB_KERNEL = "kernels-community/quantization-bitsandbytes"


def disable_hub_kernels() -> None:
    """Keep libraries from downloading compiled kernels from the hub; call it before they are imported.

    Where the package kernels is installed, transformers downloads kernels for some architectures, and bitsandbytes one
    for CPUs with AVX512-BF16 whenever it is imported. Both have implementations of their own. Variables that are set
    already are kept.
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
    add_traceback_option(parser)
    parser.set_defaults(command=run)
    return parser


def command_group(parser: argparse.ArgumentParser) -> Any:
    """Room for commands below ``parser``, which alone prints its help."""

    def run(given: argparse.Namespace, rest: list[str]) -> int:
        no_more(rest, ["--help"])
        parser.print_help()
        return 0

    parser.set_defaults(command=run)
    return parser.add_subparsers(title="commands", metavar="COMMAND")


def add_traceback_option(parser: argparse.ArgumentParser) -> None:
    """The option that `prefopt` and each of its commands has."""
    parser.add_argument(
        "--traceback",
        action="store_true",
        default=argparse.SUPPRESS,  # so that a command does not undo what stands before it
        help="on an error, show the traceback as well",
    )


def text_argument(text: str) -> str:
    """A name, file or hub id of the command line, as the ``type`` of an option.

    Example:
        >>> text_argument("")
        Traceback (most recent call last):
        argparse.ArgumentTypeError: expected a name or a path, got ''
    """
    shown = repr(text) if len(text) <= 60 else f"{text[:57]!r}..."
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a name or a path, got {shown}")
    try:
        Path(text).exists()  # fails for a name that the file system cannot have
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{shown}: {error.strerror}") from None
    return text


def path_argument(text: str) -> Path:
    """A file or folder of the command line, as the ``type`` of an option; ``~`` is the home folder."""
    try:
        return Path(text_argument(text)).expanduser()
    except RuntimeError as error:  # there is no such user
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def utf8_argument(text: str) -> str:
    """Words for a tokenizer, as the ``type`` of an option; what is no UTF-8 comes as half of a surrogate pair."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, got {text!r}")
    return text


def at_least(least: int) -> Callable[[str], int]:
    """A whole number with a lower bound, as the ``type`` of an option."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text!r}")
        return value

    return number


def one_spelling(words: Sequence[str]) -> list[str]:
    """Option names in the spelling in which they are declared: dashes, and underscores in --SECTION.OPTION.

    Example:
        >>> one_spelling(["--max_new_tokens", "8", "--loss.kl-estimator=window", "a-b_c"])
        ['--max-new-tokens', '8', '--loss.kl_estimator=window', 'a-b_c']
    """
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--") and len(word) > 2:
            old, new = ("-", "_") if "." in name else ("_", "-")
            name = "--" + name[2:].replace(old, new)
        found.append(name + equals + value)
    return found


def no_more(rest: Sequence[str], known: Sequence[str]) -> None:
    """Refuse what no option took, with the nearest one that exists."""
    if rest:
        name = rest[0].partition("=")[0]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if name in known:
            hint = " here; options come after the command, and not after --"
        raise UserError(f"command line: {name} is unknown{hint}")
