"""`prefopt compare`: methods side by side on the same model, prompts, tokens and steps.

Start here. ``plan`` derives each method's recipe, ``rows`` its form of the same rows. ``measure`` trains, times and
evaluates one run, ``subprocess_run`` gives it a process, and ``run`` goes through all runs, or those still missing.
``summary`` computes medians, ``notes`` explains them, and ``report`` and ``plots`` present both.
"""

from pathlib import Path

from prefopt.compare.request import CompareRequest
from prefopt.recipe.schema import Recipe

__all__ = ["CompareRequest", "compare"]


def compare(recipe: Recipe, request: CompareRequest) -> Path:
    """Carry out the missing runs and report; see ``prefopt.compare.run.run``."""
    from prefopt.compare.run import run  # takes seconds to import; a refused request should not

    return run(recipe, request)
