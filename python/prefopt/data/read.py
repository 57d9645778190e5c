"""Load preference rows: read, check, split pairs into two rows, count, and report every bad row."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, Value

from prefopt.data.labels import label_table, suggestion
from prefopt.data.rows import (
    OPTIONAL_FIELDS,
    PAIRED_FIELDS,
    REFUSED_FIELDS,
    UNPAIRED_FIELDS,
    LabelError,
    LabelTable,
    RowError,
    as_messages,
    bad_rows_error,
    group_of,
    show,
    unpaired_rows,
)
from prefopt.data.sources import open_rows
from prefopt.errors import BadRow, DataError

logger = logging.getLogger(__name__)

KNOWN_FIELDS = {*UNPAIRED_FIELDS, *PAIRED_FIELDS, *OPTIONAL_FIELDS, *REFUSED_FIELDS}
ON_BAD_ROW = ("stop", "skip")
SHOWN_FIELDS = 20
CHUNK_ROWS = 10_000  # rows held as Python objects before they are packed into Arrow


@dataclass(frozen=True)
class LoadedRows:
    """Checked rows.

    Attributes:
        rows: columns prompt, completion, label, source, line and group.
        bad: the rows that were omitted.
        counts: ``read`` (rows in the source), ``rows`` (kept; a pair counts twice), ``desirable``, ``undesirable``,
            ``groups``, ``pairs``, ``bad`` and ``blank_lines``.
        ignored: how often each unused field occurs.
        fingerprint: depends on the content of the rows only.
        name: of the source.
    """

    rows: Dataset
    bad: list[BadRow] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    name: str = ""

    @property
    def conversational(self) -> bool:
        """Whether the rows are chat messages rather than text."""
        return not isinstance(self.rows.features["prompt"], Value)


def load_rows(
    source: Dataset | str | Path | Sequence[Mapping],
    *,
    on_bad_row: str = "stop",
    split: str | None = None,
    revision: str | None = None,
    label_map: Mapping | None = None,
    as_chat: bool = False,
) -> LoadedRows:
    """Read and check every row of a source; a pair becomes two adjacent rows.

    Args:
        source: a map-style ``datasets.Dataset``, a list of rows, the path of a .jsonl or .parquet file, or "owner/name"
            on the hub.
        on_bad_row: "stop" raises ``DataError`` with the count and the first ten bad rows; "skip" omits them and
            lists them in ``bad``.
        split, revision: of a hub dataset; the default split is "train".
        label_map: the meaning of labels other than true and false, such as ``{1: True, 0: False}``.
        as_chat: convert text to chat messages, a user's for the prompt and an assistant's for the completion.

    Returns:
        ``LoadedRows``. Blank lines of a JSONL file are skipped and counted.

    Raises:
        DataError: bad rows, no rows, rows of both kinds (text and chat), a file or dataset that cannot be read.

    Example:
        >>> loaded = load_rows([{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}])
        >>> loaded.rows["completion"][:], loaded.counts["desirable"]
        (['4', '5'], 1)
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row is {on_bad_row!r}; expected {' or '.join(ON_BAD_ROW)}")
    labels = label_table(label_map)
    name, raws = open_rows(source, split, revision)
    table, bad = _Table(name, labels, as_chat), []
    counts: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    unknown_labels: set[tuple[type, Any]] = set()
    for line, raw in raws:
        if raw is None:
            counts["blank_lines"] += 1
            continue
        counts["read"] += 1
        try:
            if isinstance(raw, RowError):
                raise raw
            counts["pairs"] += table.add(line, raw) - 1
            ignored.update(key for key in raw if key not in KNOWN_FIELDS)
        except RowError as error:
            bad.append(BadRow(name, line, str(error)))
            if isinstance(error, LabelError):
                unknown_labels.add(error.label)
    hint = "" if table.count else suggestion(unknown_labels)
    if bad and on_bad_row == "stop":
        raise bad_rows_error(bad, counts["read"], name, hint=hint)
    if ignored:
        names = sorted(ignored)
        more = ", ..." if len(names) > SHOWN_FIELDS else ""
        shown = ", ".join(name[:60] for name in names[:SHOWN_FIELDS])
        logger.warning("%s: unused fields: %s%s", name, shown, more)
    if not table.count:
        reason = f"; all {len(bad)} are bad, the first: {bad[0]}" if bad else ""
        raise DataError(f"{name} has no rows to train on{reason}" + (f"\n{hint}" if hint else ""), bad)
    return _counted(LoadedRows(table.finish(), bad, dict(counts), dict(ignored), table.fingerprint(), name))


def split_by_group(loaded: LoadedRows, fraction: float, seed: int = 0) -> tuple[LoadedRows, LoadedRows]:
    """Hold out about ``fraction`` of the groups for evaluation.

    The hash of its group decides the side of a row. So all answers to a prompt are on the same side, and rows keep
    their side when the file is reordered or grows.

    Raises:
        DataError: if one side would be empty.

    Example:
        >>> loaded = load_rows([{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(100)])
        >>> train, held_out = split_by_group(loaded, 0.2)
        >>> train.counts["groups"] + held_out.counts["groups"], set(train.rows["group"]) & set(held_out.rows["group"])
        (100, set())
    """
    if not 0 < fraction < 1:
        raise ValueError(f"eval_fraction is {fraction}; expected a number between 0 and 1")
    held_out = [_unit_hash(f"{seed}|{group}") < fraction for group in loaded.rows["group"]]
    sides = []
    for want, side in ((False, "train"), (True, "eval")):
        chosen = [row for row, out in enumerate(held_out) if out is want]
        if not chosen:
            raise DataError(
                f"eval_fraction {fraction} leaves the {side} side of {loaded.name} without rows "
                f"({loaded.counts['groups']} different prompts)"
            )
        key = hashlib.sha256(f"{loaded.fingerprint}|{fraction}|{seed}|{side}".encode()).hexdigest()
        sides.append(LoadedRows(loaded.rows.select(chosen), fingerprint=key, name=loaded.name))
    train, evaluation = sides
    counts = loaded.counts | {"held_out": len(evaluation.rows)}
    # what was found in the source is reported once, with the training side
    train = LoadedRows(train.rows, loaded.bad, counts, loaded.ignored, train.fingerprint, loaded.name)
    return _counted(train), _counted(evaluation)


def _counted(loaded: LoadedRows) -> LoadedRows:
    rows = loaded.rows
    desirable = sum(rows["label"])
    found = {"read": len(rows), "pairs": 0, "blank_lines": 0} | loaded.counts
    loaded.counts.update(
        found,
        rows=len(rows),
        desirable=desirable,
        undesirable=len(rows) - desirable,
        groups=len(set(rows["group"])),
        bad=len(loaded.bad),
    )
    return loaded


class _Table:
    """Rows packed into Arrow a chunk at a time; the first good row decides between text and chat."""

    def __init__(self, name: str, labels: LabelTable, as_chat: bool):
        self.name, self.labels, self.as_chat = name, labels, as_chat
        self.count = 0
        self.chat: bool | None = None
        self._pending: list[dict] = []
        self._chunks: list[pyarrow.Table] = []
        self._hash = hashlib.sha256()

    def add(self, line: int, raw: Mapping[str, Any]) -> int:
        """Check a row and add it; returns the number of rows added (2 for a pair)."""
        rated = unpaired_rows(raw, self.labels)
        if self.as_chat:
            rated = [as_messages(row) for row in rated]
        source = raw.get("source")
        if source is not None and not isinstance(source, str):
            raise RowError(f"source is {show(source)}; expected text")
        group = group_of(raw, rated[0].prompt)
        chat = isinstance(rated[0].prompt, list)
        if self.chat is None:
            self.chat = chat
        elif chat != self.chat:
            kinds = ("chat messages", "text") if chat else ("text", "chat messages")
            raise RowError(f"is {kinds[0]}, while the rows before it are {kinds[1]}; expected one kind")
        for row in rated:
            self._pending.append(row._asdict() | {"source": source or self.name, "line": line, "group": group})
            content = json.dumps([row.prompt, row.completion, row.label, group])
            self._hash.update(content.encode() + b"\n")
        self.count += len(rated)
        if len(self._pending) >= CHUNK_ROWS:
            self._pack()
        return len(rated)

    def finish(self) -> Dataset:
        if self._pending:
            self._pack()
        return Dataset(pyarrow.concat_tables(self._chunks))

    def fingerprint(self) -> str:
        return self._hash.hexdigest()

    def _pack(self) -> None:
        text = [{"role": Value("string"), "content": Value("string")}] if self.chat else Value("string")
        features = {"prompt": text, "completion": text, "label": Value("bool"), "source": Value("string")}
        schema = Features({**features, "line": Value("int64"), "group": Value("int64")}).arrow_schema
        self._chunks.append(pyarrow.Table.from_pylist(self._pending, schema=schema))
        self._pending = []


def _unit_hash(key: str) -> float:
    """A number in [0, 1) that depends on the key only."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
