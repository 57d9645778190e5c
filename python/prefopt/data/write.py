"""Files of a built folder: the rows' texts on their way, the splits, and a folder that is whole or not there."""

import errno
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from prefopt.data.rows import DataError, Text
from prefopt.files import replace_folder, temporary

FULL = (errno.ENOSPC, errno.EDQUOT)
CHUNK_ROWS = 10_000  # rows of a Parquet file turned into Arrow at a time
TURNS = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))


@contextmanager
def whole_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when the block has ended well and vanishes when it has not.

    ``replace`` puts it in the place of the folder ``out``, which stays where it is until then.

    Raises:
        DataError: there is something at ``out`` already.
        OSError: it cannot be written.
    """
    out = out.expanduser().absolute()
    if not replace and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is there already; choose another folder, or remove it first")
    with temporary(out) as partial:
        partial.mkdir()
        try:
            yield partial
            if replace:
                replace_folder(partial, out)
            else:
                os.replace(partial, out)
        except OSError as error:
            if error.errno in FULL and error.filename is None:  # as a write reports it
                raise OSError(error.errno, os.strerror(error.errno), str(out)) from error
            raise


class Spool:
    """Texts of answers on disk, in the order they came, so that a million of them need no memory."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("w+b")
        self._starts = array("q")

    def add(self, prompt: Text, completion: Text) -> None:
        """Keep one answer."""
        self._starts.append(self._file.tell())
        line = json.dumps([prompt, completion], ensure_ascii=False)
        self._file.write(line.encode("utf-8") + b"\n")

    def read(self, number: int) -> tuple[Text, Text]:
        """The answer that was added as the ``number``-th."""
        self._file.seek(self._starts[number])
        prompt, completion = json.loads(self._file.readline())
        return prompt, completion

    def remove(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self._path.unlink()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], chat: bool) -> dict[str, Any]:
    """Write one split as its suffix says; its entry in the manifest: file, rows, bytes and their SHA-256."""
    count = (_write_parquet if path.suffix == ".parquet" else _write_jsonl)(path, rows, chat)
    digest, size = file_digest(path)
    return {"file": path.name, "rows": count, "bytes": size, "sha256": digest}


def file_digest(path: Path) -> tuple[str, int]:
    """SHA-256 and size in bytes of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file for people and programs: indented, not escaped."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]], chat: bool) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], chat: bool) -> int:
    text = TURNS if chat else pyarrow.string()
    schema = pyarrow.schema(
        [
            ("prompt", text),
            ("completion", text),
            ("label", pyarrow.bool_()),
            ("source", pyarrow.string()),
            ("group", pyarrow.string()),
        ]
    )
    count, chunk = 0, []
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for row in rows:
            chunk.append(row)
            count += 1
            if len(chunk) == CHUNK_ROWS:
                writer.write_table(pyarrow.Table.from_pylist(chunk, schema=schema))
                chunk = []
        writer.write_table(pyarrow.Table.from_pylist(chunk, schema=schema))
    return count
