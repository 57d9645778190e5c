"""Charts of a comparison: a bar for each method with the range of its runs, and a line for the base model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from prefopt.compare.summary import MEASURES, Line, Measure
from prefopt.report.figures import BASE_COLOUR, INK, OWN, Picture, figure, save
from prefopt.report.score import BASE

# Several measures side by side, for a README; the page has one chart for each, for narrow screens.
WIDE = {
    "compare_cost": ("Cost of a step", ("step_ms", "tokens_per_second", "efficiency", "peak_mib")),
    "compare_learning": ("What was learned", ("margin", "accuracy", "likelihood")),
}
BETTER = {"more": "More is better. ", "less": "Less is better. ", "": ""}


def draw(lines: Sequence[Line], folder: Path) -> list[Picture]:
    """Write PNG and SVG files of every measure that has values.

    Returns:
        The pictures for the page, one for each measure.
    """
    measures = {one.key: one for one in MEASURES}
    drawn = []
    for name, (title, keys) in WIDE.items():
        shown = [measures[key] for key in keys if any(key in line.values for line in lines)]
        if shown:
            _draw(lines, shown, folder, name, title)
        drawn += [_draw(lines, [one], folder, f"compare_{one.key}", one.head) for one in shown]
    return drawn


def _draw(lines: Sequence[Line], measures: Sequence[Measure], folder: Path, name: str, title: str) -> Picture:
    count = sum(line.method != BASE for line in lines)
    with figure(1.8 + 2.6 * len(measures), 0.9 + 0.36 * count, len(measures)) as (made, axes):
        for place, (panel, measure) in enumerate(zip(np.atleast_1d(axes), measures, strict=True)):
            _panel(panel, lines, measure, named=place == 0)
        one = measures[0]
        explanation = (
            BETTER[one.better]
            + ("Bars are" if one.from_zero else "Points are")
            + " medians of the runs, lines go from the lowest to the highest."
        )
        if any(one.key in line.values for line in lines if line.method == BASE):
            explanation += " Dashed line: the base model."
        return Picture(name, title, explanation, save(made, folder, name, title))


def _panel(panel: Axes, lines: Sequence[Line], measure: Measure, *, named: bool) -> None:
    methods = [line for line in lines if line.method != BASE]
    for row, line in enumerate(methods):
        if measure.key not in line.values:  # its reason, in the middle of the panel
            why = line.absent.get(measure.key, "")
            panel.annotate(why, (0.5, row), xycoords=("axes fraction", "data"), ha="center", va="center")
            continue
        median, low, high = line.values[measure.key]
        if measure.from_zero:
            panel.barh(row, median, 0.62, color=OWN)
        else:
            panel.plot(median, row, "o", color=OWN, ms=7)
        if low < high:
            reach = [[median - low], [high - median]]
            panel.errorbar(median, row, xerr=reach, color=INK, elinewidth=1, capsize=3)
    for line in lines:
        if line.method == BASE and measure.key in line.values:
            panel.axvline(line.values[measure.key].median, color=BASE_COLOUR, ls="--", lw=1.4)
    panel.set_yticks(range(len(methods)), [line.title if named else "" for line in methods])
    panel.set_ylim(len(methods) - 0.5, -0.5)  # the first method on top
    panel.tick_params(axis="y", length=0)
    panel.locator_params(axis="x", nbins=4)
    panel.set_title(measure.head, fontsize=10)
    panel.set_axisbelow(True)
    panel.grid(axis="x", color=INK, alpha=0.12, lw=0.6)
