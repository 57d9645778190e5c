"""Evaluate a run against its base model: benchmarks, held-out preferences, classification."""

from pathlib import Path

from prefopt.evaluate.request import SUITES, EvalRequest

__all__ = ["SUITES", "EvalRequest", "evaluate_run"]


def evaluate_run(request: EvalRequest) -> Path:
    """Evaluate and write the results; see ``prefopt.evaluate.run.run``."""
    from prefopt.evaluate.run import run  # slow to import: an invalid request is refused before

    return run(request)
