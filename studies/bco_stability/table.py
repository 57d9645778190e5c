"""From rows to shares of unstable runs with their intervals, medians and paired differences."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from prefopt.report.markdown import csv_text
from prefopt.report.statistics import wilson
from studies.bco_stability.grid import Config
from studies.bco_stability.intervals import mean_interval

UNSTABLE = ("not finite", "spike", "collapse")
Rows = list[dict]
Difference = tuple[float, float, float]  # mean, lower and upper end of its 95 % interval


@dataclass(frozen=True)
class Share:
    """Unstable runs among n, with Wilson's 95 % interval."""

    unstable: int
    n: int

    @property
    def share(self) -> float:
        return self.unstable / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.unstable, self.n)

    def words(self) -> str:
        """
        >>> Share(3, 12).words()
        '3 of 12 (25 %, 8.9 to 53)'
        """
        low, high = self.interval
        return f"{self.unstable} of {self.n} ({100 * self.share:.0f} %, {_percent(low)} to {_percent(high)})"


@dataclass(frozen=True)
class Cell:
    """Share, outcomes and medians of the runs of a cell."""

    unstable: Share
    outcomes: dict[str, int]
    accuracy: float  # medians over all runs, failed ones included
    margin: float


def share_of(rows: Iterable[dict], keep: Callable[[dict], bool] = lambda row: True) -> Share:
    """The share of unstable runs among the rows that ``keep`` accepts."""
    kept = [row["outcome"] != "stable" for row in rows if keep(row)]
    return Share(sum(kept), len(kept))


def cell_of(rows: Rows) -> Cell:
    """Summarise one or more rows."""
    outcomes = {name: sum(row["outcome"] == name for row in rows) for name in UNSTABLE}
    accuracy, margin = (median(row[key] for row in rows) for key in ("accuracy", "margin"))
    return Cell(share_of(rows), outcomes, accuracy, margin)


def plain(rows: Rows, form: str, **columns: object) -> Rows:
    """The rows of an unchanged form with the given values of columns."""
    wanted = {"form": form, "changes": "", **columns}
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def by_config(rows: Iterable[dict]) -> dict[Config, Rows]:
    """The rows of each configuration."""
    cells: dict[Config, Rows] = {}
    for row in rows:
        cells.setdefault(Config.of(row), []).append(row)
    return cells


def run_of(row: dict) -> tuple[float, int]:
    """What paired runs of two configurations share: learning rate and seed."""
    return row["learning_rate"], row["seed"]


def in_all(*sides: Rows) -> list[Rows]:
    """Of each side, the runs that all sides have."""
    shared = set.intersection(*({run_of(row) for row in side} for side in sides))
    return [[row for row in side if run_of(row) in shared] for side in sides]


def paired(ours: Rows, others: Rows, key: str) -> Difference | None:
    """Mean difference ours - others over the runs that both have, with its 95 % interval.

    Returns:
        The interval is infinite if all differences are equal; None with fewer than two pairs.
    """
    other = {run_of(row): row[key] for row in others}
    values = [row[key] - other[run_of(row)] for row in ours if run_of(row) in other]
    return mean_interval(values) if len(values) > 1 else None


def as_csv(rows: Iterable[dict]) -> str:
    """A line for each configuration: its columns, runs, outcomes, share with interval, medians."""
    head = (
        "form components precision learning_rate changes runs unstable not_finite spike collapse share low high "
        "median_accuracy median_margin".split()
    )
    lines = []
    for config, some in sorted(by_config(rows).items(), key=lambda item: str(item[0].fields())):
        cell = cell_of(some)
        values = (cell.unstable.share, *cell.unstable.interval, cell.accuracy, cell.margin)
        counts = (cell.unstable.n, cell.unstable.unstable, *cell.outcomes.values())
        lines.append([*config.fields().values(), *counts, *(f"{value:.4f}" for value in values)])
    return csv_text(head, lines)


def _percent(share: float) -> str:
    """One decimal below 10 %, more if it would show 0.

    >>> _percent(0.0158), _percent(0.53), _percent(0.0), _percent(0.00038)
    ('1.6', '53', '0', '0.04')
    """
    if 0 < share < 0.0005:
        return f"{100 * share:.1g}"
    return f"{100 * share:.1f}" if 0.0005 <= share < 0.0995 else f"{100 * share:.0f}"
