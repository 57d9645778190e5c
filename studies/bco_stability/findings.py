"""The answers, in words computed from the rows: what causes instability, what cures it, and at what price."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from prefopt.report.statistics import paired_difference
from studies.bco_stability.grid import COMPONENTS, MISTAKES, REMEDIES, Config, remedies_of
from studies.bco_stability.price import ENOUGH, against, defaults, price
from studies.bco_stability.table import Cell, Rows, Share, cell_of, paired, plain, share_of


@dataclass(frozen=True)
class Effect:
    """What one component does to the share of unstable runs: pairs of runs that differ in it alone."""

    component: str
    without: Share
    with_it: Share
    difference: tuple[float, float, float]  # with - without, and its 95 % interval

    @property
    def word(self) -> str:
        _, low, high = self.difference
        return "raises it" if low > 0 else "lowers it" if high < 0 else "no clear effect"


@dataclass(frozen=True)
class Findings:
    """A verdict, its tone, and the sentences of each section."""

    tone: Literal["good", "bad", "unclear"]
    verdict: str
    cause: list[str]
    cure: list[str]
    price: list[str]


def find(rows: Rows) -> Findings:
    """All answers that the rows give."""
    tone, verdict = _verdict(rows)
    return Findings(tone, verdict, _cause(rows), _cure(rows), price(rows))


def effects(rows: Rows) -> list[Effect]:
    """The effect of each component on the naive form, the largest first; only pairs of runs that both exist."""
    naive = plain(rows, "naive")
    found = []
    for component in COMPONENTS:
        pairs = _pairs(naive, component)
        if not pairs:
            continue
        before, after = ([unstable for unstable in side] for side in zip(*pairs, strict=True))
        found.append(
            Effect(
                component,
                Share(sum(before), len(before)),
                Share(sum(after), len(after)),
                paired_difference(before, after),
            )
        )
    return sorted(found, key=lambda effect: -effect.difference[0])


def remedy_cells(rows: Rows) -> dict[tuple[str, str], dict[tuple[str, ...], Cell]]:
    """(precision, components) -> remedy -> its cell, over the learning rates at which remedies were run."""
    bases = {
        (row["precision"], row["components"])
        for row in rows
        if row["form"] == "naive" and row["changes"].split("+")[0] in REMEDIES
    }
    found = {}
    for precision, components in sorted(bases):
        some = [
            row
            for row in rows
            if (row["form"], row["precision"], row["components"]) == ("naive", precision, components)
        ]
        keys = {(row["learning_rate"], row["seed"]) for row in some if row["changes"]}
        some = [row for row in some if (row["learning_rate"], row["seed"]) in keys]
        found[precision, components] = {
            changes: cell_of(row for row in some if row["changes"] == "+".join(changes))
            for changes in [(), *remedies_of(tuple(components.split("+")))]
            if any(row["changes"] == "+".join(changes) for row in some)
        }
    return found


def _pairs(rows: Rows, component: str) -> list[tuple[bool, bool]]:
    """(unstable without, unstable with) of runs that share everything else."""
    unstable = {(Config.of(row), row["seed"]): row["outcome"] != "stable" for row in rows}
    pairs = []
    for (config, seed), after in unstable.items():
        if component not in config.components:
            continue
        rest = tuple(one for one in config.components if one != component)
        twin = Config(config.form, rest, config.precision, config.learning_rate, config.changes)
        if (twin, seed) in unstable:
            pairs.append((unstable[twin, seed], after))
    return pairs


def _verdict(rows: Rows) -> tuple[Literal["good", "bad", "unclear"], str]:
    ours, kto = defaults(rows)
    if not ours:
        return "unclear", "The defaults were not run."
    share = share_of(ours)
    margin, accuracy = (paired(ours, kto, key) for key in ("margin", "accuracy"))
    text = (
        f"With our defaults and the shift on, {share.words()} runs were unstable; of plain KTO, {share_of(kto).words()}. "
        f"{against(margin, 'margin')} {against(accuracy, 'accuracy')}"
    )
    if margin is None or accuracy is None:
        return "unclear", text
    below = [difference[2] < 0 for difference in (margin, accuracy)]
    if share.unstable or all(below):
        return "bad", text
    return "unclear" if any(below) or share.n < ENOUGH else "good", text


def _cause(rows: Rows) -> list[str]:
    naive = plain(rows, "naive")
    if not naive:
        return []
    sentences = [
        f"The naive form was unstable in {share_of(naive).words()} runs of the grid: "
        f"{share_of(naive, _is(precision='fp32')).words()} with the loss in fp32, "
        f"{share_of(naive, _is(precision='bf16')).words()} in bf16. {_kinds(naive)}"
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
    shift = next((effect for effect in found if effect.component == "shift"), None)
    if shift is not None:
        role = {
            "raises it": "The shift adds to it",
            "lowers it": "The shift is not the cause, it lowers the share",
            "no clear effect": "The shift by itself has no clear effect",
        }[shift.word]
        sentences.append(f"{role}: {shift.with_it.words()} with it, {shift.without.words()} without.")
    sentences += [_near_forty(rows), *_mistakes(rows)]
    return [sentence for sentence in sentences if sentence]


def _kinds(rows: Rows) -> str:
    cell = cell_of(rows)
    kinds = ", ".join(f"{count} {name}" for name, count in cell.outcomes.items() if count)
    return f"Of the unstable ones: {kinds}." if kinds else ""


def _near_forty(rows: Rows) -> str:
    """Of the cells with value, weighting and shift, the one whose share is nearest to the 40 % once reported."""
    reported = {"value", "weighting", "shift"}
    cells = {
        (row["components"], row["precision"], row["learning_rate"])
        for row in plain(rows, "naive")
        if reported <= set(row["components"].split("+"))
    }
    if not cells:
        return ""

    def share(components: str, precision: str, rate: float) -> Share:
        where = {"components": components, "precision": precision, "learning_rate": rate}
        return share_of(plain(rows, "naive", **where))

    components, precision, rate = min(sorted(cells), key=lambda cell: abs(share(*cell).share - 0.4))
    without = share(components.replace("+shift", ""), precision, rate)
    rest = f"; the same without the shift, {without.words()}" if without.n else ""
    return (
        f"About 40 % was once reported for value, weighting and shift. Nearest to it comes {components.replace('+', ' + ')} in "
        f"{precision} at a learning rate of {rate:g}: {share(components, precision, rate).words()}{rest}."
    )


def _mistakes(rows: Rows) -> list[str]:
    sentences = []
    for mistake in MISTAKES:
        some = [row for row in rows if row["changes"] == mistake]
        if some:
            right = plain(rows, "naive", components=some[0]["components"], precision="fp32")
            sentences.append(
                f"A {mistake}: {share_of(some).words()} runs unstable, where the right one has {share_of(right).words()}."
            )
    return sentences


def _cure(rows: Rows) -> list[str]:
    sentences = []
    for (precision, components), cells in remedy_cells(rows).items():
        base = cells.pop((), None)
        if base is None or not base.unstable.n:
            continue
        zero = [one for one, cell in cells.items() if not cell.unstable.unstable]
        rest = [one for one in cells if one not in zero]
        name = components.replace("+", " + ")
        sentence = f"Naive form with {name} in {precision}: {base.unstable.words()} unstable as it is."
        if base.unstable.unstable:
            sentence += _listed("Reaches zero", zero, cells) + _listed("Does not", rest, cells)
        sentences.append(sentence)
    ours = plain(rows, "ours", precision="fp32") + plain(rows, "ours", precision="bf16")
    enhanced = [row for row in ours if row["components"]]
    if enhanced:
        sentences.append(
            f"Our form, whatever components are on, in fp32 and bf16: {share_of(enhanced).words()} unstable. "
            + " ".join(
                f"With the {one}, {share_of(enhanced, _has(one)).words()}; without it, "
                f"{share_of(enhanced, lambda row, one=one: not _has(one)(row)).words()}."
                for one in COMPONENTS
            )
        )
    return sentences


def _has(component: str) -> Callable[[dict], bool]:
    return lambda row: component in row["components"].split("+")


def _listed(verb: str, remedies: list[tuple[str, ...]], cells: dict) -> str:
    if not remedies:
        return ""
    words = [f"{one[0] if len(one) == 1 else 'all together'} {cells[one].unstable.words()}" for one in remedies]
    return f" {verb}: {'; '.join(words)}."


def _is(**columns: object) -> Callable[[dict], bool]:
    return lambda row: all(row[name] == value for name, value in columns.items())
