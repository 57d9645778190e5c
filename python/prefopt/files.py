"""Files and folders that are complete or not there, and the removal of what a killed process left half written."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

# .NAME.partial-PID-HOST is being written; .NAME.old-PID-HOST is what it is about to replace.
TEMPORARY = re.compile(r"\.(.+)\.(partial|old)-(\d+)-(.+)", re.DOTALL)


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8 text beside ``path`` and move it there when all of it is written; ``errors`` as ``str.encode``.

    Raises:
        OSError: ``path`` is a folder, or cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file there, or nothing")
    with temporary(path) as scratch:
        scratch.write_bytes(text.encode("utf-8", errors))
        os.replace(scratch, path)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A free name beside ``path`` for a file or folder, which is removed at the end unless it was moved away.

    The name says which process it belongs to, so that ``remove_stale`` can remove it if that process is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent)
    scratch = _named(path, "partial")
    _remove(scratch)  # of a killed process that had the same number
    try:
        yield scratch
    finally:
        _remove(scratch)


def replace_folder(new: Path, out: Path) -> None:
    """Move the folder ``new`` to ``out``, in place of the folder that is there."""
    old = _named(out, "old")
    try:
        os.replace(out, old)
        os.replace(new, out)
    finally:
        _settle(old, out)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files and folders in ``folder`` whose process, on this machine, no longer runs."""
    try:
        entries = list(folder.iterdir())
    except OSError:  # not there, or not readable: the caller's own access reports it
        return
    for entry in entries:
        found = TEMPORARY.fullmatch(entry.name)
        if found and found[4] == socket.gethostname() and not _runs(int(found[3])):
            if found[2] == "old":
                _settle(entry, entry.with_name(found[1]))
            else:
                _remove(entry)


def _named(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{socket.gethostname()}")


def _settle(old: Path, out: Path) -> None:
    """Remove the folder that was replaced; put it back where nothing took its place."""
    if old.exists() and not out.exists():
        os.replace(old, out)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
