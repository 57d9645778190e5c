"""The answers, computed from the rows: what causes instability, what prevents it, and what that costs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from prefopt.report.statistics import paired_difference
from studies.bco_stability.grid import COMPONENTS, MISTAKES, REMEDIES, Config, label, remedies_of, remedy_label
from studies.bco_stability.table import Cell, Difference, Rows, Share, cell_of, in_all, paired, plain, run_of, share_of

ENOUGH = 200  # runs of the defaults, or of a variant, before it gets a verdict
EVERY = "+".join(COMPONENTS)


class Table(NamedTuple):
    """A table of texts."""

    caption: str
    head: list[str]
    body: list[list[str]]


class Section(NamedTuple):
    """A heading, sentences, and the tables that support them."""

    title: str
    sentences: list[str]
    tables: list[Table]


@dataclass(frozen=True)
class Effect:
    """The effect of one component on the share of unstable runs: pairs of runs that differ in it alone."""

    component: str
    without: Share
    with_it: Share
    difference: Difference  # with - without

    @property
    def word(self) -> str:
        _, low, high = self.difference
        return "raises it" if low > 0 else "lowers it" if high < 0 else "no clear effect"


@dataclass(frozen=True)
class Variant:
    """Our form with all components and some parts changed, in the runs that all variants share."""

    changes: tuple[str, ...]
    cell: Cell
    margin: Difference  # minus KTO's
    accuracy: Difference


def sections(rows: Rows) -> list[Section]:
    """The three answers."""
    return [
        Section("What causes it", cause(rows), _effects_table(rows)),
        Section("What cures it", cure(rows), _remedies_tables(rows)),
        Section("What it costs", price(rows), _variants_table(rows)),
    ]


# Numbers


def effects(rows: Rows) -> list[Effect]:
    """The effect of each component on the naive form, the largest first."""
    unstable = {(Config.of(row), row["seed"]): row["outcome"] != "stable" for row in plain(rows, "naive")}
    found = []
    for component in COMPONENTS:
        before, after = [], []
        for (config, seed), outcome in unstable.items():
            rest = tuple(one for one in config.components if one != component)
            twin = Config(config.form, rest, config.precision, config.learning_rate, config.changes)
            if component in config.components and (twin, seed) in unstable:
                before.append(unstable[twin, seed])
                after.append(outcome)
        if before:
            shares = (Share(sum(side), len(side)) for side in (before, after))
            found.append(Effect(component, *shares, paired_difference(before, after)))
    return sorted(found, key=lambda effect: -effect.difference[0])


def remedy_cells(rows: Rows) -> dict[tuple[str, str], dict[tuple[str, ...], Cell]]:
    """(precision, components) -> remedies -> cell, over the runs that were made with a remedy too."""
    naive = [row for row in rows if row["form"] == "naive"]
    remedied = [row for row in naive if row["changes"].split("+")[0] in REMEDIES]
    found = {}
    for base in sorted({(row["precision"], row["components"]) for row in remedied}):
        some = [row for row in naive if (row["precision"], row["components"]) == base]
        runs = {run_of(row) for row in some if row["changes"]}
        cells = {}
        for changes in [(), *remedies_of(tuple(base[1].split("+")))]:
            named = [row for row in some if row["changes"] == "+".join(changes) and run_of(row) in runs]
            if named:
                cells[changes] = cell_of(named)
        found[base] = cells
    return found


def defaults(rows: Rows) -> tuple[Rows, Rows]:
    """Runs of our defaults with the shift on, and of KTO, with the same learning rates and seeds."""
    ours, kto = (plain(rows, "ours", components=components, precision="fp32") for components in (EVERY, ""))
    ours, kto = in_all(ours, kto)
    return ours, kto


def variants(rows: Rows) -> list[Variant]:
    """The defaults first, then each variant, the highest margin first."""
    groups: dict[str, Rows] = {}
    for row in rows:
        if (row["form"], row["precision"], row["components"]) == ("ours", "fp32", EVERY):
            groups.setdefault(row["changes"], []).append(row)
    kto, *others = in_all(plain(rows, "ours", components="", precision="fp32"), *groups.values())
    if len(groups) < 2 or len(kto) < 2:
        return []
    found = []
    for changes, some in zip(groups, others, strict=True):
        margin, accuracy = (paired(some, kto, key) for key in ("margin", "accuracy"))
        assert margin is not None and accuracy is not None
        found.append(Variant(tuple(changes.split("+")) if changes else (), cell_of(some), margin, accuracy))
    return sorted(found, key=lambda variant: (variant.changes != (), -variant.margin[0]))


# Sentences


def verdict(rows: Rows) -> tuple[Literal["good", "bad", "unclear"], str]:
    """Tone and text of the overall answer."""
    ours, kto = defaults(rows)
    if not ours:
        return "unclear", "The defaults were not run."
    share = share_of(ours)
    margin, accuracy = (paired(ours, kto, key) for key in ("margin", "accuracy"))
    text = (
        f"With our defaults and the shift on, {share.words()} runs were unstable; of plain KTO, "
        f"{share_of(kto).words()}. {_against(margin, 'margin')} {_against(accuracy, 'accuracy')}"
    )
    if margin is None or accuracy is None:
        return "unclear", text
    below = [difference[2] < 0 for difference in (margin, accuracy)]
    if share.unstable or all(below):
        return "bad", text
    return "unclear" if any(below) or share.n < ENOUGH else "good", text


def cause(rows: Rows) -> list[str]:
    naive = plain(rows, "naive")
    if not naive:
        return []
    kinds = ", ".join(f"{count} {name}" for name, count in cell_of(naive).outcomes.items() if count)
    fp32, bf16 = (share_of(plain(rows, "naive", precision=precision)).words() for precision in ("fp32", "bf16"))
    sentences = [
        f"The naive form was unstable in {share_of(naive).words()} runs of the grid: {fp32} with the loss in fp32, "
        f"{bf16} in bf16." + (f" Of the unstable ones: {kinds}." if kinds else "")
    ]
    found = effects(rows)
    raising = [effect for effect in found if effect.word == "raises it"]
    if raising:
        worst = raising[0]
        sentences.append(
            f"The component that raises it most is the {worst.component}: {worst.with_it.words()} with it, "
            f"{worst.without.words()} without, all else equal."
        )
    else:
        sentences.append("No single component raises it clearly.")
    for effect in found:
        if effect.component == "shift":
            role = {
                "raises it": "The shift adds to it",
                "lowers it": "The shift is not the cause, it lowers the share",
                "no clear effect": "The shift by itself has no clear effect",
            }[effect.word]
            sentences.append(f"{role}: {effect.with_it.words()} with it, {effect.without.words()} without.")
    sentences += _near_forty(rows)
    for mistake in MISTAKES:
        some = [row for row in rows if row["changes"] == mistake]
        if some:
            right = plain(rows, "naive", components=some[0]["components"], precision="fp32")
            sentences.append(
                f"A {mistake}: {share_of(some).words()} runs unstable, where the right one has "
                f"{share_of(right).words()}."
            )
    return sentences


def _near_forty(rows: Rows) -> list[str]:
    """Of the cells with value, weighting and shift, the one whose share is nearest to the 40 % once reported."""
    cells = {
        (row["components"], row["precision"], row["learning_rate"])
        for row in plain(rows, "naive")
        if {"value", "weighting", "shift"} <= set(row["components"].split("+"))
    }
    if not cells:
        return []

    def share(components: str, precision: str, rate: float) -> Share:
        return share_of(plain(rows, "naive", components=components, precision=precision, learning_rate=rate))

    components, precision, rate = min(sorted(cells), key=lambda cell: abs(share(*cell).share - 0.4))
    without = share(components.replace("+shift", ""), precision, rate)
    rest = f"; the same without the shift, {without.words()}" if without.n else ""
    return [
        f"About 40 % was once reported for value, weighting and shift. Nearest to it comes "
        f"{components.replace('+', ' + ')} in {precision} at a learning rate of {rate:g}: "
        f"{share(components, precision, rate).words()}{rest}."
    ]


def cure(rows: Rows) -> list[str]:
    sentences = []
    for (precision, components), cells in remedy_cells(rows).items():
        base = cells.pop((), None)
        if base is None:
            continue
        name = components.replace("+", " + ")
        sentence = f"Naive form with {name} in {precision}: {base.unstable.words()} unstable as it is."
        for verb, reaches in (("Reaches zero", True), ("Does not", False)):
            named = [one for one, cell in cells.items() if (cell.unstable.unstable == 0) == reaches]
            if base.unstable.unstable and named:
                listed = "; ".join(f"{remedy_label(one)} {cells[one].unstable.words()}" for one in named)
                sentence += f" {verb}: {listed}."
        sentences.append(sentence)
    enhanced = [row for row in plain(rows, "ours") if row["components"]]
    if enhanced:
        each = " ".join(
            f"With the {one}, {share_of(enhanced, _has(one)).words()}; without it, "
            f"{share_of(enhanced, _has(one, False)).words()}."
            for one in COMPONENTS
        )
        sentences.append(
            f"Our form, whatever components are on, in fp32 and bf16: {share_of(enhanced).words()} unstable. {each}"
        )
    return sentences


def _has(component: str, wanted: bool = True) -> Callable[[dict], bool]:
    return lambda row: (component in row["components"].split("+")) == wanted


def price(rows: Rows) -> list[str]:
    ours, kto = defaults(rows)
    sentences = []
    for rate in sorted({row["learning_rate"] for row in ours}):
        a, b = (cell_of([row for row in side if row["learning_rate"] == rate]) for side in (ours, kto))
        sentences.append(
            f"Learning rate {rate:g}: accuracy {a.accuracy:.3f} and margin {a.margin:.2f} (medians), KTO's "
            f"{b.accuracy:.3f} and {b.margin:.2f}; unstable {a.unstable.unstable} of {a.unstable.n}, KTO's "
            f"{b.unstable.unstable} of {b.unstable.n}."
        )
    if ours:
        sentences += [_against(paired(ours, kto, key), key) for key in ("margin", "accuracy")]
    stable = [variant for variant in variants(rows) if not variant.cell.unstable.unstable]
    if stable:
        best = max(stable, key=lambda variant: variant.margin[0])
        name = f"with {' and '.join(best.changes)}" if best.changes else "as it is"
        sentences.append(
            f"Of the variants of our form without an unstable run ({best.cell.unstable.n} runs each), the one {name} "
            f"has the highest margin: {_signed(best.margin)} against KTO's, and an accuracy of "
            f"{_signed(best.accuracy)}."
        )
    return sentences + _often_run(rows)


def _often_run(rows: Rows) -> list[str]:
    """The result of each variant with enough runs, over the runs that KTO has too."""
    kto = plain(rows, "ours", components="", precision="fp32")
    groups: dict[str, Rows] = {}
    for row in rows:
        if (row["form"], row["components"]) == ("ours", EVERY) and row["changes"]:
            groups.setdefault(row["changes"], []).append(row)
    sentences = []
    for changes, some in groups.items():
        some, _ = in_all(some, kto)
        if len(some) >= ENOUGH:
            sentences.append(
                f"In {len(some)} runs, our form with {changes.replace('+', ' and ')} was unstable in "
                f"{share_of(some).words()}. {_against(paired(some, kto, 'margin'), 'margin')} "
                f"{_against(paired(some, kto, 'accuracy'), 'accuracy')}"
            )
    return sentences


def _against(difference: Difference | None, what: str) -> str:
    if difference is None:
        return f"Too few runs to compare the {what}."
    _, low, high = difference
    word = "above" if low > 0 else "below" if high < 0 else "not clearly different from"
    return f"The {what} on held-out pairs is {word} KTO's: {_signed(difference)}."


def _signed(difference: Difference) -> str:
    mean, low, high = difference
    if math.isinf(low):
        return f"{mean:+.3f} (in every pair of runs, so without an interval)"
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


# Tables


def numbers(cell: Cell) -> list[str]:
    """Unstable share, median accuracy and median margin as texts."""
    return [cell.unstable.words(), f"{cell.accuracy:.3f}", f"{cell.margin:.2f}"]


def _effects_table(rows: Rows) -> list[Table]:
    body = []
    for precision in ("fp32", "bf16"):
        for effect in effects([row for row in rows if row["precision"] == precision]):
            mean, low, high = (100 * value for value in effect.difference)
            digits = 0 if high - low >= 2 else 1  # so that a narrow interval does not round to width 0
            points = f"{mean:+.{digits}f} points ({low:+.{digits}f} to {high:+.{digits}f})"
            shares = [effect.without.words(), effect.with_it.words()]
            body.append([f"{effect.component}, {precision}", *shares, points, effect.word])
    head = ["component", "unstable without", "unstable with", "difference", "effect"]
    return _filled("Naive form, pairs of runs that differ in one component alone:", head, body)


def _remedies_tables(rows: Rows) -> list[Table]:
    tables = []
    for (precision, components), cells in remedy_cells(rows).items():
        caption = f"Naive form, {label(tuple(components.split('+')))}, {precision}:"
        body = [[remedy_label(changes), *numbers(cell)] for changes, cell in cells.items()]
        tables += _filled(caption, ["remedy", "unstable", "accuracy", "margin"], body)
    return tables


def _variants_table(rows: Rows) -> list[Table]:
    body = []
    for one in variants(rows):
        differences = (f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high in (one.margin, one.accuracy))
        body.append([" + ".join(one.changes) or "as it is", *numbers(one.cell), *differences])
    head = "change,unstable,accuracy,margin,margin less KTO's,accuracy less KTO's".split(",")
    return _filled("Our form, all components, fp32, with some parts changed:", head, body)


def _filled(caption: str, head: list[str], body: list[list[str]]) -> list[Table]:
    return [Table(caption, head, body)] if body else []
