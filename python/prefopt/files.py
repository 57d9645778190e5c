"""Files and folders that are written completely or not at all, and a lock that gives a folder one writer."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from prefopt.errors import UserError

# .NAME.partial-PID-HOST is being written; .NAME.old-PID-HOST is the folder that it is about to replace.
TEMPORARY = re.compile(r"\.(.+)\.(partial|old)-(\d+)-(.+)", re.DOTALL)
LOCK_NAME = ".prefopt.lock"


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8 text to a temporary file, then move it to ``path``; ``errors`` as for ``str.encode``.

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
    """A temporary name beside ``path`` for a file or folder, removed at the end unless it was moved away.

    The name holds the process id and host, so that ``remove_stale`` can remove what a killed process left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent)
    scratch = _temporary_name(path, "partial")
    _remove(scratch)  # left by a killed process with the same id
    try:
        yield scratch
    finally:
        _remove(scratch)


def replace_folder(new: Path, out: Path) -> None:
    """Move the folder ``new`` to ``out`` and remove the folder that was there."""
    old = _temporary_name(out, "old")
    try:
        os.replace(out, old)
        os.replace(new, out)
    finally:
        _settle(old, out)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files and folders in ``folder`` whose process, on this host, no longer runs."""
    try:
        entries = list(folder.iterdir())
    except OSError:  # the caller's own access reports it
        return
    for entry in entries:
        found = TEMPORARY.fullmatch(entry.name)
        if found and found[4] == socket.gethostname() and not _is_running(int(found[3])):
            if found[2] == "old":
                _settle(entry, entry.with_name(found[1]))
            else:
                _remove(entry)


@contextmanager
def only_writer(folder: Path, option: str) -> Iterator[None]:
    """Hold the folder's lock, which the operating system releases if the process dies.

    The folder is created if needed, and removed at the end if it is empty. Stale temporary files in it are removed.

    Args:
        folder: to write into.
        option: the folder's option, for messages.

    Raises:
        UserError: another process holds the lock, or ``folder`` is a file.
        OSError: the folder cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder} is a file; expected a folder")
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    lock = FileLock(path)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"{option} {folder} is being written by {_holder(path)}; wait until it ends, or choose another folder"
            ) from None
        try:
            with suppress(OSError):  # Windows refuses to write to a locked file
                path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
            remove_stale(folder)
            yield
        finally:
            with suppress(OSError):  # Windows does not remove an open file
                path.unlink()
            lock.release()
    finally:
        with suppress(OSError):  # not empty
            for one in made:
                one.rmdir()


def is_unused(folder: Path) -> bool:
    """Whether the folder does not exist or has no files other than its lock."""
    return not folder.is_dir() or all(one.name == LOCK_NAME for one in folder.iterdir())


def _holder(path: Path) -> str:
    try:
        pid, host = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # the process is just starting or ending
        return "another process"
    return f"process {pid} on {host}"


def _temporary_name(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{socket.gethostname()}")


def _settle(old: Path, out: Path) -> None:
    """Remove the replaced folder, or move it back if nothing took its place."""
    if old.exists() and not out.exists():
        os.replace(old, out)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
