"""The grid: a configuration is one cell, and a plan is a set of cells with their numbers of seeds."""

from dataclasses import asdict, dataclass
from itertools import chain, combinations
from typing import Literal

COMPONENTS = ("value", "weighting", "odds", "shift")
FORMS = ("naive", "ours")
PRECISIONS = ("fp32", "bf16")
RATES = (0.005, 0.01, 0.02)
HIGHEST_RATE = 0.02  # comparable to 2e-4 for a language model with LoRA: KTO itself begins to fail

# Changes of the naive form, each one remedy; and all of them.
REMEDIES = (
    "staging",
    "component clip",
    "EMA window",
    "safe weighting",
    "safe odds",
    "bounded value",
    "bounded shift",
)
# Changes of our form: one part of the defaults removed or replaced.
VARIANTS = (
    "no staging",
    "no shift bound",
    "no component bounds",
    "running mean",
    "win weighting",
    "loss aversion 1.5",
)
WIDER = ("no shift bound", "loss aversion 1.5")  # the highest margin: run as often as the defaults
VARIED = (
    *((one,) for one in VARIANTS),
    ("win weighting", "loss aversion 1.5"),
    WIDER,
)
# Deliberate mistakes in the naive form.
MISTAKES = ("shift in nats", "shift not detached")


@dataclass(frozen=True)
class Config:
    """One cell of the grid: everything that determines a run except its seed."""

    form: Literal["naive", "ours"]
    components: tuple[str, ...]  # some of COMPONENTS, in that order; none is KTO
    precision: Literal["fp32", "bf16"]
    learning_rate: float
    changes: tuple[str, ...] = ()  # some of REMEDIES, VARIANTS or MISTAKES

    def fields(self) -> dict:
        """The columns of this configuration in a result row."""
        return asdict(self) | {
            "components": "+".join(self.components),
            "changes": "+".join(self.changes),
        }

    @staticmethod
    def of(row: dict) -> "Config":
        """The configuration of a result row; the inverse of :meth:`fields`."""
        return Config(
            row["form"],
            tuple(row["components"].split("+")) if row["components"] else (),
            row["precision"],
            row["learning_rate"],
            tuple(row["changes"].split("+")) if row["changes"] else (),
        )


@dataclass(frozen=True)
class Plan:
    """The length of a run, and the number of seeds of each cell."""

    steps: int
    pretraining_steps: int
    cells: dict[Config, int]
    traced: frozenset[Config]  # the cells whose traces are drawn

    def runs(self) -> int:
        return sum(self.cells.values())


def quick_plan(seeds: int | None = None) -> Plan:
    """Part of the grid at the highest learning rate, in shorter runs."""
    rate, seeds = HIGHEST_RATE, seeds or 6
    some = ((), ("value",), ("weighting",), ("shift",), ("value", "weighting", "shift"), COMPONENTS)
    cells = [
        Config(form, components, precision, rate)
        for form in FORMS
        for components in (some if form == "naive" else ((), COMPONENTS))
        for precision in PRECISIONS
    ]
    cells += _remedied(("bf16", ("value", "weighting", "shift")), (rate,))
    traced = frozenset(Config(form, COMPONENTS, "bf16", rate) for form in FORMS)
    return Plan(80, 600, dict.fromkeys(cells, seeds), traced)


def full_plan(seeds: int | None = None) -> Plan:
    """Our defaults, the remedies, then every subset of the components in both forms and precisions.

    The most important cells come first, for interrupted studies.
    """
    cells: dict[Config, int] = {}

    def add(some: list[Config], count: int) -> None:
        for config in some:
            cells[config] = max(cells.get(config, 0), seeds or count)

    for components in (COMPONENTS, ()):  # our defaults with the shift on, and KTO beside them
        add([Config("ours", components, "fp32", rate) for rate in (0.003, *RATES)], 52)
    add([Config("ours", COMPONENTS, "fp32", rate, WIDER) for rate in (0.003, *RATES)], 52)
    add(_remedied(("bf16", COMPONENTS), (0.01, 0.02)), 20)
    add(_remedied(("fp32", ("value", "weighting", "shift")), (0.02,)), 20)
    add([Config("ours", COMPONENTS, "fp32", rate, one) for one in VARIED for rate in RATES], 12)
    subsets = list(chain.from_iterable(combinations(COMPONENTS, n) for n in range(5)))
    grid = [
        Config(form, components, precision, rate)
        for rate in reversed(RATES)
        for form in FORMS
        for precision in PRECISIONS
        for components in subsets
    ]
    add(grid, 8)
    mistaken = ("value", "weighting", "shift")
    add([Config("naive", mistaken, "fp32", r, (one,)) for one in MISTAKES for r in RATES], 8)
    traced = frozenset(Config(form, COMPONENTS, "bf16", rate) for form in FORMS for rate in (0.01, 0.02))
    return Plan(200, 1500, cells, traced)


def remedies_of(components: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Each remedy that applies to these components, alone, and all of them together."""
    needs = {"safe weighting": "weighting", "safe odds": "odds", "bounded value": "value"}
    apt = [one for one in REMEDIES if needs.get(one, "shift") in components]
    apt = [one for one in apt if one != "component clip"] + ["component clip"]
    return [(one,) for one in sorted(apt, key=REMEDIES.index)] + [tuple(sorted(apt, key=REMEDIES.index))]


def _remedied(base: tuple[str, tuple[str, ...]], rates: tuple[float, ...]) -> list[Config]:
    precision, components = base
    return [
        Config("naive", components, precision, rate, changes)
        for rate in rates
        for changes in [(), *remedies_of(components)]
    ]


def label(components: tuple[str, ...]) -> str:
    """The components of a configuration in words."""
    return " + ".join(components) or "KTO"


def remedy_label(changes: tuple[str, ...]) -> str:
    """A remedy, or all of them, in words."""
    return "as it is" if not changes else changes[0] if len(changes) == 1 else "all together"
