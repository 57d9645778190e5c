"""What the commands of `prefopt` share: parsers, types of options, and the refusal of unknown words."""

import argparse
import difflib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.options import QUANTIZATIONS

BNB_KERNEL = "kernels-community/quantization-bitsandbytes"


def disable_hub_kernels() -> None:
    """Keep libraries from downloading compiled kernels from the hub; call it before they are imported.

    If the package kernels is installed, transformers downloads kernels for some architectures, and bitsandbytes one for
    CPUs with AVX512-BF16. Both have implementations of their own. Variables that are set are kept.
    """
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    # bitsandbytes has no switch: point it to an empty local kernel
    os.environ.setdefault("LOCAL_KERNELS", f"{BNB_KERNEL}={os.devnull}")


def new_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace, list[str]], int],
    summary: str,
    **texts: str,
) -> argparse.ArgumentParser:
    """Add the parser of a command.

    Args:
        commands: from ``command_group``.
        name: of the command.
        run: called with the parsed options and the words that no option took; returns the exit code.
        summary: a few words for the help.
        texts: usage, epilog.
    """
    text = summary[0].upper() + summary[1:] + "."
    parser = commands.add_parser(name, help=summary, description=text, allow_abbrev=False, **texts)
    add_traceback_option(parser)
    parser.set_defaults(command=run)
    return parser


def command_group(parser: argparse.ArgumentParser) -> Any:
    """Subcommands of ``parser``, which prints its help without one."""

    def run(given: argparse.Namespace, rest: list[str]) -> int:
        reject_unknown(rest, ["--help"])
        parser.print_help()
        return 0

    parser.set_defaults(command=run)
    return parser.add_subparsers(title="commands", metavar="COMMAND")


def add_traceback_option(parser: argparse.ArgumentParser) -> None:
    """Add --traceback, which every command has."""
    parser.add_argument(
        "--traceback",
        action="store_true",
        default=argparse.SUPPRESS,  # so that a subcommand keeps the value set before it
        help="on an error, show the traceback as well",
    )


def text_argument(text: str) -> str:
    """The ``type`` of an option that takes a name, a path or a hub id.

    Example:
        >>> text_argument("")
        Traceback (most recent call last):
        argparse.ArgumentTypeError: expected a name or a path, got ''
    """
    shown = repr(text) if len(text) <= 60 else f"{text[:57]!r}..."
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a name or a path, got {shown}")
    try:
        Path(text).exists()  # raises for a name that the file system does not support
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{shown}: {error.strerror}") from None
    return text


def path_argument(text: str) -> Path:
    """The ``type`` of an option that takes a file or folder; ``~`` is the home folder."""
    try:
        return Path(text_argument(text)).expanduser()
    except RuntimeError as error:  # no such user
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def utf8_argument(text: str) -> str:
    """The ``type`` of an option that takes text for a tokenizer."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python decodes invalid UTF-8
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, got {text!r}")
    return text


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN and --base."""
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder")
    parser.add_argument(
        "--base", type=text_argument, metavar="MODEL", help="base model (default: the one that the adapter names)"
    )


def add_quantization_argument(parser: argparse.ArgumentParser) -> None:
    """Add --quantization."""
    help = "of the base's weights under an adapter (default: as in training)"
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help=help)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the model (default: auto)"
    )


def at_least(least: int) -> Callable[[str], int]:
    """The ``type`` of an option that takes a whole number with a lower bound."""

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
    """Normalise option names: dashes, and underscores in --SECTION.OPTION.

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


def reject_unknown(rest: Sequence[str], known: Sequence[str]) -> None:
    """Raise ``UserError`` for words that no option took, with the nearest known option."""
    if rest:
        name = rest[0].partition("=")[0]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if name in known:
            hint = " here; options come after the command, and not after --"
        raise UserError(f"command line: {name} is unknown{hint}")
