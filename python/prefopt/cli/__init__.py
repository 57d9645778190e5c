"""The command line `prefopt`: runs one command and turns its failure into one sentence and an exit code.

Nothing heavy is imported before a command runs, so that help is there at once.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from prefopt import __version__, failure
from prefopt.errors import UserError
from prefopt.termination import TERMINATED, Terminated, sigterm_raises

INTERRUPTED = 130  # as a shell reports Ctrl-C
BROKEN_PIPE = 141  # as a shell reports SIGPIPE
MOVED = {
    "study": "python -m studies.bco_stability",
    "bench-inference": "python -m benchmarks.inference",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process.

    0: success. 1: failure, or `data check` found bad rows. 2: wrong usage or input. 130: interrupted. 143: terminated.
    A failure prints one message to stderr. The traceback goes to a file named in the message, or to stderr with
    --traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # escapes for what a terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    given = argparse.Namespace()
    try:
        try:
            with sigterm_raises():
                return _run(words, given)
        finally:
            _flush_stdout()  # so that a full disk or a closed pipe is an error of this command
    except (KeyboardInterrupt, Terminated) as end:
        on = getattr(given, "goes_on", None)
        hint = f"; {on}" if on else ""
        stopped = isinstance(end, Terminated)
        failure.finish_progress_bars()
        print(f"prefopt: {'terminated' if stopped else 'interrupted'}{hint}", file=sys.stderr)
        return TERMINATED if stopped else INTERRUPTED
    except BrokenPipeError:  # the reader has what it wants, as in `prefopt train --list | head -1`
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001  the last resort: every failure ends in one sentence
        return failure.end(error, "--traceback" in words)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    # imported here so that a missing package is reported as every other failure is
    from prefopt.cli.arguments import add_traceback_option, command_group
    from prefopt.cli.compare import add_compare_command
    from prefopt.cli.data import add_data_commands
    from prefopt.cli.demo import add_demo_command
    from prefopt.cli.evaluate import add_eval_command
    from prefopt.cli.report import add_report_command
    from prefopt.cli.train import add_train_command
    from prefopt.cli.use import add_use_commands

    parser = argparse.ArgumentParser(
        prog="prefopt",
        description="Train language models on thumbs up and thumbs down.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"prefopt {__version__}")
    add_traceback_option(parser)
    commands = command_group(parser)
    add_demo_command(commands)
    add_train_command(commands)
    add_eval_command(commands)
    add_compare_command(commands)
    add_data_commands(commands)
    add_report_command(commands)
    add_use_commands(commands)
    return parser


def _run(words: Sequence[str], given: argparse.Namespace) -> int:
    """Parse ``words`` into ``given`` and run the command."""
    if words and words[0] in MOVED:
        raise UserError(f"`prefopt {words[0]}` is now `{MOVED[words[0]]}`, run in a checkout of the repository")
    parser = build_parser()
    from prefopt.cli.arguments import disable_hub_kernels, one_spelling

    _, rest = parser.parse_known_args(one_spelling(words), given)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    disable_hub_kernels()
    # where it is installed it is imported by peft, whether used or not, and then misses an optional package aloud
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return given.command(given, rest) or 0


def _flush_stdout() -> None:
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        # what is left in the buffer goes nowhere: Python flushes it once more when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
