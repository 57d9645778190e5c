"""Recipes by name: those that come with the package, or any YAML file by its path."""

import difflib
import os
from pathlib import Path

from prefopt.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"
SUFFIXES = (".yaml", ".yml")


def recipe_names() -> list[str]:
    """The recipes that come with the package.

    Example:
        >>> "s0-qwen3-kto" in recipe_names()
        True
    """
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe, given by its path or, if it comes with the package, by its bare name.

    Raises:
        UserError: a bare name that none has, with the nearest one that is there.

    Example:
        >>> find_recipe("mine.yaml").name, find_recipe("kto-lora").name
        ('mine.yaml', 'kto-lora.yaml')
    """
    text = str(name)
    path = Path(text)
    if path.suffix.lower() in SUFFIXES or os.sep in text or path.is_file():
        return path
    known = recipe_names()
    if text in known:
        return RECIPES / f"{text}.yaml"
    longer = [one for one in known if one.startswith(text)]
    near = longer or difflib.get_close_matches(text, known, n=1, cutoff=0.4)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(
        f"there is no recipe {text}{hint}; expected a .yaml file, or a name that `prefopt train --list` shows"
    )


def recipe_list() -> str:
    """Every recipe's name and the first sentence of the comment at its head, one a line."""
    found = []
    for name in recipe_names():
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        words = []
        for line in text.splitlines():
            if not line.startswith("#"):
                break
            words += line.lstrip("# ").split()
        sentence = " ".join(words).partition(". ")[0].rstrip(".")
        found.append((name, sentence))
    width = max(len(name) for name, _ in found)
    return "\n".join(f"{name:<{width}}  {sentence}" for name, sentence in found)
