"""One writer a folder: a lock of the operating system, which ends with the process that holds it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from prefopt.errors import UserError
from prefopt.files import remove_stale

LOCK_NAME = ".prefopt.lock"


@contextmanager
def only_writer(folder: Path, option: str) -> Iterator[None]:
    """Hold the folder's lock; make the folder if needed, and remove it again if it is empty at the end.

    Temporary files that a killed process left in the folder are removed.

    Args:
        folder: to write into.
        option: names the folder's option in messages.

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
            with suppress(OSError):  # Windows does not remove a file that is open
                path.unlink()
            lock.release()
    finally:
        with suppress(OSError):  # not empty
            for one in made:
                one.rmdir()


def is_unused(folder: Path) -> bool:
    """Whether the folder has no files, or is not there; its lock does not count."""
    return not folder.is_dir() or all(one.name == LOCK_NAME for one in folder.iterdir())


def _holder(path: Path) -> str:
    try:
        pid, host = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # it has just begun or just ended
        return "another process"
    return f"process {pid} on {host}"
