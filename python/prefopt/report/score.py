"""A score of a model with its uncertainty, and the results of an evaluation as eval.json keeps them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeGuard

BASE, RUN, CHANGE = "base", "run", "change"  # who a score is of; CHANGE is run - base, paired
NAMES = {BASE: "before training", RUN: "trained", CHANGE: "change"}  # for a reader


@dataclass(frozen=True)
class Score:
    """One number of one model.

    ``low`` and ``high`` end its 95 % interval. ``chance`` is the score without any knowledge: a guess, the base
    model's value if it is known beforehand (a margin of 0), or no change; None if there is no such line. ``n`` counts
    questions, rows, pairs or answers. ``n_shot`` and ``temperature``, that of sampled answers, say how it was measured.
    """

    task: str
    metric: str
    model: str
    value: float
    stderr: float | None
    low: float
    high: float
    n: int
    chance: float | None = None
    n_shot: int | None = None
    unit: str = "share"
    temperature: float | None = None

    @property
    def asked(self) -> str:
        """The task and its settings: "HellaSwag, 10-shot", "sampled answers, temperature 1"."""
        shots = "" if self.n_shot is None else f", {self.n_shot}-shot"
        heat = "" if self.temperature is None else f", temperature {self.temperature:g}"
        return f"{self.task}{shots}{heat}"

    @property
    def at_chance(self) -> bool:
        """Whether the interval holds the chance line, so that the score does not differ from it."""
        return self.chance is not None and self.low <= self.chance <= self.high

    def as_dict(self) -> dict:
        """For JSON and CSV."""
        return asdict(self) | {"at_chance": self.at_chance}


@dataclass(frozen=True)
class Line:
    """The scores of one metric of one task side by side; None where there is none."""

    task: str
    metric: str
    base: Score | None
    run: Score | None
    change: Score | None

    @property
    def any(self) -> Score:
        """One of them, for what they have in common."""
        return next(one for one in (self.run, self.base, self.change) if one is not None)

    @property
    def chance(self) -> float | None:
        """The chance line of the models; that of a change, 0, is its own."""
        return next((one.chance for one in (self.run, self.base) if one is not None), None)

    @property
    def verdict(self) -> str:
        """The run relative to chance, and whether there is a clear change."""
        found = [] if self.run is None else [relative_to_chance(self.run)]
        if self.change is not None and self.change.chance is not None:
            found.append("no clear change" if self.change.at_chance else "a clear change")
        return "; ".join(one for one in found if one)


@dataclass(frozen=True)
class Suite:
    """The results of one suite of `prefopt eval`, as eval.json has them.

    ``data`` has, for each task, the data of its questions: ``name``, and ``hub`` and ``split`` if known.
    """

    name: str
    scores: list[Score]
    how: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    data: dict[str, dict] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    made: str = ""  # when, UTC

    def lines(self) -> list[Line]:
        """The table: a line for each task and metric, in the order of the scores."""
        found: dict[tuple[str, str], dict[str, Score]] = {}
        for score in self.scores:
            found.setdefault((score.task, score.metric), {})[score.model] = score
        return [Line(*key, *map(of.get, (BASE, RUN, CHANGE))) for key, of in found.items()]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value from JSON is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def relative_to_chance(score: Score) -> str:
    """A score in relation to its chance line; empty if it has none.

    Example:
        >>> relative_to_chance(Score("t", "acc", RUN, 0.26, 0.02, 0.22, 0.3, 500, chance=0.25))
        'indistinguishable from chance'
    """
    if score.chance is None:
        return ""
    line = "chance" if score.chance else "0"
    if score.at_chance:
        return f"indistinguishable from {line}"
    return f"above {line}" if score.value > score.chance else f"below {line}"


def number(value: float) -> str:
    """Three places after the point, four significant digits above 1,000, two of what would round to 0.

    Example:
        >>> number(0.26449), number(-1234.567), number(0.00002), number(float("inf"))
        ('0.264', '-1,235', '2.0e-05', 'unknown')
    """
    if not math.isfinite(value):
        return "unknown"
    if 0 < abs(value) < 0.0005:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def interval(score: Score) -> str:
    """The 95 % interval: 0.722 to 1.000; "unknown" where its ends are."""
    if not (math.isfinite(score.low) and math.isfinite(score.high)):
        return "unknown"
    return f"{number(score.low)} to {number(score.high)}"


def with_error(score: Score | None, sign: bool = False) -> str:
    """A value and its standard error, or else its 95 % interval: 0.264 ± 0.018, 1.000 (0.722 to 1.000)."""
    if score is None:
        return ""
    plus = "+" if sign and score.value > 0 else ""
    known = interval(score)
    error = "" if known == "unknown" else f" ({known})"
    if score.stderr is not None:
        error = f" ± {number(score.stderr)}"
    return plus + number(score.value) + error


def suite_of(name: str, entry: Any) -> Suite | None:
    """A suite from eval.json; None if it is none. Ends of an interval that JSON could not hold are infinite."""
    listed = entry.get("scores") if isinstance(entry, dict) else None
    if not isinstance(listed, list):
        return None
    scores = [score for one in listed if (score := _score(one)) is not None]
    if len(scores) < len(listed):
        return None
    kinds = {"how": list, "warnings": list, "data": dict, "details": dict}
    kinds |= {"settings": dict, "made": str}
    rest = {key: entry[key] for key, kind in kinds.items() if isinstance(entry.get(key), kind)}
    return Suite(name, scores, **rest)


def _score(entry: Any) -> Score | None:
    if not isinstance(entry, Mapping):
        return None
    given: dict[str, Any] = {one.name: entry.get(one.name) for one in fields(Score)}
    for name, end in (("low", -math.inf), ("high", math.inf)):
        given[name] = end if given[name] is None else given[name]
    numbers = [given[name] for name in ("value", "low", "high", "n")]
    optional = ("stderr", "chance", "n_shot", "temperature")
    numbers += [given[name] for name in optional if given[name] is not None]
    texts = [given[name] for name in ("task", "metric", "model", "unit")]
    good = all(map(is_number, numbers)) and all(isinstance(one, str) for one in texts)
    return Score(**given) if good else None
