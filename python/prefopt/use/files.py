"""A file that is whole or not there."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text beside ``path`` and move it there when all of it is on disk; line ends stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8", newline="")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
