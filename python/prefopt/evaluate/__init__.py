"""Judge a finished run beside the model it started from: benchmarks, held-out preferences, classification."""

from pathlib import Path

from prefopt.evaluate.request import SUITES, EvalRequest

__all__ = ["SUITES", "EvalRequest", "evaluate_run"]


def evaluate_run(request: EvalRequest) -> Path:
    """Evaluate and write the results; see ``prefopt.evaluate.run.run``."""
    from prefopt.evaluate.run import (
        run,  # the model's stack takes seconds to import, a wrong request should not
    )

    return run(request)
