"""From rows to shares of unstable runs with their intervals, and medians."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from prefopt.report.markdown import csv_text
from prefopt.report.statistics import mean_interval, wilson
from studies.bco_stability.grid import Config

UNSTABLE = ("not finite", "spike", "collapse")
Rows = list[dict]


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
    """What the runs of some configurations came to."""

    unstable: Share
    outcomes: dict[str, int]
    accuracy: float | None  # medians over all runs; one that failed counts with what it had learned
    margin: float | None


def share_of(rows: Iterable[dict], keep: Callable[[dict], bool] = lambda row: True) -> Share:
    """The share of unstable runs among the rows that ``keep`` keeps."""
    kept = [row["outcome"] != "stable" for row in rows if keep(row)]
    return Share(sum(kept), len(kept))


def cell_of(rows: Iterable[dict]) -> Cell:
    """Share, outcomes and medians of some rows."""
    rows = list(rows)
    outcomes = {name: sum(row["outcome"] == name for row in rows) for name in UNSTABLE}
    return Cell(
        share_of(rows),
        outcomes,
        median(row["accuracy"] for row in rows) if rows else None,
        median(row["margin"] for row in rows) if rows else None,
    )


def plain(rows: Rows, form: str, **columns: object) -> Rows:
    """The rows of a form as it is, with the given columns."""
    return [
        row
        for row in rows
        if row["form"] == form and not row["changes"] and all(row[name] == value for name, value in columns.items())
    ]


def by_config(rows: Iterable[dict]) -> dict[Config, list[dict]]:
    """The rows of each configuration."""
    cells: dict[Config, list[dict]] = {}
    for row in rows:
        cells.setdefault(Config.of(row), []).append(row)
    return cells


def paired(ours: Iterable[dict], others: Iterable[dict], key: str) -> tuple[float, float, float] | None:
    """Mean difference ours - others over the seeds and learning rates that both have, with its 95 % interval.

    Returns:
        mean, lower and upper end, infinite where all differences are equal; None with fewer than two pairs.
    """
    other = {(row["seed"], row["learning_rate"]): row[key] for row in others}
    pairs = [(row["seed"], row["learning_rate"]) for row in ours]
    values = [row[key] - other[p] for row, p in zip(ours, pairs, strict=True) if p in other]
    return mean_interval(values) if len(values) > 1 else None


def as_csv(rows: Iterable[dict]) -> str:
    """A line for each configuration: its columns, runs, outcomes, share with interval, medians."""
    head = (
        "form components precision learning_rate changes runs unstable not_finite spike collapse share low high "
        "median_accuracy median_margin".split()
    )
    lines = []
    order = sorted(by_config(rows).items(), key=lambda item: str(item[0].fields()))
    for config, some in order:
        cell = cell_of(some)
        low, high = cell.unstable.interval
        lines.append(
            [
                *config.fields().values(),
                cell.unstable.n,
                cell.unstable.unstable,
                *cell.outcomes.values(),
                *(f"{value:.4f}" for value in (cell.unstable.share, low, high)),
                f"{cell.accuracy:.4f}",
                f"{cell.margin:.4f}",
            ]
        )
    return csv_text(head, lines)


def _percent(share: float) -> str:
    """One place below 10 %, more where that would be 0, so that 0 of many does not become 0 to 0.

    >>> _percent(0.0158), _percent(0.53), _percent(0.0), _percent(0.00038)
    ('1.6', '53', '0', '0.04')
    """
    if 0 < share < 0.0005:
        return f"{100 * share:.1g}"
    return f"{100 * share:.1f}" if 0.0005 <= share < 0.0995 else f"{100 * share:.0f}"
