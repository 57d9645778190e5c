"""From YAML and command line to a ``Recipe``: strict, and everything that is wrong said at once."""

import difflib
import math
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from prefopt.errors import UserError
from prefopt.paths import RECIPE_NAME, paths_from
from prefopt.read_yaml import read_yaml
from prefopt.recipe.named import RECIPES, find_recipe
from prefopt.recipe.old_keys import Entry, translate
from prefopt.recipe.schema import SECTIONS, Recipe, options_of, required

EXTRA = "options of transformers.TrainingArguments without a key here go into training.extra"
LARGEST = 2**63 - 1  # of an integer that torch and Arrow can hold


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file and put the overrides on top.

    Args:
        path: of a YAML file with the sections model, data, lora, loss and training, or the name of one that comes with the
            package. The recipe.yaml of a run folder names that folder and what it was trained on, also after a move.
        overrides: dotted keys with values, such as ``{"loss.beta": 0.2}``; ``{"lora": None}`` drops a section.

    Raises:
        UserError: the file cannot be read, or any key is unknown, missing, of the wrong type, out of bounds or not a valid choice.
    """
    path = find_recipe(path)
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}") from None
    except UserError as error:
        raise UserError(str(error)) from None
    name = path.stem if path.parent == RECIPES else str(path)
    in_run = path.name == RECIPE_NAME and (path.parent / "run.json").is_file()
    if in_run and isinstance(content, Mapping):
        content = paths_from(content, path.parent)
    return make_recipe(content, overrides, name=name)


def make_recipe(content: Any, overrides: Mapping[str, Any] | None = None, name: str = "recipe") -> Recipe:
    """A ``Recipe`` from nested mappings; see ``load_recipe``.

    Example:
        >>> content = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "training": {"output_dir": "run"}}
        >>> make_recipe(content, {"loss.beta": 0.2}).loss.beta
        0.2
        >>> try:
        ...     make_recipe(content, {"loss.betta": 0.2})
        ... except UserError as error:
        ...     print(error)
        command line: loss.betta is unknown; did you mean loss.beta?
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{name}: is {show(content)}; expected the sections {', '.join(SECTIONS)}")
    problems: list[str] = []
    values = translate(_flatten(content, name, problems), problems)
    values = _overridden(values, overrides or {}, problems)
    for key, (_, where) in values.items():
        section, dot, option = key.partition(".")
        if section not in SECTIONS:
            near = nearest(section, SECTIONS, after=dot + option) or _elsewhere(option or section)
            problems.append(f"{where}: {key} is unknown{near}")
    sections = {section: _section(section, values, name, problems) for section in SECTIONS}
    if problems:
        raise UserError("\n".join(problems))
    return Recipe(**sections, name=name)


def _section(section: str, values: Mapping[str, Entry], name: str, problems: list[str]) -> Any:
    """The dataclass of one section; None for a lora that is not asked for, or if there are problems."""
    known, hints = options_of(section), get_type_hints(SECTIONS[section])
    given = {key.partition(".")[2]: entry for key, entry in values.items() if key.startswith(f"{section}.")}
    good = {}
    for option, (value, where) in given.items():
        if option not in known:
            near = nearest(option, known, f"{section}.") or _elsewhere(option)
            if not near and section == "training":
                near = f"; {EXTRA}"
            problems.append(f"{where}: {section}.{option} is unknown{near}")
            continue
        try:
            good[option] = in_bounds(converted(value, hints[option]), known[option].metadata)
        except ValueError as error:
            problems.append(f"{where}: {section}.{option} is {show(value)}; expected {error}")
    if section == "lora" and not given and "lora" not in values:
        return None
    missing = [key for key, one in known.items() if required(one) and key not in given]
    problems += [f"{name}: {section}.{key} is missing: {known[key].metadata['help']}" for key in missing]
    return None if problems else SECTIONS[section](**good)


def _overridden(values: dict[str, Entry], overrides: Mapping[str, Any], problems: list[str]) -> dict[str, Entry]:
    given = {key: (value, "command line") for key, value in overrides.items()}
    for key, (value, where) in translate(given, problems).items():
        if key == "lora" and value is None:
            values = {known: entry for known, entry in values.items() if known.partition(".")[0] != "lora"}
        elif key in SECTIONS and (key, value) != ("lora", {}):
            problems.append(f"{where}: {key} is {show(value)}; expected null or {{}}, and only for lora")
        else:
            values[key] = (value, where)
    return values


def _flatten(content: Mapping, name: str, problems: list[str]) -> dict[str, Entry]:
    """{dotted key: entry}; `lora: {}` stays as "lora" to mean an adapter with all defaults."""
    values: dict[str, Entry] = {}
    for section, options in content.items():
        if section not in SECTIONS:
            values[str(section)] = (options, name)
        elif isinstance(options, Mapping):
            if section == "lora" and not options:
                values["lora"] = (options, name)
            values |= {f"{section}.{option}": (value, name) for option, value in options.items()}
        elif options is not None:
            problems.append(f"{name}: {section} is {show(options)}; expected keys with values")
    return values


def nearest(key: str, known: Any, prefix: str = "", after: str = "") -> str:
    near = difflib.get_close_matches(str(key), list(known), n=1)
    return f"; did you mean {prefix}{near[0]}{after}?" if near else ""


def _elsewhere(option: str) -> str:
    """A key that stands in the wrong section, or in none."""
    name = str(option).rpartition(".")[2]
    homes = [f"{section}.{name}" for section in SECTIONS if name in options_of(section)]
    return f"; did you mean {' or '.join(homes)}?" if homes else ""


def converted(value: Any, hint: Any) -> Any:
    """The value, if it is of the type; otherwise a ValueError that says what is expected."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _one_of(value, get_args(hint))
    if origin is Literal:
        if value is False:  # YAML 1.1 reads off and no as false
            value = next((name for name in ("off", "no") if name in get_args(hint)), value)
        if isinstance(value, str) and value in get_args(hint):
            return value
        raise ValueError(f"one of {', '.join(get_args(hint))}{nearest(value, get_args(hint))}")
    if origin is list:
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return value
        raise ValueError("a list of names")
    if origin is tuple:
        kinds = get_args(hint)
        if isinstance(value, (list, tuple)) and len(value) == len(kinds):
            return tuple(converted(one, kind) for one, kind in zip(value, kinds, strict=True))
        raise ValueError(f"a list of {len(kinds)} numbers")
    if hint is type(None):
        if value is None:
            return None
        raise ValueError("null")
    return _plain(value, hint)


def in_bounds(value: Any, bounds: Mapping[str, float | None]) -> Any:
    """The value, if it is not below ``least``, not at ``above`` or below, and not at ``below`` or above."""
    least, above, below = (bounds.get(bound) for bound in ("least", "above", "below"))
    words = [
        f"{word} {bound:g}" if isinstance(bound, float) else f"{word} {bound}"
        for word, bound in (("at least", least), ("above", above), ("below", below))
        if bound is not None
    ]
    inside = value is None or (
        (least is None or value >= least) and (above is None or value > above) and (below is None or value < below)
    )
    if not inside:
        raise ValueError(f"a number {' and '.join(words)}")
    return value


def _one_of(value: Any, hints: tuple) -> Any:
    expected = []
    for hint in hints:
        try:
            return converted(value, hint)
        except ValueError as error:
            expected.append(str(error))
    raise ValueError(" or ".join(expected))


def _plain(value: Any, hint: type) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > LARGEST:
            raise ValueError("a whole number of at most 64 bits")
        return value
    if hint is float:
        if isinstance(value, str):  # YAML reads 1e-5, without a dot, as text
            try:
                value = float(value)
            except ValueError:
                raise ValueError("a number") from None
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError("a number of at most 64 bits")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    if hint is str and isinstance(value, str) and value.strip():
        if re.search("[\0\ud800-\udfff]", value):
            raise ValueError("text in UTF-8 without NUL")
        return value
    if hint is dict and isinstance(value, dict):
        return value
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "keys with values",
    }
    raise ValueError(names[hint])


def show(value: Any) -> str:
    """A value in a message, at most 60 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
