"""manifest.json of a built folder, checked before it is used."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt.data.rows import show
from prefopt.data.write import file_digest
from prefopt.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 1

NAMES = {str: "text", int: "a whole number", dict: "an object", list: "a list", type(None): "null"}
FIELDS = {"fingerprint": (str,), "splits": (dict,), "sources": (list,), "arguments": (dict,)}
SPLIT_FIELDS = {"file": (str,), "rows": (int,), "sha256": (str,)}
SOURCE_FIELDS = {
    "name": (str,),
    "kind": (str,),
    "path": (str,),
    "split": (str, type(None)),
    "revision": (str, type(None)),
    "rows": (int,),
    "sha256_of_file": (str, type(None)),
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `prefopt data build` wrote.

    Raises:
        DataError: the folder has none, or a field has the wrong type.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder} is a folder; expected a .jsonl or .parquet file, a hub id, or a folder that `prefopt data "
            f"build` wrote (this one has no {MANIFEST})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not what `prefopt data build` writes (format {FORMAT})")
    _check(manifest, FIELDS, path, "")
    for name, split in manifest["splits"].items():
        _check(split, SPLIT_FIELDS, path, f"splits.{name:.40}")
        _check_file(split["file"], folder, path, f"splits.{name:.40}.file")
    for number, source in enumerate(manifest["sources"]):
        _check(source, SOURCE_FIELDS, path, f"sources[{number}]")
    return manifest


def split_file(folder: Path, split: str, *, verify: bool = True) -> Path:
    """The file of a split in a built folder.

    Args:
        folder: the built folder.
        split: name of the split.
        verify: compare the file's SHA-256 with that of the manifest.

    Raises:
        DataError: there is no such split or file, or the file was changed.
    """
    splits = read_manifest(folder)["splits"]
    if split not in splits:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
    path = folder / splits[split]["file"]
    if not path.is_file():
        raise DataError(f"there is no file {path}, which {folder / MANIFEST} names")
    if verify and file_digest(path)[0] != splits[split]["sha256"]:
        raise DataError(
            f"{path} was changed after it was built: its SHA-256 is not the one in {MANIFEST}; build the folder again"
        )
    return path


def _check(value: Any, fields: Mapping[str, tuple[type, ...]], path: Path, where: str) -> None:
    if not isinstance(value, dict):
        raise DataError(f"{path}: {where} is {show(value)}; expected an object")
    for name, kinds in fields.items():
        given = value.get(name)
        if not isinstance(given, kinds) or isinstance(given, bool):
            expected = " or ".join(NAMES[kind] for kind in kinds)
            place = f"{where}.{name}" if where else name
            raise DataError(f"{path}: {place} is {show(given)}; expected {expected}")


def _check_file(name: str, folder: Path, path: Path, where: str) -> None:
    """A manifest is untrusted: it may only name files in its own folder."""
    plain = name not in ("", ".", "..") and Path(name).name == name and "\0" not in name
    home = folder.resolve()
    homes = {home}
    if home.parent.name == "snapshots":  # in huggingface_hub's cache a file is a link to ../../blobs
        homes.add(home.parent.parent / "blobs")
    if not plain or (home / name).resolve().parent not in homes:
        raise DataError(
            f"{path}: {where} is {show(name)}; expected the name of a file in the same folder, and not a link out of it"
        )
