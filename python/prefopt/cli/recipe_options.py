"""A recipe's options on the command line, `--SECTION.OPTION VALUE`; nothing heavy is imported."""

import argparse
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from typing import Any, Union, get_args, get_origin, get_type_hints

from prefopt.cli.arguments import reject_unknown
from prefopt.errors import UserError
from prefopt.options import SECTIONS, options_of, required
from prefopt.read_yaml import parse_yaml
from prefopt.recipe.foreign_names import FOREIGN
from prefopt.recipe.load import load_recipe
from prefopt.recipe.schema import Recipe

OVERRIDE = "override "  # before the dotted keys among the parsed arguments


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every option of every section, with its help and default.

    The bare names are accepted too, without a line of help: --beta is --loss.beta. So are the names of other
    libraries, which the recipe translates or refuses.
    """
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(section, kind.__doc__)
        if section == "lora":
            group.add_argument("--lora", dest=f"{OVERRIDE}lora", metavar="null", help="no adapter")
        hints = get_type_hints(kind)
        for name, one in options_of(section).items():
            group.add_argument(
                f"--{section}.{name}",
                dest=f"{OVERRIDE}{section}.{name}",
                metavar=_metavar(hints[name]),
                help=_help(one),
            )
    for name in sorted(_homes().keys() | FOREIGN.keys()):
        home = _homes().get(name, [])
        parser.add_argument(
            _bare(name),
            dest=OVERRIDE + (home[0] if len(home) == 1 else name),
            help=argparse.SUPPRESS,
        )


def recipe_of(given: argparse.Namespace, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe that was named, made tiny where that was asked for, which prints what shrinks."""
    if not given.tiny:
        return load_recipe(given.recipe, overrides)
    from prefopt.demo.tiny import tiny_recipe

    recipe = tiny_recipe(given.recipe, overrides)
    print("\n".join(recipe.notes), flush=True)
    return recipe


def overrides_of(given: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """Dotted keys with values, for ``load_recipe``.

    A dotted name that is no option is among them: the recipe's check reports it with the rest.

    Args:
        given, rest: of ``parse_known_args``.
        known: the command's own options, for what is neither.
    """
    overrides = {
        key.removeprefix(OVERRIDE): _value(key.removeprefix(OVERRIDE), text)
        for key, text in vars(given).items()
        if key.startswith(OVERRIDE) and text is not None
    }
    for key in overrides:
        home = _homes().get(key, [])
        if len(home) > 1:
            expected = " or ".join(f"--{one}" for one in home)
            raise UserError(f"command line: {_bare(key)} is ambiguous; expected {expected}")
    words = list(rest)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        if not re.match(r"--\w+\.\w", name):
            reject_unknown([word], [*known, *map(_bare, _homes())])
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "null"
        overrides[name[2:]] = _value(name[2:], text)
    return overrides


def _value(key: str, text: str) -> Any:
    """A value as YAML would read it, except that a name stays a name: run 7 is a folder, not a number."""
    if not text.strip():
        raise UserError(f"command line: {key} is empty; expected a value, or null for the default")
    foreign = FOREIGN.get(key)
    section, _, name = (foreign.new if foreign and foreign.new else key).partition(".")
    try:
        value = parse_yaml(text)
    except UserError as error:
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        raise UserError(f"command line: {key} is {shown!r}; expected a YAML value: {error}") from None
    hints = get_type_hints(SECTIONS[section]) if section in SECTIONS else {}
    named = str in _kinds(hints.get(name))
    return text if named and value is not None and not isinstance(value, list) else value


def _homes() -> dict[str, list[str]]:
    """The dotted keys of each option name."""
    found: dict[str, list[str]] = {}
    for section in SECTIONS:
        for name in options_of(section):
            found.setdefault(name, []).append(f"{section}.{name}")
    return found


def _bare(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _kinds(hint: Any) -> tuple:
    """The alternatives of a union, the type itself otherwise."""
    return get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)


def _metavar(hint: Any) -> str:
    return "|".join(_word(kind) for kind in _kinds(hint))


def _word(kind: Any) -> str:
    choices = [choice for choice in get_args(kind) if isinstance(choice, str)]
    if choices:
        return "{" + ",".join(choices) + "}"
    words = {
        bool: "true|false",
        int: "INT",
        float: "NUMBER",
        str: "TEXT",
        dict: "MAPPING",
        type(None): "null",
    }
    return words.get(kind, "LIST")


def _help(one: Field) -> str:
    if required(one):
        return f"{one.metadata['help']} (required)"
    default = one.default_factory() if one.default_factory is not MISSING else one.default
    shown = one.metadata["shown"] or (default if isinstance(default, str) else json.dumps(default))
    return f"{one.metadata['help']} (default: {shown})".replace("%", "%%")
