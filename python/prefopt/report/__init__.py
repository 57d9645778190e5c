"""The report of a run: one page that opens offline, plots, and a model card."""

from pathlib import Path

__all__ = ["write_report"]


def write_report(run_dir: str | Path) -> Path:
    """Write report.html, plots and model card into a run folder; see ``prefopt.report.write.write_report``."""
    from prefopt.report.write import write_report as write  # so that importing this costs nothing

    return write(run_dir)
