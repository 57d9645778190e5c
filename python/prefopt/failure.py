"""How a failed command ends: one sentence on stderr, the traceback in a file, an exit code."""

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt.errors import RunError, UserError

FAILED = 1
USAGE_ERROR = 2  # as argparse exits on a wrong argument
TRACEBACK_NAME = "traceback.txt"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed
LONGEST_LINE, MOST_LINES = 1_000, 40  # of a message
# What the extra [train] installs, by the names that Python imports.
NEEDED = "accelerate datasets huggingface_hub matplotlib peft safetensors transformers yaml".split()


def end(error: Exception, show_traceback: bool) -> int:
    """Report a failure on stderr.

    Args:
        error: what the command raised.
        show_traceback: print the traceback instead of writing it to a file.

    Returns:
        The exit code: 2 for wrong input, 1 for everything else.
    """
    code = USAGE_ERROR if _is_input(error) else FAILED
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
    """End the line of every progress bar that an exception has left open."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(tqdm and tqdm.tqdm, "_instances", ())):
        bar.close()


def printable(text: str) -> str:
    r"""The text with control characters escaped, which could move the cursor or change the title of a terminal.

    Example:
        >>> print(printable("a\x1b[2Jb\nc"))
        a\x1b[2Jb
        c
    """
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


@contextmanager
def traceback_in(folder: Path) -> Iterator[None]:
    """Let ``end`` write the traceback of a failure inside this block into ``folder``; an older one is removed."""
    (folder / TRACEBACK_NAME).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:  # marked and raised again
        error.traceback_folder = folder
        raise


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


def how_to_install(extra: str) -> str:
    """How to install the packages of an extra; the distribution is on no package index."""
    return f"run pip install '.[{extra}]' in a checkout of prefopt-kernels"


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, in front of it the type if the message is a bare key."""
    kind = type(error).__name__
    lines = (line.strip() for line in str(error).splitlines())
    line = next((line for line in lines if line), kind)
    return f"{kind}: {line}" if isinstance(error, KeyError) else line


def _is_input(error: Exception) -> bool:
    return isinstance(error, UserError) or _missing(error) is not None


def _missing(error: Exception) -> str | None:
    """The package of the extra [train] that is not installed."""
    missing = isinstance(error, ModuleNotFoundError) and error.name in NEEDED
    return error.name if missing else None


def _sentence(error: Exception) -> str:
    if isinstance(error, (UserError, RunError)):
        return str(error)
    missing = _missing(error)
    if missing is not None:
        return f"the package {missing} is not installed, and prefopt needs it; {how_to_install('train')}"
    if _out_of_memory(error):
        return (
            f"out of memory: {first_line(error)}; use smaller batches (training.per_device_train_batch_size, or "
            "--batch-size), a smaller data.max_length, or training.gradient_checkpointing true"
        )
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f": {str(error.filename)!r}"
        return f"{error.strerror}{named}"
    line = first_line(error)
    return line if line.startswith(type(error).__name__) else f"{type(error).__name__}: {line}"


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # what was not imported was not raised
    of_torch = torch is not None and isinstance(error, torch.OutOfMemoryError)
    # torch's allocator on the CPU has no exception of its own
    return of_torch or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _write_traceback(error: Exception) -> Path | None:
    """The file; None where none can be written."""
    text = "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace")
    folder = getattr(error, "traceback_folder", None)
    try:
        # a folder with files in it is a run's already; one that is empty stays free for the next start
        if folder is not None and folder.is_dir() and any(folder.iterdir()):
            path = folder / (TRACEBACK_NAME if is_first_rank() else f"traceback-rank-{os.environ['RANK']}.txt")
            path.write_bytes(text)
            return path
    except OSError:  # a full disk, perhaps only that of the run folder
        pass
    try:
        number, name = tempfile.mkstemp(prefix="prefopt-traceback-", suffix=".txt")
        with open(number, "wb") as file:
            file.write(text)
        return Path(name)
    except OSError:
        return None


def is_first_rank() -> bool:
    """Whether this process is the first of a distributed run, or the only one, by torchrun's variable RANK."""
    return os.environ.get("RANK", "0") == "0"
