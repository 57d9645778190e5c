"""From YAML and command line to a ``Recipe``; one error lists every problem."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from prefopt.errors import UserError
from prefopt.option_values import converted, in_bounds, nearest, show
from prefopt.options import SECTIONS, options_of, required
from prefopt.paths import RECIPE_NAME, paths_from
from prefopt.read_yaml import read_yaml
from prefopt.recipe.foreign_names import Entry, translate
from prefopt.recipe.named import RECIPES, find_recipe
from prefopt.recipe.schema import Recipe

EXTRA = "options of transformers.TrainingArguments without a key here go into training.extra"


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file and put the overrides on top.

    Args:
        path: a YAML file with the sections model, data, lora, loss and training, or the name of a packaged recipe. The
            recipe.yaml of a run folder names that folder and what it was trained on, also after a move.
        overrides: dotted keys with values, such as ``{"loss.beta": 0.2}``; ``{"lora": None}`` drops a section.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing or has an invalid value.
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
    """The dataclass of one section; None for an absent lora section, or if there are problems."""
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
            good[option] = in_bounds(converted(value, hints[option]), known[option].metadata["bounds"])
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


def _elsewhere(option: str) -> str:
    """A hint for a key in the wrong section, or in none."""
    name = str(option).rpartition(".")[2]
    homes = [f"{section}.{name}" for section in SECTIONS if name in options_of(section)]
    return f"; did you mean {' or '.join(homes)}?" if homes else ""
