"""Recipes: a training run in a YAML file."""

from pathlib import Path

from prefopt.options import Data, Lora, Loss, Model, Training
from prefopt.recipe.load import load_recipe, make_recipe
from prefopt.recipe.schema import Recipe

__all__ = [
    "Data",
    "Lora",
    "Loss",
    "Model",
    "Recipe",
    "Training",
    "load_recipe",
    "make_recipe",
    "run_recipe",
]


def run_recipe(recipe: Recipe, *, resume: bool = False) -> Path:
    """Train, evaluate, save and report; see ``prefopt.recipe.run.run``."""
    from prefopt.recipe.run import (
        run,  # the training stack takes seconds to import, reading a recipe does not
    )

    return run(recipe, resume=resume)
