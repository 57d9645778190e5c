"""Pictures of an evaluation: bars beside the chance line, and confusion matrices. PNG and SVG."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.evaluate.scores import BASE, RUN, Score
from prefopt.report.plots import INK, OWN

BASE_COLOUR = "#9aa4af"
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 10,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw_bars(scores: Sequence[Score], folder: Path, name: str, title: str) -> list[str]:
    """Shares of base and run side by side, with 95 % intervals and chance lines where there are any; the files' names."""
    groups: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        if score.unit == "share" and score.model in (BASE, RUN):
            groups.setdefault((score.task, score.metric), {})[score.model] = score
    if not groups:
        return []
    with _figure((max(5.0, 1.5 * len(groups) + 1.5), 3.6)) as (figure, axes):
        width, named = 0.36, set()

        def once(name: str) -> str | None:
            """The legend's entry, the first time."""
            known = name in named
            named.add(name)
            return None if known else name

        for place, found in enumerate(groups.values()):
            for who, colour, shift in ((BASE, BASE_COLOUR, -width / 2), (RUN, OWN, width / 2)):
                if who not in found:
                    continue
                one, at = found[who], place + (shift if len(found) > 1 else 0)
                reach = [[one.value - one.low], [one.high - one.value]]
                axes.bar(
                    at,
                    one.value,
                    width,
                    color=colour,
                    yerr=np.nan_to_num(
                        np.maximum(reach, 0), posinf=0
                    ),  # unknown where there is one question
                    error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3},
                    label=once(who),
                )
            chance = next(iter(found.values())).chance
            if chance is None:
                continue
            axes.plot(
                [place - 0.46, place + 0.46],
                [chance, chance],
                color=INK,
                ls="--",
                lw=1,
                label=once("chance"),
            )
        labels = [f"{task}\n{metric}" for task, metric in groups]
        axes.set_xticks(range(len(groups)), labels, fontsize=9)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share")
        axes.set_title(f"{title}, with 95 % intervals")
        axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper right")
        return _save(figure, folder, name)


def draw_confusion(
    matrices: dict[str, Any], names: Sequence[str], folder: Path, name: str
) -> list[str]:
    """A matrix for each way of asking: rows are the right names, columns what was said, as shares of the row.

    Args:
        matrices: {way: (N, N + 1) counts}.
        names: N + 1 of them, the last for "no name".
    """
    with _figure((6.6 * len(matrices), 6.2), len(matrices)) as (figure, axes):
        for one, (way, counts) in zip(np.atleast_1d(axes), matrices.items(), strict=True):
            counts = np.asarray(counts)
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            one.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for row, column in zip(*np.nonzero(counts), strict=True):
                light = shares[row, column] > 0.55
                one.text(
                    column,
                    row,
                    str(counts[row, column]),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if light else INK,
                )
            one.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=9)
            one.set_yticks(range(len(names) - 1), names[:-1], fontsize=9)
            one.set_xlabel(f"said, by {way}")
            one.set_ylabel("right")
            one.spines[:].set_visible(False)
            hits = np.trace(counts[:, :-1]) / max(counts.sum(), 1)
            one.set_title(f"{way}: {100 * hits:.1f} % right; colour is the share of the row")
        return _save(figure, folder, name)


class _figure:
    """Figure and axes without pyplot: no global state, no window."""

    def __init__(self, size: tuple[float, float], columns: int = 1):
        self.size, self.columns = size, columns

    def __enter__(self):
        import matplotlib
        from matplotlib.figure import Figure

        self.style = matplotlib.rc_context(STYLE)
        self.style.__enter__()
        figure = Figure(figsize=self.size, layout="constrained")
        return figure, figure.subplots(1, self.columns)

    def __exit__(self, *error):
        return self.style.__exit__(*error)


def _save(figure, folder: Path, name: str) -> list[str]:
    """Both files, each put in place in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{name}.png", f"{name}.svg"]
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as scratch:
        for file in names:
            options = {"dpi": 150} if file.endswith("png") else {"metadata": {"Date": None}}
            figure.savefig(Path(scratch) / file, **options)
        for file in names:
            os.replace(Path(scratch) / file, folder / file)
    return names
