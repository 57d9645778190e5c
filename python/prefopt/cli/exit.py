"""How a command ends: exit codes, the message on stderr, the traceback file, and SIGTERM."""

import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt.errors import TRACEBACK_NAME, RunError, UserError, first_line, how_to_install, is_first_rank

FAILED = 1
USAGE_ERROR = 2  # argparse's exit code for a wrong argument
INTERRUPTED = 130  # a shell's code for Ctrl-C
BROKEN_PIPE = 141  # a shell's code for SIGPIPE
TERMINATED = 128 + signal.SIGTERM

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed
LONGEST_LINE, MOST_LINES = 1_000, 40  # of a message
# The packages of the extra [train], by import name.
NEEDED = "accelerate datasets huggingface_hub matplotlib peft safetensors transformers yaml".split()


class Terminated(SystemExit):
    """SIGTERM was received. A SystemExit, so that code which handles Ctrl-C does not catch it."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise ``Terminated`` on SIGTERM within the block; further signals are ignored during the cleanup.

    Does nothing outside the main thread, or where SIGTERM is already handled or ignored.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a forked worker exits at once: the parent cleans up
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated(TERMINATED)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fail(error: Exception, show_traceback: bool) -> int:
    """Report a failure on stderr.

    Args:
        error: raised by the command.
        show_traceback: print the traceback instead of writing it to a file.

    Returns:
        The exit code: 2 for wrong input, 1 for everything else.
    """
    code = USAGE_ERROR if isinstance(error, UserError) or _missing_package(error) else FAILED
    where = ""
    if show_traceback:
        traceback.print_exception(error)
    elif code == FAILED:
        path = _write_traceback(error)
        where = f" (traceback: {path or 'not written; --traceback shows it'})"
    finish_progress_bars()
    print(f"prefopt: {bounded(printable(_sentence(error)))}{where}", file=sys.stderr)
    return code


def finish_progress_bars() -> None:
    """Close progress bars that an exception left open, so that the message starts on its own line."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(tqdm and tqdm.tqdm, "_instances", ())):
        bar.close()


def printable(text: str) -> str:
    r"""The text with control characters escaped: they could move the cursor or change the terminal's title.

    Example:
        >>> print(printable("a\x1b[2Jb\nc"))
        a\x1b[2Jb
        c
    """
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def bounded(message: str) -> str:
    """The message with a limit on the length and number of its lines.

    Example:
        >>> len(bounded("x" * 10**6))
        1000
    """
    lines = message.splitlines()
    shown = [line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 3]}..." for line in lines[:MOST_LINES]]
    if len(lines) > MOST_LINES:
        shown.append(f"... and {len(lines) - MOST_LINES:,} more lines")
    return "\n".join(shown)


def _missing_package(error: Exception) -> str | None:
    """The package of the extra [train] that is not installed."""
    return error.name if isinstance(error, ModuleNotFoundError) and error.name in NEEDED else None


def _sentence(error: Exception) -> str:
    if isinstance(error, (UserError, RunError)):
        return str(error)
    missing = _missing_package(error)
    if missing is not None:
        return f"the package {missing} is not installed, and prefopt needs it; {how_to_install('train')}"
    if _out_of_memory(error):
        return (
            f"out of memory: {first_line(error)}; use smaller batches (training.per_device_train_batch_size, or "
            "--batch-size), a smaller data.max_length, or training.gradient_checkpointing true"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + ("" if error.filename is None else f": {str(error.filename)!r}")
    line = first_line(error)
    return line if line.startswith(type(error).__name__) else f"{type(error).__name__}: {line}"


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # if torch is not imported, it did not raise
    from_torch = torch is not None and isinstance(error, torch.OutOfMemoryError)
    # torch's CPU allocator raises a plain RuntimeError
    return from_torch or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _write_traceback(error: Exception) -> Path | None:
    """The file; None if it cannot be written."""
    text = "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace")
    folder = getattr(error, "traceback_folder", None)
    try:
        # an empty folder stays empty, so that the next start can use it
        if folder is not None and folder.is_dir() and any(folder.iterdir()):
            path = folder / (TRACEBACK_NAME if is_first_rank() else f"traceback-rank-{os.environ['RANK']}.txt")
            path.write_bytes(text)
            return path
    except OSError:  # for example a full disk
        pass
    try:
        number, name = tempfile.mkstemp(prefix="prefopt-traceback-", suffix=".txt")
        with open(number, "wb") as file:
            file.write(text)
        return Path(name)
    except OSError:
        return None
