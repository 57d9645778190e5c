"""Writing a built folder: the spool of texts, the files of the splits, and the folder as a whole."""

import errno
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from prefopt.data.rows import Text
from prefopt.errors import DataError
from prefopt.files import replace_folder, temporary

FULL = (errno.ENOSPC, errno.EDQUOT)
CHUNK_ROWS = 10_000  # rows of a Parquet file turned into Arrow at a time
TURNS = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))


@contextmanager
def whole_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` at the end of the block, and is removed if the block fails.

    With ``replace`` it then replaces the folder ``out``.

    Raises:
        DataError: ``out`` exists.
        OSError: it cannot be written.
    """
    out = out.expanduser().absolute()
    if not replace and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} exists already; choose another folder, or remove it first")
    with temporary(out) as partial:
        partial.mkdir()
        try:
            yield partial
            if replace:
                replace_folder(partial, out)
            else:
                os.replace(partial, out)
        except OSError as error:
            if error.errno in FULL and error.filename is None:  # raised by a write
                raise OSError(error.errno, os.strerror(error.errno), str(out)) from error
            raise


class Spool:
    """Texts of answers on disk, numbered in order, so that a million of them need no memory."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("w+b")
        self._starts = array("q")

    def add(self, prompt: Text, completion: Text) -> None:
        """Append one answer."""
        self._starts.append(self._file.tell())
        line = json.dumps([prompt, completion], ensure_ascii=False)
        self._file.write(line.encode("utf-8") + b"\n")

    def read(self, number: int) -> tuple[Text, Text]:
        """The ``number``-th answer, from 0."""
        self._file.seek(self._starts[number])
        prompt, completion = json.loads(self._file.readline())
        return prompt, completion

    def remove(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self._path.unlink()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], chat: bool) -> dict[str, Any]:
    """Write one split; returns its entry in the manifest: file, rows, bytes and SHA-256."""
    count = _write_parquet(path, rows, chat) if path.suffix == ".parquet" else _write_jsonl(path, rows)
    digest, size = file_digest(path)
    return {"file": path.name, "rows": count, "bytes": size, "sha256": digest}


def file_digest(path: Path) -> tuple[str, int]:
    """SHA-256 and size in bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest(), file.tell()


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON without escapes."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], chat: bool) -> int:
    text = TURNS if chat else pyarrow.string()
    fields = {"prompt": text, "completion": text, "label": pyarrow.bool_(), "source": pyarrow.string()}
    schema = pyarrow.schema({**fields, "group": pyarrow.string()})
    count, rows = 0, iter(rows)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while True:
            chunk = list(islice(rows, CHUNK_ROWS))
            writer.write_table(pyarrow.Table.from_pylist(chunk, schema=schema))
            count += len(chunk)
            if len(chunk) < CHUNK_ROWS:  # the last one, possibly empty
                return count
