"""`prefopt data inspect`: counts, lengths and a few rows of a source."""

from collections import Counter
from pathlib import Path

import numpy as np

from prefopt.data.build.manifest import read_manifest
from prefopt.data.read import LoadedRows, load_rows
from prefopt.data.rows import Text, plain_text

SHOWN_CHARACTERS = 300


def describe(source: str | Path, *, split: str | None = None, revision: str | None = None, rows: int = 2) -> str:
    """Counts by split, source and label, lengths in characters, and a few rows.

    Args:
        source: a built folder, a .jsonl or .parquet file, or a hub id.
        split: of a folder (all of them if not given) or of a hub dataset.
        revision: of a hub dataset.
        rows: how many to show of each split.

    Raises:
        DataError: it cannot be read, or a file of the folder was changed after it was built.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        loaded = load_rows(source, split=split, revision=revision, on_bad_row="skip")
        return "\n\n".join(_parts(loaded.name, loaded, rows))
    manifest = read_manifest(folder)
    names = [split] if split else list(manifest["splits"])
    parts, groups = [_head(folder, manifest)], dict[str, set[int]]()
    for name in names:
        loaded = load_rows(folder, split=name, on_bad_row="skip")
        parts += _parts(name, loaded, rows)
        groups[name] = set(loaded.rows["group"])
    shared = sum(count > 1 for count in Counter(g for one in groups.values() for g in one).values())
    if len(groups) > 1:
        parts.append(f"groups in more than one split: {shared}")
    return "\n\n".join(parts)


def _head(folder: Path, manifest: dict) -> str:
    lines = [f"{folder}  fingerprint {manifest['fingerprint'][:16]}"]
    for source in manifest["sources"]:
        where = " ".join(str(source[name]) for name in ("path", "split", "revision") if source[name])
        lines.append(f"  {source['name']}: {source['rows']:,} rows of {where}")
    return "\n".join(lines)


def _parts(title: str, loaded: LoadedRows, rows: int) -> list[str]:
    return [_table(title, loaded), _lengths(loaded), *_rows(loaded, rows)]


def _table(title: str, loaded: LoadedRows) -> str:
    labels: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    groups: dict[str, set[int]] = {}
    columns = loaded.rows.select_columns(["source", "label", "group"]).with_format(None)
    for row in columns:
        labels[row["label"]][row["source"]] += 1
        groups.setdefault(row["source"], set()).add(row["group"])
    sources = sorted(groups)
    width = max(len(name) for name in (*sources, "all", "source"))
    kind = "chat messages" if loaded.conversational else "text"
    lines = [
        f"{title}: {len(loaded.rows):,} rows ({kind})",
        f"  {'source':<{width}}  desirable  undesirable   groups",
    ]
    for name in (*sources, *(["all"] if len(sources) > 1 else [])):
        counted = [side.total() if name == "all" else side[name] for side in (labels[True], labels[False])]
        distinct = len(set().union(*groups.values())) if name == "all" and name not in groups else len(groups[name])
        lines.append(f"  {name:<{width}}  {counted[0]:>9,}  {counted[1]:>11,}  {distinct:>7,}")
    if loaded.bad:
        lines.append(f"  {len(loaded.bad)} bad rows, the first: {loaded.bad[0]}")
    return "\n".join(lines)


def _lengths(loaded: LoadedRows) -> str:
    lines = ["  characters        min   median      95%      max"]
    labels = np.array(loaded.rows["label"])
    for title, column, chosen in (
        ("prompt", "prompt", labels | True),
        ("answer, good", "completion", labels),
        ("answer, bad", "completion", ~labels),
    ):
        lengths = np.array([len(plain_text(text)) for text in loaded.rows[column]])[chosen]
        if lengths.size:
            shown = (round(float(one)) for one in np.quantile(lengths, [0, 0.5, 0.95, 1]))
            lines.append(f"  {title:<12}" + "".join(f"{one:>9,}" for one in shown))
    return "\n".join(lines)


def _rows(loaded: LoadedRows, most: int) -> list[str]:
    shown = []
    for row in loaded.rows.select(range(min(most, len(loaded.rows)))):
        mark = "desirable" if row["label"] else "undesirable"
        shown.append(
            f"  {row['source']}, line {row['line']}, {mark}\n"
            f"    asked:    {_short(row['prompt'])}\n    answered: {_short(row['completion'])}"
        )
    return shown


def _short(text: Text) -> str:
    if isinstance(text, str) or len(text) == 1:
        plain = plain_text(text)
    else:
        plain = " ".join(f"[{message['role']}] {message['content']}" for message in text)
    plain = " ".join(plain.split())
    return plain if len(plain) <= SHOWN_CHARACTERS else f"{plain[:SHOWN_CHARACTERS]}..."
