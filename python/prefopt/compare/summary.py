"""The lines of the tables: medians, lowest and highest values of the runs."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from prefopt.compare.plan import FEWEST_TIMED
from prefopt.report.score import BASE, CHANGE, RUN
from prefopt.train.methods import ANSWERS, METHODS

TOO_FEW = f"fewer than {FEWEST_TIMED} steps"
NO_RUN = "no run ended"
MARGIN, LIKELIHOOD = ("rewards", "margin"), ("likelihood", "desirable, per token")
ACCURACIES = (("rewards", "accuracy, pairs"), ("rewards", "accuracy, all"))


class Spread(NamedTuple):
    """Median, lowest and highest value of the runs."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measure:
    """A column: its key in compare.csv, its head in a table, the format of a value, and whether it is a figure of time.

    ``better`` is "more", "less" or empty; ``from_zero`` is whether a bar may begin at 0.
    """

    key: str
    head: str
    write: Callable[[float], str]
    timed: bool = False
    better: str = ""
    from_zero: bool = True


def _plain(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def _significant(value: float) -> str:
    """Three significant digits, or all of those before the point."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:,.{max(0, digits)}f}"


COST = (
    Measure("tokens_per_step", "tokens in a step", _significant),
    Measure("step_ms", "time per step, ms", _significant, timed=True, better="less"),
    Measure("tokens_per_second", "tokens per second", _significant, timed=True, better="more"),
    Measure("sequences_per_second", "sequences per second", _significant, timed=True, better="more"),
    Measure("efficiency", "efficiency", _plain(2), timed=True, better="more"),
    Measure("train_s", "training time, s", _significant, timed=True, better="less"),
    Measure("peak_mib", "peak memory, MiB", _plain(0), better="less"),
)
LEARNING = (
    Measure("margin", "margin", _plain(3), better="more"),
    Measure("accuracy", "accuracy", _plain(3), better="more"),
    Measure("likelihood", "log-likelihood, nats per token", _plain(3), better="more", from_zero=False),
    Measure("first_loss", "first loss", _plain(4)),
    Measure("last_loss", "last loss", _plain(4)),
)
MEASURES = COST + LEARNING
TABLES = {  # compare.csv has all of them
    "Cost": [one for one in COST if one.key != "sequences_per_second"],
    "Learning": list(LEARNING),
}
SECOND = {"Cost": "sequences in a step", "Learning": "learned"}  # the column after the method


@dataclass(frozen=True)
class Line:
    """A method, or the base model, in the tables.

    ``values`` has a ``Spread`` for each measure, or ``absent`` the reason why there is none. ``learned``
    counts the runs whose held-out margin (for sft: the change of the likelihood) has an interval above 0.
    """

    method: str
    title: str
    runs: int
    values: dict[str, Spread]
    absent: dict[str, str]
    learned: int = 0
    sequences_per_step: int | None = None
    stopped: tuple[str, ...] = ()

    def cell(self, measure: Measure) -> str:
        """The median and, if runs differ, the lowest and the highest in brackets."""
        if measure.key not in self.values:
            return self.absent.get(measure.key, "")
        median, low, high = map(measure.write, self.values[measure.key])
        return median if low == high else f"{median} ({low} to {high})"

    def second(self, table: str) -> str:
        """The cell under ``SECOND[table]``."""
        if table == "Cost":
            return str(self.sequences_per_step)
        if self.method == BASE:
            return ""
        return f"{self.learned} of {self.runs} runs" if self.runs else NO_RUN


def efficiencies(runs: Sequence[dict[str, Any]], yardstick: str) -> dict[tuple[str, int], float]:
    r"""Each run's tokens per second divided by those of the yardstick's run in the same round.

    .. math:: e_{m,s} = \frac{n_{m,s} / t_{m,s}}{n_{y,s} / t_{y,s}}

    with n the tokens trained on in the timed steps, t their seconds, s the seed of the round and y the yardstick: a
    busy phase of the machine affects both. Rounds without a figure of the yardstick are left out.

    Returns:
        {(method, seed): efficiency}, without unit.

    Example:
        >>> times = {"kto": [2000.0], "dpo": [1000.0]}
        >>> runs = [{"method": name, "seed": 1, "step_ms": ms, "tokens": 100} for name, ms in times.items()]
        >>> efficiencies(runs, "kto")
        {('kto', 1): 1.0, ('dpo', 1): 2.0}
    """
    rates = {(run["method"], run["seed"]): _rate(run, "tokens") for run in runs if run.get("step_ms")}
    return {
        (method, seed): rate / rates[yardstick, seed]
        for (method, seed), rate in rates.items()
        if (yardstick, seed) in rates
    }


def yardstick_of(methods: Sequence[str]) -> str:
    """The method whose efficiency is 1: kto, or else the first."""
    return "kto" if "kto" in methods else methods[0]


def whole_rounds(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of the seeds with a run of every method; an interrupted round is left out.

    Example:
        >>> runs = [{"method": m, "seed": s} for m, s in (("kto", 1), ("dpo", 1), ("kto", 2))]
        >>> [run["seed"] for run in whole_rounds({"methods": {"kto": {}, "dpo": {}}, "runs": runs})]
        [1, 1]
    """
    have = Counter(run["seed"] for run in content["runs"])
    return [run for run in content["runs"] if have[run["seed"]] == len(content["methods"])]


def lines_of(content: dict[str, Any]) -> list[Line]:
    """The base model's line, if a run evaluated it, then one for each method.

    Args:
        content: of compare.json.
    """
    methods = list(content["methods"])
    relative = efficiencies(content["runs"], yardstick_of(methods))
    lines = []
    for method in methods:
        own = [run for run in content["runs"] if run["method"] == method]
        ended = [run for run in own if "stopped" not in run]
        found: dict[str, list[float]] = {}
        for run in ended:
            for key, value in _values(run, relative, content["timed_steps"]).items():
                found.setdefault(key, []).append(value)
        absent = {one.key: NO_RUN for one in MEASURES} if not ended else {}
        if content["timed_steps"] < FEWEST_TIMED:
            absent |= {one.key: TOO_FEW for one in MEASURES if one.timed}
        lines.append(
            Line(
                method,
                METHODS[method].title,
                len(ended),
                {key: Spread(statistics.median(some), min(some), max(some)) for key, some in found.items()},
                absent,
                sum(_learned(run) for run in ended),
                content["methods"][method]["sequences_per_step"],
                tuple(f"seed {run['seed']}: {run['stopped']}" for run in own if "stopped" in run),
            )
        )
    return _base(content) + lines


def _values(run: dict[str, Any], relative: dict[tuple[str, int], float], timed: int) -> dict[str, float]:
    """The measures of a run."""
    found = {
        "tokens_per_step": run["tokens_in_all"] / run["steps"],
        "peak_mib": run["peak_bytes"] / 2**20,
        "first_loss": run["losses"][0],
        "last_loss": run["losses"][1],
    }
    if timed >= FEWEST_TIMED:
        found |= {
            "step_ms": statistics.median(run["step_ms"]),
            "tokens_per_second": _rate(run, "tokens"),
            "sequences_per_second": _rate(run, "sequences"),
            "train_s": run["train_s"],
        }
        key = run["method"], run["seed"]
        if key in relative:
            found["efficiency"] = relative[key]
    scores = {"margin": _score(run, *MARGIN, RUN), "accuracy": accuracy_of(run)}
    scores["likelihood"] = _score(run, *LIKELIHOOD, RUN)
    return found | {key: score["value"] for key, score in scores.items() if score is not None}


def accuracy_of(run: dict[str, Any]) -> dict[str, Any] | None:
    """The score of pairs or, if the held-out rows are unpaired, of all answers."""
    found = (_score(run, *one, RUN) for one in ACCURACIES)
    return next((score for score in found if score is not None), None)


def _rate(run: dict[str, Any], what: str) -> float:
    """Tokens or sequences per second, over all timed steps."""
    return run[what] / (sum(run["step_ms"]) / 1000)


def _score(run: dict[str, Any], task: str, metric: str, model: str) -> dict[str, Any] | None:
    scores = run["scores"]
    return next((one for one in scores if (one["task"], one["metric"], one["model"]) == (task, metric, model)), None)


def _learned(run: dict[str, Any]) -> bool:
    answers = METHODS[run["method"]].data == ANSWERS
    score = _score(run, *LIKELIHOOD, CHANGE) if answers else _score(run, *MARGIN, RUN)
    return score is not None and score["low"] is not None and score["low"] > 0


def _base(content: dict[str, Any]) -> list[Line]:
    """Rewards are relative to the base model, so its own margin is 0 and its accuracy 0.5, by definition."""
    run = next((one for one in content["runs"] if "scores" in one), None)
    if run is None:
        return []
    values = {"margin": Spread(0.0, 0.0, 0.0), "accuracy": Spread(0.5, 0.5, 0.5)}
    likelihood = _score(run, *LIKELIHOOD, BASE)
    if likelihood is not None:
        values["likelihood"] = Spread(*[likelihood["value"]] * 3)
    return [Line(BASE, "base model", 0, values, {})]
