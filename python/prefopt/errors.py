"""Exceptions of prefopt and how their messages are shortened. This file imports the standard library only."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

TRACEBACK_NAME = "traceback.txt"  # in a run folder


class UserError(ValueError):
    """Bad input. The message is one sentence that names the argument, file or line and the remedy.

    The command line prints the message alone and exits with code 2. Every other exception exits with code 1.
    """


class BadRow(NamedTuple):
    """A row that cannot be used: its file, its line (counted from 1) and the reason."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class DataError(UserError):
    """The data cannot be trained on. ``bad`` lists the bad rows, if rows are the cause."""

    def __init__(self, message: str, bad: Sequence[BadRow] = ()):
        super().__init__(message)
        self.bad = list(bad)


class RunError(RuntimeError):
    """A run that failed although its input was accepted. The message is one sentence; the exit code is 1."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, prefixed with the type if the message is a bare key."""
    kind = type(error).__name__
    lines = (line.strip() for line in str(error).splitlines())
    line = next((line for line in lines if line), kind)
    return f"{kind}: {line}" if isinstance(error, KeyError) else line


def how_to_install(extra: str) -> str:
    """How to install the packages of an extra; the distribution is not on a package index."""
    return f"run pip install '.[{extra}]' in a checkout of prefopt-kernels"


@contextmanager
def traceback_in(folder: Path) -> Iterator[None]:
    """Make the command line write the traceback of a failure in this block to ``folder``; remove an earlier one."""
    (folder / TRACEBACK_NAME).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:  # marked for the command line, and raised again
        error.__dict__["traceback_folder"] = folder
        raise


def is_first_rank() -> bool:
    """Whether this process is the first of a distributed run, or the only one, by torchrun's variable RANK."""
    return os.environ.get("RANK", "0") == "0"
