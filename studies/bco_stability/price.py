"""What stability costs: our defaults and their variants beside KTO, on the same rows and seeds."""

import math
from dataclasses import dataclass

from studies.bco_stability.grid import COMPONENTS
from studies.bco_stability.table import Cell, Rows, cell_of, paired, plain, share_of

ENOUGH = 200  # runs of the defaults, or of a variant, before it gets a verdict


def defaults(rows: Rows) -> tuple[Rows, Rows]:
    """Runs of our defaults with the shift on, and of KTO, at the same learning rates and seeds."""
    ours = plain(rows, "ours", components="+".join(COMPONENTS), precision="fp32")
    kto = plain(rows, "ours", components="", precision="fp32")
    both = set.intersection(*({(row["learning_rate"], row["seed"]) for row in side} for side in (ours, kto)))
    return tuple([row for row in side if (row["learning_rate"], row["seed"]) in both] for side in (ours, kto))


def against(difference: tuple[float, float, float] | None, what: str) -> str:
    if difference is None:
        return f"Too few runs to compare the {what}."
    _, low, high = difference
    word = "above" if low > 0 else "below" if high < 0 else "not clearly different from"
    return f"The {what} on held-out pairs is {word} KTO's: {_signed(difference)}."


def price(rows: Rows) -> list[str]:
    ours, kto = defaults(rows)
    sentences = []
    for rate in sorted({row["learning_rate"] for row in ours}):
        mine, theirs = ([r for r in side if r["learning_rate"] == rate] for side in (ours, kto))
        a, b = cell_of(mine), cell_of(theirs)
        sentences.append(
            f"Learning rate {rate:g}: accuracy {a.accuracy:.3f} and margin {a.margin:.2f} (medians), KTO's {b.accuracy:.3f} "
            f"and {b.margin:.2f}; unstable {a.unstable.unstable} of {a.unstable.n}, KTO's {b.unstable.unstable} of {b.unstable.n}."
        )
    if ours:
        sentences.append(against(paired(ours, kto, "margin"), "margin"))
        sentences.append(against(paired(ours, kto, "accuracy"), "accuracy"))
    return sentences + _best(rows) + _often_run(rows)


@dataclass(frozen=True)
class Variant:
    """Our form with all components and some parts changed, at the learning rates and seeds that all variants share."""

    changes: tuple[str, ...]
    cell: Cell
    margin: tuple[float, float, float]  # less KTO's, paired, with its 95 % interval
    accuracy: tuple[float, float, float]


def variants(rows: Rows) -> list[Variant]:
    """The defaults first, then each variant, the highest margin first."""
    every = "+".join(COMPONENTS)
    some = [row for row in rows if (row["form"], row["precision"], row["components"]) == ("ours", "fp32", every)]
    kto = plain(rows, "ours", components="", precision="fp32")
    groups: dict[str, Rows] = {}
    for row in some:
        groups.setdefault(row["changes"], []).append(row)
    if len(groups) < 2 or not kto:
        return []
    runs = ({(row["learning_rate"], row["seed"]) for row in one} for one in (*groups.values(), kto))
    shared = set.intersection(*runs)
    if len(shared) < 2:
        return []
    found = []
    for changes, one in groups.items():
        one = [row for row in one if (row["learning_rate"], row["seed"]) in shared]
        names = tuple(changes.split("+")) if changes else ()
        differences = (paired(one, kto, key) for key in ("margin", "accuracy"))
        found.append(Variant(names, cell_of(one), *differences))
    return sorted(found, key=lambda variant: (variant.changes != (), -variant.margin[0]))


def _best(rows: Rows) -> list[str]:
    stable = [variant for variant in variants(rows) if not variant.cell.unstable.unstable]
    if not stable:
        return []
    best = max(stable, key=lambda variant: variant.margin[0])
    name = f"with {' and '.join(best.changes)}" if best.changes else "as it is"
    return [
        f"Of the variants of our form without an unstable run ({best.cell.unstable.n} runs each), the one {name} has the "
        f"highest margin: {_signed(best.margin)} against KTO's, and an accuracy of {_signed(best.accuracy)}."
    ]


def _often_run(rows: Rows) -> list[str]:
    """What the variants with enough runs came to, on the runs that KTO has too."""
    kto = plain(rows, "ours", components="", precision="fp32")
    also = {(row["learning_rate"], row["seed"]) for row in kto}
    groups: dict[str, Rows] = {}
    for row in rows:
        every = (row["form"], row["components"]) == ("ours", "+".join(COMPONENTS))
        if every and row["changes"] and (row["learning_rate"], row["seed"]) in also:
            groups.setdefault(row["changes"], []).append(row)
    return [
        f"In {len(some)} runs, our form with {changes.replace('+', ' and ')} was unstable in {share_of(some).words()}. "
        f"{against(paired(some, kto, 'margin'), 'margin')} {against(paired(some, kto, 'accuracy'), 'accuracy')}"
        for changes, some in groups.items()
        if len(some) >= ENOUGH
    ]


def _signed(difference: tuple[float, float, float]) -> str:
    mean, low, high = difference
    if math.isinf(low):
        return f"{mean:+.3f} (in every pair of runs, so without an interval)"
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
