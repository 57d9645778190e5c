"""The main job on embedded text: a tiny model, a short fine-tune, KTO or another method, and a report; no network."""

from pathlib import Path

__all__ = ["run_demo"]


def run_demo(out: str | Path, seed: int = 0, method: str = "kto") -> Path:
    """Run the demo in the folder ``out`` and return the path of its report; see ``prefopt.demo.run.run_demo``."""
    from prefopt.demo.run import run_demo as run  # imports torch, which help need not wait for

    return run(out, seed, method)
