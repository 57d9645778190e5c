"""Local paths in a run's recipe.yaml, stored so that they are found from any folder and after the project has moved.

A local path is stored absolute, and so is the run folder itself. Where a stored path no longer exists, it is looked for
relative to where the run folder is now, as it was relative to the stored run folder: so a project that is moved as a
whole stays usable. Hub ids and names of what comes with the package stay as they are.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RECIPE_NAME = "recipe.yaml"  # in a run folder
RUN = "training.output_dir"
SOURCES = ("model.path", "model.ref_path", "data.path", "data.eval_path")  # paths or hub ids
FILES = ("data.plan", "data.chat_template")  # files or names that come with the package
SUFFIXES = (".jsonl", ".parquet", ".gguf")


def absolute_paths(content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's sections with every local path absolute.

    Two recipes that name the same places from different folders are equal afterwards.
    """
    planned = _value(content, "data.plan") is not None

    def stored(key: str, path: str) -> str:
        if key in FILES:
            local = Path(path).suffix != ""
        else:
            local = key == RUN or (key == "data.path" and planned) or is_local(path)
        return absolute(path) if local else path

    return _changed(content, stored)


def paths_from(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The sections of the recipe.yaml in a run folder, with its paths as they are now.

    Args:
        content: as it was stored.
        folder: where the run folder is now; ``training.output_dir`` becomes its absolute path.
    """
    was = _value(content, RUN)

    def now(key: str, path: str) -> str:
        if key == RUN:
            return absolute(folder)
        if key in FILES and not Path(path).suffix:
            return path
        return path_from(path, was, folder)

    return _changed(content, now)


def path_from(path: str, was: Any, folder: Path) -> str:
    """Where a path stored in a run folder is now; as it is if it is not found, or a hub id.

    Args:
        path: as stored.
        was: the run folder's own path as stored, if any.
        folder: where the run folder is now.
    """
    stored = Path(path).expanduser()
    if not isinstance(was, str) or (stored.is_absolute() and stored.exists()):
        return path
    start = Path(was).expanduser()
    if start.is_absolute() != stored.is_absolute():  # a hub id beside an absolute run folder
        return path
    if stored.is_absolute() and os.path.commonpath([stored, start]) == stored.anchor:
        return path  # only the root in common: they were not in one project
    relative = os.path.relpath(stored, start)
    for place in (absolute(folder), folder.resolve()):  # they differ where the folder is a link
        found = Path(os.path.normpath(os.path.join(place, relative)))
        if found.exists():
            return str(found)
    return path


def absolute(path: str | Path) -> str:
    """The absolute path, links not followed: a file in the hub's cache is a link to one without a suffix."""
    return os.path.abspath(Path(path).expanduser())


def is_path(name: str) -> bool:
    """Whether a name can only be a path of this machine, and not a hub id.

    Example:
        >>> is_path("./model"), is_path("a/b/c"), is_path("rows.jsonl"), is_path("Qwen/Qwen3-0.6B")
        (True, True, True, False)
    """
    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    return local or Path(name).suffix.lower() in SUFFIXES


def is_local(name: str) -> bool:
    """Whether a name is a path of this machine rather than a hub id; a file or folder that exists comes first."""
    return is_path(name) or Path(name).expanduser().exists()


def is_missing(name: str) -> bool:
    """Whether a name can only be a path, and nothing is there."""
    return is_path(name) and not os.path.exists(os.path.expanduser(name))


def _value(content: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    options = content.get(section)
    return options.get(name) if isinstance(options, Mapping) else None


def _changed(content: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    changed = dict(content)
    for key in (*SOURCES, *FILES, RUN):
        path = _value(content, key)
        if isinstance(path, str) and path.strip():
            section, _, name = key.partition(".")
            changed[section] = {**changed[section], name: change(key, path)}
    return changed
