"""The command line `prefopt`: runs one command; a failure ends in one message and an exit code.

Heavy packages are imported inside the commands, so that `--help` is instant.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from prefopt import __version__
from prefopt.cli import exit
from prefopt.errors import UserError

MOVED = {
    "study": "python -m studies.bco_stability",
    "bench-inference": "python -m benchmarks.inference",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process.

    0: success. 1: failure, or `data check` found bad rows. 2: wrong usage or input. 130: interrupted. 143: terminated.
    A failure prints one message to stderr. The traceback goes to a file that the message names, or to stderr with
    --traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # escape what the terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    given = argparse.Namespace()
    try:
        try:
            with exit.sigterm_raises():
                return _run(words, given)
        finally:
            _flush_stdout()  # so that a full disk or a closed pipe is an error of this command
    except (KeyboardInterrupt, exit.Terminated) as end:
        hint = getattr(given, "resume_hint", "")
        terminated = isinstance(end, exit.Terminated)
        exit.finish_progress_bars()
        print(f"prefopt: {'terminated' if terminated else 'interrupted'}{hint and f'; {hint}'}", file=sys.stderr)
        return exit.TERMINATED if terminated else exit.INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe, as in `prefopt train --list | head -1`
        return exit.BROKEN_PIPE
    except Exception as error:  # noqa: BLE001  every failure ends in one sentence
        return exit.fail(error, "--traceback" in words)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    # imported here so that a missing package is reported like any other failure
    from prefopt.cli.arguments import add_traceback_option, command_group
    from prefopt.cli.chat import add_chat_command
    from prefopt.cli.classify import add_classify_command
    from prefopt.cli.compare import add_compare_command
    from prefopt.cli.data import add_data_commands
    from prefopt.cli.demo import add_demo_command
    from prefopt.cli.evaluate import add_eval_command
    from prefopt.cli.export import add_export_command
    from prefopt.cli.report import add_report_command
    from prefopt.cli.train import add_train_command

    parser = argparse.ArgumentParser(
        prog="prefopt",
        description="Train language models on preference data: binary feedback or pairs.",
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
    add_export_command(commands)
    add_chat_command(commands)
    add_classify_command(commands)
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
    # peft imports bitsandbytes wherever it is installed, which then warns about optional packages
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return given.command(given, rest) or 0


def _flush_stdout() -> None:
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes the buffer again at exit; discard it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
