"""Research commands: experiments with an answer, run again by anyone."""

from pathlib import Path

__all__ = ["run_study"]


def run_study(out: str | Path, *, full: bool = False, processes: int = 1, seeds: int | None = None) -> Path:
    """Run ``bco-stability`` in the folder ``out`` and return its report; see ``prefopt.study.study.run_study``."""
    from prefopt.study.study import run_study as run  # imports torch, which help need not wait for

    return run(out, full=full, processes=processes, seeds=seeds)
