"""The chart of a comparison: a panel for each measure, a bar for each method, the runs' range on it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prefopt.compare.summary import MEASURES, Line, Measure
from prefopt.report.figures import BASE_COLOUR, INK, OWN, Picture, figure, save
from prefopt.report.score import BASE

CHARTS = {
    "compare_cost": (
        "Cost of a step",
        ("step_ms", "tokens_per_second", "efficiency", "peak_mib"),
    ),
    "compare_learning": (
        "What was learned",
        ("margin", "accuracy", "likelihood"),
    ),
}


def draw(lines: Sequence[Line], folder: Path) -> list[Picture]:
    """Write the charts for which there are values, as PNG and SVG."""
    measures = {one.key: one for one in MEASURES}
    drawn = []
    for name, (title, keys) in CHARTS.items():
        shown = [measures[key] for key in keys if any(key in line.values for line in lines)]
        if shown:
            drawn.append(_chart(lines, shown, folder, name, title))
    return drawn


def _chart(
    lines: Sequence[Line], measures: Sequence[Measure], folder: Path, name: str, title: str
) -> Picture:
    methods = [line for line in lines if line.method != BASE]
    base = next((line for line in lines if line.method == BASE), None)
    height = 0.9 + 0.36 * len(methods)
    with figure(2.2 + 2.4 * len(measures), height, len(measures)) as (made, axes):
        for place, (panel, measure) in enumerate(zip(np.atleast_1d(axes), measures, strict=True)):
            for row, line in enumerate(methods):
                if measure.key not in line.values:
                    panel.text(
                        0, row, f" {line.absent.get(measure.key, '')}", va="center", fontsize=8
                    )
                    continue
                median, low, high = line.values[measure.key]
                panel.barh(row, median, 0.62, color=OWN)
                if line.runs > 1:
                    reach = [[median - low], [high - median]]
                    panel.errorbar(median, row, xerr=reach, color=INK, elinewidth=1, capsize=3)
            if base is not None and measure.key in base.values:
                panel.axvline(base.values[measure.key].median, color=BASE_COLOUR, ls="--", lw=1.2)
            names = [line.title for line in methods] if place == 0 else [""] * len(methods)
            panel.set_yticks(range(len(methods)), names)
            panel.invert_yaxis()
            panel.tick_params(axis="y", length=0)
            panel.set_title(measure.head, fontsize=10)
            panel.locator_params(axis="x", nbins=4)
            panel.grid(axis="x", color=INK, alpha=0.12, lw=0.6)
        explanation = "Bars are medians of the runs; the line on a bar goes from the lowest to the highest of them."
        if base is not None and any(one.key in base.values for one in measures):
            explanation += " The broken line is the base model before training."
        return Picture(name, title, explanation, save(made, folder, name, title))
