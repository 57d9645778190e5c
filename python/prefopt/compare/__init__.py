"""`prefopt compare`: methods side by side on the same model, prompts, tokens and steps.

Start here. ``plan`` makes each method's recipe of the one that was given, and ``rows`` each method's form of the same
rows. ``measure`` trains, times and judges one method once, ``apart`` gives it a process of its own, and ``run`` goes
through all runs and can go on where it stopped. ``summary`` makes medians of the runs and ``notes`` says how to read
them; ``report``, ``page`` and ``plots`` show both.
"""

from pathlib import Path

from prefopt.compare.request import CompareRequest
from prefopt.recipe.schema import Recipe

__all__ = ["CompareRequest", "compare"]


def compare(recipe: Recipe, request: CompareRequest) -> Path:
    """Run what is missing and report; see ``prefopt.compare.run.run``."""
    from prefopt.compare.run import (
        run,  # the training stack takes seconds to import, a wrong request should not
    )

    return run(recipe, request)
