"""A file that is whole or not there."""

import os
from pathlib import Path


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8 text beside ``path`` and move it there when all of it is written; ``errors`` as ``str.encode``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        scratch.write_bytes(text.encode("utf-8", errors))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
