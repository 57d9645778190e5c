"""`prefopt train` on the command line; nothing heavy is imported before it runs."""

import argparse
import json
import re
import types
from collections.abc import Callable
from dataclasses import MISSING, Field
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from prefopt.recipe.error import RecipeError
from prefopt.recipe.load import load_recipe
from prefopt.recipe.named import recipe_list
from prefopt.recipe.schema import SECTIONS, options_of, required

FLAGS = ("--list", "--tiny", "--resume", "--lora")
OVERRIDE = "override "  # before the dotted keys among the parsed arguments


def add_train_command(
    commands: Any,
    command: Callable[..., argparse.ArgumentParser],
    no_more: Callable[[list[str], list[str]], None],
) -> None:
    """Add the command.

    Args:
        commands: of the parser.
        command: makes one of them, from (commands, name, what it runs, summary).
        no_more: refuses arguments that nobody took, from (them, known options).
    """

    def run(given: argparse.Namespace, rest: list[str]) -> int:
        if given.list:
            no_more(rest, list(FLAGS))
            print(recipe_list())
            return 0
        if given.recipe is None:
            train.error("the following arguments are required: RECIPE")
        overrides = _overrides(given, rest, no_more)
        if given.tiny:
            from prefopt.tiny import tiny_recipe

            recipe = tiny_recipe(given.recipe, overrides)
            print("\n".join(recipe.notes), flush=True)
        else:
            recipe = load_recipe(given.recipe, overrides)
        from prefopt.recipe import run_recipe

        folder = run_recipe(recipe, resume=given.resume)
        print(folder / "report.html")
        return 0

    train = command(
        commands,
        "train",
        run,
        "train as a recipe says",
        usage="prefopt train RECIPE [--tiny] [--resume] [--SECTION.OPTION VALUE ...]\n       prefopt train --list",
        epilog="Any option of the recipe can be set here, over what the file says: --loss.beta 0.2. "
        "`--lora null` trains all weights instead of an adapter.",
    )
    train.set_defaults(resumable=True)
    train.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="a .yaml file, or the name of a recipe that comes with prefopt",
    )
    train.add_argument(
        "--list", action="store_true", help="the recipes that come with prefopt, and nothing else"
    )
    train.add_argument(
        "--tiny",
        action="store_true",
        help="try the recipe on a tiny model and embedded rows, without network, in under a minute",
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the run folder's last checkpoint"
    )
    for section, kind in SECTIONS.items():
        group = train.add_argument_group(section, kind.__doc__)
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


def _overrides(
    given: argparse.Namespace, rest: list[str], no_more: Callable[[list[str], list[str]], None]
) -> dict[str, Any]:
    """Dotted keys with values; a dotted name that is no option goes on to the recipe's check, which reports it with the rest."""
    overrides = {
        key.removeprefix(OVERRIDE): _value(key.removeprefix(OVERRIDE), text)
        for key, text in vars(given).items()
        if key.startswith(OVERRIDE) and text is not None
    }
    words = list(rest)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        if not re.match(r"--\w+\.\w", name):
            no_more([word], list(FLAGS))
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "null"
        overrides[name[2:]] = _value(name[2:], text)
    return overrides


def _value(key: str, text: str) -> Any:
    """A value as YAML would read it, except that a name stays a name: run 7 is a folder, not a number."""
    section, _, name = key.partition(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"command line: {key} is {text!r}; expected a YAML value") from None
    hints = get_type_hints(SECTIONS[section]) if section in SECTIONS else {}
    named = str in _kinds(hints.get(name))
    return text if named and value is not None and not isinstance(value, list) else value


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
    default = one.default if one.default is not MISSING else one.default_factory()
    shown = one.metadata["shown"] or (default if isinstance(default, str) else json.dumps(default))
    return f"{one.metadata['help']} (default: {shown})".replace("%", "%%")
