"""Charts of an evaluation: bars with the chance line, and confusion matrices."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.report.evaluation import title as title_of
from prefopt.report.figures import BASE_COLOUR, INK, OWN, Picture, figure, save
from prefopt.report.score import BASE, NAMES, RUN, Score, Suite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEGEND = (NAMES[BASE], NAMES[RUN], "chance")
WIDTH = 0.36  # of a bar; two of them and a gap make 1


def draw_suite(suite: Suite, folder: Path) -> list[Picture]:
    """Every chart of a suite, as PNG and SVG files in ``folder``."""
    pictures = _bars(suite, folder)
    confusion, names = suite.details.get("confusion"), suite.details.get("names")
    ways = confusion.get(RUN) if isinstance(confusion, dict) else None
    if isinstance(ways, dict) and isinstance(names, list):
        shape = len(names) - 1, len(names)
        pictures += [_confusion(way, one, names, folder) for way, one in ways.items() if _is_matrix(one, *shape)]
    return pictures


def _bars(suite: Suite, folder: Path) -> list[Picture]:
    """Shares of base and run side by side, with 95 % intervals, and with chance lines where known."""
    lines = [line for line in suite.lines() if line.any.unit == "share" and (line.base or line.run)]
    if not lines:
        return []
    name, title = f"eval_{suite.name}", title_of(suite)
    with figure(max(5.0, 1.3 * len(lines) + 1.2), 3.0) as (made, axes):
        for place, line in enumerate(lines):
            shift = WIDTH / 2 if line.base and line.run else 0
            if line.base:
                _bar(axes, place - shift, line.base, LEGEND[0], BASE_COLOUR)
            if line.run:
                _bar(axes, place + shift, line.run, LEGEND[1], OWN)
            if line.chance is not None:
                ends = [place - 0.46, place + 0.46]
                axes.plot(ends, [line.chance] * 2, color=INK, ls="--", lw=1, label=LEGEND[2])
        labels = ["\n".join([*line.any.asked.split(", "), line.metric]) for line in lines]
        axes.set_xticks(range(len(lines)), labels, fontsize=9)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share")
        axes.set_title(title, pad=26)  # above the legend
        by_label = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        entries = [label for label in LEGEND if label in by_label]
        axes.legend(
            [by_label[label] for label in entries],
            entries,
            frameon=False,
            fontsize=9,
            ncols=3,
            borderaxespad=0.2,
            loc="lower left",
            bbox_to_anchor=(0, 0.98),
        )
        explanation = "Shares with their 95 % intervals"
        explanation += "; the dashed line is chance." if LEGEND[2] in entries else "."
        return [Picture(name, title, explanation, save(made, folder, name, title))]


def _bar(axes: "Axes", place: float, score: Score, label: str, colour: str) -> None:
    """A bar with its interval; without an end that is not known, as that of a single question."""
    low, high = (end if math.isfinite(end) else score.value for end in (score.low, score.high))
    reach = [[max(score.value - low, 0)], [max(high - score.value, 0)]]
    error = {"ecolor": INK, "elinewidth": 1, "capsize": 3}
    axes.bar(place, score.value, WIDTH, color=colour, yerr=reach, error_kw=error, label=label)


def _is_matrix(counts: Any, height: int, width: int) -> bool:
    """Whether a value from JSON has (height, width) counts."""
    if not isinstance(counts, list) or len(counts) != height:
        return False
    return all(isinstance(row, list) and len(row) == width and {*map(type, row)} <= {int} for row in counts)


def _confusion(way: str, counts: Any, names: Sequence[str], folder: Path) -> Picture:
    """Rows are the right names, columns the answers, the last of them "no name"; colour is the share of the row.

    Args:
        counts: (N, N + 1).
        names: N + 1 of them.
    """
    name, title = f"eval_confusion_{way}", f"Right and said ({way})"
    with figure(4.6, 4.5) as (made, axes):
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                if not count:
                    continue
                share = count / sum(line)
                # transparent, to be readable on a dark page as well
                axes.bar(column, 1, 1, row - 0.5, color=OWN, alpha=share, linewidth=0)
                ink = "white" if share > 0.55 else INK
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=ink)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(names) - 1.5, -0.5)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=9)
        axes.set_yticks(range(len(names) - 1), names[:-1], fontsize=9)
        axes.set_xlabel("said")
        axes.set_ylabel("right")
        total = sum(map(sum, counts))
        hits = sum(line[row] for row, line in enumerate(counts))
        axes.set_title(f"By {way}: {100 * hits / max(total, 1):.1f} % right")
        explanation = (
            "The trained model. Each row is a right name, each column an answer, its colour the share of the row; "
            "answers off the diagonal are wrong."
        )
        return Picture(name, title, explanation, save(made, folder, name, title))
