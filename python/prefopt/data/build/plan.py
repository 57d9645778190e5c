"""The plan of a build: sources and arguments, from a YAML file or the command line.

A YAML plan is a mapping of the fields of ``Plan``. Each entry of ``sources`` is a source as on the command line, or a
mapping of the fields of ``Source`` and the options of its kind.
"""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.data.build.convert import KINDS, nearest_kind
from prefopt.data.build.convert.mmlu_pro import TARGETS
from prefopt.data.build.convert.oasst1 import KEEP
from prefopt.data.build.language import LANGUAGES
from prefopt.data.sources import FILES
from prefopt.errors import DataError, UserError
from prefopt.read_yaml import read_yaml

FORMATS = ("parquet", "jsonl")
UNTIL = ("all", "first")
PLANS = Path(__file__).parent / "plans"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of rows. ``groups``, ``per_group`` and ``per_category`` are caps; ``options`` go to the converter."""

    kind: str
    path: str
    name: str
    split: str | None = None
    revision: str | None = None
    data_dir: str | None = None
    groups: int | None = None
    per_group: int | None = None
    per_category: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sources, and how they become splits."""

    sources: tuple[Source, ...]
    seed: int = 0
    validation: float = 0.05
    test: float = 0.0
    exact_split: bool = False
    groups_per_source: int | None = None
    max_rows: int | None = None
    until: str = "all"
    language: str | None = None
    language_share: float = 0.5
    messages: bool = False
    one_label: bool = False
    on_bad_row: str = "stop"
    format: str = "parquet"

    def described(self) -> dict[str, Any]:
        """The plan as plain values, for the manifest."""
        return dataclasses.asdict(self)


Check = tuple[Callable[[Any], bool], str]  # the test, and the expected value in words


def _whole(least: int) -> Check:
    return lambda value: type(value) is int and value >= least, f"a whole number, at least {least}"


def _one_of(names: Sequence[str]) -> Check:
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TEXT: Check = (lambda value: isinstance(value, str) and bool(value.strip()), "text")
_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
_SHARE: Check = (lambda value: _number(value) and 0 <= value < 1, "a number from 0 to below 1")

PLAN_CHECKS: dict[str, Check] = {
    "seed": _whole(0),
    "validation": _SHARE,
    "test": _SHARE,
    "exact_split": _FLAG,
    "groups_per_source": _whole(1),
    "max_rows": _whole(1),
    "until": _one_of(UNTIL),
    "language": _one_of(LANGUAGES),
    "language_share": (lambda value: _number(value) and 0 < value <= 1, "a number above 0, to 1"),
    "messages": _FLAG,
    "one_label": _FLAG,
    "on_bad_row": _one_of(("stop", "skip")),
    "format": _one_of(FORMATS),
}
SOURCE_CHECKS: dict[str, Check] = {
    "kind": (lambda value: isinstance(value, str) and value in KINDS, f"one of {', '.join(KINDS)}"),
    "path": _TEXT,
    "name": (
        lambda value: isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) is not None,
        "letters, digits, dots, dashes and underscores",
    ),
    "split": _TEXT,
    "revision": _TEXT,
    "data_dir": _TEXT,
    "groups": _whole(1),
    "per_group": _whole(1),
    "per_category": _whole(1),
}
OPTION_CHECKS: dict[str, Check] = {
    "min_ratio": (lambda value: _number(value) and value >= 1, "a number, at least 1"),
    "keep": _one_of(KEEP),
    "languages": (
        lambda value: isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value),
        "a list of language codes",
    ),
    "target": _one_of(TARGETS),
}


def make_plan(words: Sequence[str], **arguments: Any) -> Plan:
    """A plan from the arguments of the command line: sources or one plan; an option that is None is not set.

    A word is a plan (a .yaml file or the name of a packaged plan), ``[NAME=][KIND:]PATH[@REVISION]``, where PATH is a
    file or a hub id, or the KIND of a published set.

    Raises:
        DataError: an unknown name or an invalid value.

    Example:
        >>> plan = make_plan(["shp", "mine=rows.jsonl"], seed=3)
        >>> [(source.name, source.kind, source.path) for source in plan.sources]
        [('shp', 'shp', 'stanfordnlp/SHP'), ('mine', 'rows', 'rows.jsonl')]
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    plans = [file for word in words if (file := _plan_file(word)) is not None]
    if plans and len(words) > 1:
        raise DataError(f"{plans[0]} is a plan; expected one plan without sources, or sources without a plan")
    if plans:
        content, where = _read(plans[0]), str(plans[0])
    else:
        content, where = {"sources": list(words)}, "command line"
    _check_names(content, ("sources", *PLAN_CHECKS), where)
    values = {name: value for name, value in content.items() if value is not None}
    sources = values.pop("sources", None)
    if not isinstance(sources, list) or not sources:
        raise DataError(f"{where}: sources is {sources!r}; expected a list of sources")
    _check_values(values, PLAN_CHECKS, where)
    _check_values(given, PLAN_CHECKS, "command line")
    values |= given
    if values.get("validation", 0.05) + values.get("test", 0.0) >= 1:
        raise DataError(f"{where}: validation and test leave nothing to train on")
    made = tuple(_source(one, where) for one in sources)
    names = [source.name for source in made]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise DataError(f"two sources are called {twice}; name them: NAME={twice} and so on")
    return Plan(sources=made, **values)


def plan_names() -> list[str]:
    """Names of the packaged plans."""
    return sorted(path.stem for path in PLANS.glob("*.yaml"))


def _plan_file(word: str) -> Path | None:
    if Path(word).suffix.lower() in (".yaml", ".yml"):
        return Path(word)
    return PLANS / f"{word}.yaml" if word in plan_names() else None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise DataError(f"there is no plan {path}") from None
    except UserError as error:
        raise DataError(str(error)) from None
    if not isinstance(content, Mapping):
        raise DataError(f"{path} is {content!r:.60}; expected keys with values, sources among them")
    return content


def _source(given: Any, where: str) -> Source:
    """A source from a word or a mapping."""
    values = dict(_parsed(given) if isinstance(given, str) else _mapping(given, where))
    if "kind" not in values:
        values["kind"] = _kind_of(values)
    _check_values({"kind": values["kind"]}, SOURCE_CHECKS, where)
    kind = KINDS[values["kind"]]
    taken = inspect.signature(kind.convert).parameters
    options = {name: OPTION_CHECKS[name] for name in OPTION_CHECKS if name in taken}
    _check_names(values, (*SOURCE_CHECKS, *options), f"{where}: {values['kind']}")
    values = {name: value for name, value in values.items() if value is not None}
    _check_values(values, SOURCE_CHECKS | options, f"{where}: {values['kind']}")
    path = values.get("path", kind.path)
    if path is None:
        raise DataError(f"{where}: a source of the kind {values['kind']} needs a path")
    published = path == kind.path
    defaults = {
        "path": path,
        "name": values["kind"] if kind.path else re.sub(r"[^\w.-]+", "-", Path(path).stem),
        "split": kind.split,
        "revision": kind.revision if published else None,
        "per_group": kind.per_group,
    }
    fields = {name: value for name, value in values.items() if name in SOURCE_CHECKS}
    return Source(
        **(defaults | fields),
        options={name: value for name, value in values.items() if name in options},
    )


def _parsed(word: str) -> dict[str, Any]:
    """``[NAME=][KIND:]PATH[@REVISION]`` or ``KIND``."""
    values: dict[str, Any] = {}
    if Path(word).exists():
        return {"path": word}  # even with a colon or @ in its name
    if named := re.fullmatch(r"([\w.-]+)=(.+)", word):
        values["name"], word = named.groups()
    kind, colon, rest = word.partition(":")
    if word in KINDS and KINDS[word].path:
        return values | {"kind": word}
    if colon:
        if kind not in KINDS:
            raise DataError(f"{kind} is no kind of source{nearest_kind(kind)}")
        values["kind"], word = kind, rest
    if "@" in word and not _is_file(word):
        word, _, values["revision"] = word.partition("@")
    values["path"] = word
    if "kind" not in values and "/" not in word and not _is_file(word):
        near = difflib.get_close_matches(word, [*KINDS, *plan_names()], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"there is no file, plan or published set {word}{hint}")
    return values


def _is_file(word: str) -> bool:
    """Whether a word names a local file or folder rather than a hub dataset."""
    return Path(word).suffix.lower() in FILES or Path(word).exists()


def _kind_of(values: Mapping[str, Any]) -> str:
    """A published set is recognised by its hub id; other sources have the usual schema."""
    return next((name for name, kind in KINDS.items() if kind.path == values.get("path")), "rows")


def _mapping(given: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping) or not {"kind", "path"} & set(given):
        raise DataError(f"{where}: a source is {given!r:.60}; expected a kind or a path")
    return given


def _check_names(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise DataError(f"{where}: {name} is unknown{hint}")


def _check_values(values: Mapping[str, Any], checks: Mapping[str, Check], where: str) -> None:
    for name, value in values.items():
        good, words = checks[name]
        if not good(value):
            hint = nearest_kind(str(value)) if name == "kind" else ""
            raise DataError(f"{where}: {name} is {value!r:.60}; expected {words}{hint}")
