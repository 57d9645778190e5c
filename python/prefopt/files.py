"""A file that is whole or not there."""

import os
from pathlib import Path


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8 text beside ``path`` and move it there when all of it is written; ``errors`` as ``str.encode``.

    Raises:
        OSError: ``path`` is a folder, or cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file there, or nothing")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        scratch.write_bytes(text.encode("utf-8", errors))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
