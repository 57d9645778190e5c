"""Sources of rows: a dataset in memory, a list, a JSONL or Parquet file, a built folder, or the hub.

Each source yields its rows with line numbers counted from 1; a line that is not a row yields the reason.
"""

import json
import re
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RevisionNotFoundError
from tqdm.auto import tqdm

from prefopt.data.build.manifest import split_file
from prefopt.data.rows import UNPAIRED_FIELDS, RowError, check_values, show
from prefopt.errors import DataError, first_line

FILES = (".jsonl", ".json", ".parquet", ".csv")
UTF_16 = "is UTF-16; save it as UTF-8"
OTHER_FORMATS = {  # by the first bytes of a file that is not JSON lines
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
    b"\x1f\x8b": "is compressed (gzip); unpack it",
    b"PAR1": "is a Parquet file; name it .parquet",
}
BATCH_ROWS = 10_000  # rows of a Parquet file turned into Python objects at a time

UNREADABLE = (ValueError, OverflowError, pyarrow.ArrowException)  # e.g. a date after the year 9999

Raws = Generator[tuple[int, Mapping[str, Any] | RowError | None], None, None]  # (line, row | reason | blank)


def open_rows(
    source: Any,
    split: str | None,
    revision: str | None,
    *,
    data_dir: str | None = None,
    needs: Sequence[str] | None = None,
) -> tuple[str, Raws]:
    """The name of the source for messages, and its rows with their line numbers (from 1).

    ``needs`` names the columns of a published schema; by default they are those of unpaired rows or pairs. ``data_dir``
    is a folder within a hub dataset.
    """
    if isinstance(source, Dataset):
        return "dataset", _columnar(source, "dataset", needs)
    if isinstance(source, Sequence) and not isinstance(source, str):
        return "rows", _listed(source)
    if not isinstance(source, (str, Path)):
        raise DataError(
            f"the data source is a {type(source).__name__}; expected a map-style datasets.Dataset, a list of rows, "
            "a path or a hub id"
        )
    # a file's name may have bytes that are not UTF-8 and could not be printed
    path, name = Path(source).expanduser(), str(source).encode("utf-8", "backslashreplace").decode()
    if path.is_dir():
        path = split_file(path, split or "train")
        name = str(path)
    if not path.exists():
        if path.suffix.lower() in FILES or not is_hub_id(name):
            raise DataError(f"there is no file {name}")
        return name, _hub(name, split or "train", revision, data_dir, needs)
    if not path.is_file():
        raise DataError(f"{name} is not a regular file; expected a .jsonl or .parquet file")
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return name, _jsonl(path, needs)
    if suffix == ".parquet":
        return name, _parquet(path, needs)
    raise DataError(f"{name} has the extension {suffix or 'none'}; expected .jsonl or .parquet")


def local_file(path: str, split: str | None) -> Path | None:
    """The local file of a source; None if it is on the hub."""
    place = Path(path).expanduser()
    if place.is_dir():
        return split_file(place, split or "train", verify=False)
    return place if place.exists() else None


def commit_of(name: str, revision: str | None) -> str:
    """The commit of a revision of a hub dataset.

    Raises:
        DataError: there is no such dataset or revision, or the hub cannot be reached.
    """
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision  # needs no network where the dataset is cached
    try:
        commit = cast(str, HfApi().dataset_info(name, revision=revision).sha)
    except RevisionNotFoundError:
        raise DataError(f"the dataset {name} has no revision {revision!r} on the hub") from None
    except (OSError, ValueError, HTTPError) as error:
        raise _unreachable(name, "any", revision, error) from None
    return commit


def is_hub_id(name: str) -> bool:
    """Whether a name could be that of a dataset on the hub."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def _listed(rows: Sequence) -> Raws:
    for line, raw in enumerate(rows, start=1):
        yield line, _object(raw)


def _jsonl(path: Path, needs: Sequence[str] | None) -> Raws:
    """Read bytes line by line, so that a line that is not UTF-8 is one bad row."""
    checked = needs is None  # the usual schema is checked for each row
    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, delay=1) as bar,
    ):
        for line, data in enumerate(file, start=1):
            bar.update(len(data))
            if line == 1:
                _refuse_other_formats(path, data)
                data = data.removeprefix(b"\xef\xbb\xbf")
            raw = _parsed(data)
            if not checked and isinstance(raw, Mapping):
                _check_columns(list(raw), str(path), needs)
                checked = True
            yield line, raw


def _refuse_other_formats(path: Path, first: bytes) -> None:
    """Raise one error for a file that is not JSON lines, instead of one for each line."""
    for magic, problem in OTHER_FORMATS.items():
        if first.startswith(magic):
            raise DataError(f"{path} {problem}")
    if b"\0" in first[:2]:  # UTF-16 without a byte order mark
        raise DataError(f"{path} {UTF_16}")


def _parsed(data: bytes) -> Mapping[str, Any] | RowError | None:
    if not data.strip():
        return None
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return RowError(f"is not UTF-8 (byte {error.start + 1} of the line, 0x{data[error.start]:02x})")
    except RowError as error:
        return error
    except json.JSONDecodeError as error:
        return RowError(f"is not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return RowError(f"cannot be read as JSON: {error}")  # nested a thousand deep, a number of 5,000 digits
    return _object(raw)


def _object(raw: Any) -> Mapping[str, Any] | RowError:
    """The row, if it is an object with valid values."""
    if not isinstance(raw, Mapping):
        return RowError(f"is a {type(raw).__name__}; expected an object")
    try:
        check_values(raw)
    except RowError as error:
        return error
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RowError(f"has the key {show(twice)} twice")
    return found


def _parquet(path: Path, needs: Sequence[str] | None) -> Raws:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None
    names = file.schema_arrow.names
    _check_columns(names, str(path), needs)
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path} has the column {show(twice)} twice")
    line = 0
    with tqdm(total=file.metadata.num_rows, unit="row", desc=path.name, delay=1) as bar:
        batches = file.iter_batches(batch_size=BATCH_ROWS)
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{path} cannot be read after row {line}: {error}") from None
            if batch is None:
                return
            for raw in _python_rows(batch):
                line += 1
                bar.update()
                yield line, raw


def _python_rows(batch: pyarrow.RecordBatch) -> Iterator[Mapping[str, Any] | RowError]:
    """The rows of a batch; a row whose values Python cannot represent becomes a ``RowError``."""
    try:
        yield from batch.to_pylist()
        return
    except UNREADABLE:
        pass
    for row in range(batch.num_rows):
        yield _python_row(batch, row)


def _python_row(batch: pyarrow.RecordBatch, row: int) -> Mapping[str, Any] | RowError:
    raw = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            raw[name] = column[row].as_py()
        except UNREADABLE as error:
            return RowError(f"{name} cannot be read: {error}")
    return raw


def _columnar(dataset: Dataset, name: str, needs: Sequence[str] | None) -> Raws:
    _check_columns(dataset.column_names, name, needs)
    rows, line = dataset.with_format(None), 0
    with tqdm(total=len(rows), desc=name, unit="row", delay=1) as bar:
        while line < len(rows):
            try:
                for raw in rows.select(range(line, len(rows))) if line else rows:
                    line += 1
                    bar.update()
                    yield line, raw
            except UNREADABLE as error:  # it ends the iterator; restart after this row
                line += 1
                yield line, RowError(f"cannot be read: {error}")


def _check_columns(columns: Sequence[str], name: str, needs: Sequence[str] | None) -> None:
    """Raise one error for a column that is missing everywhere, instead of one for each row."""
    expected = (
        "prompt, completion, label, or prompt (optional), chosen, rejected" if needs is None else ", ".join(needs)
    )
    usual = ("chosen", "rejected") if {"chosen", "rejected"} & set(columns) else UNPAIRED_FIELDS
    needed = usual if needs is None else needs
    missing = [column for column in needed if column not in columns]
    if missing:
        raise DataError(
            f"{name} has no column {', '.join(missing)}; found {_few(columns) or 'none'}. Expected {expected}"
        )


def _few(columns: Sequence[str]) -> str:
    return ", ".join(name[:60] for name in columns[:20]) + (", ..." if len(columns) > 20 else "")


def _hub(
    name: str,
    split: str,
    revision: str | None,
    data_dir: str | None,
    needs: Sequence[str] | None,
) -> Raws:
    try:
        dataset = datasets.load_dataset(
            name, split=split, revision=revision, **({"data_dir": data_dir} if data_dir else {})
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HTTPError) as error:
        raise _unreachable(name, split, revision, error) from None
    yield from _columnar(dataset, name, needs)


def _unreachable(name: str, split: str, revision: str | None, error: Exception) -> DataError:
    return DataError(
        f"cannot load {name} (split {split}, revision {revision or 'newest'}); it is neither a local file nor a "
        f"dataset that can be fetched: {first_line(error)}"
    )
