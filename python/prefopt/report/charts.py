"""Pictures of an evaluation: bars beside the chance line, and confusion matrices."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.report.evaluation import title as title_of
from prefopt.report.figures import BASE_COLOUR, INK, OWN, Picture, figure, save
from prefopt.report.score import BASE, NAMES, RUN, Line, Suite

LEGEND = (NAMES[BASE], NAMES[RUN], "chance")
WIDTH = 0.36  # of a bar; two of them and a gap make 1


def draw_suite(suite: Suite, folder: Path) -> list[Picture]:
    """Everything that can be drawn of a suite, as PNG and SVG files in ``folder``."""
    found = _bars(suite, folder)
    confusion, names = suite.details.get("confusion"), suite.details.get("names")
    ways = confusion.get(RUN) if isinstance(confusion, dict) else None
    if isinstance(ways, dict) and isinstance(names, list):
        for way, counts in ways.items():
            if _is_matrix(counts, len(names)):
                found.append(_confusion(way, counts, names, folder))
    return found


def _bars(suite: Suite, folder: Path) -> list[Picture]:
    """Shares of base and run side by side, with 95 % intervals and chance lines where there are any."""
    shown = [line for line in suite.lines() if line.any.unit == "share" and _shares(line)]
    if not shown:
        return []
    name, title = f"eval_{suite.name}", title_of(suite)
    with figure(max(5.0, 1.3 * len(shown) + 1.2), 3.0) as (made, axes):
        named: set[str] = set()

        def once(label: str) -> str | None:
            """The legend's entry, the first time."""
            known = label in named
            named.add(label)
            return None if known else label

        for place, line in enumerate(shown):
            both = len(_shares(line)) > 1
            for score in _shares(line):
                own = score.model == RUN
                # an end that is not known, where there is one question, stays without a line
                known = [one if math.isfinite(one) else score.value for one in (score.low, score.high)]
                reach = [[score.value - known[0]], [known[1] - score.value]]
                axes.bar(
                    place + (WIDTH / 2 if own else -WIDTH / 2) * both,
                    score.value,
                    WIDTH,
                    color=OWN if own else BASE_COLOUR,
                    yerr=[[max(one, 0) for one in side] for side in reach],
                    error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3},
                    label=once(LEGEND[own]),
                )
            if line.chance is not None:
                ends = [place - 0.46, place + 0.46]
                axes.plot(ends, [line.chance] * 2, color=INK, ls="--", lw=1, label=once(LEGEND[2]))
        labels = ["\n".join([*line.any.asked.split(", "), line.metric]) for line in shown]
        axes.set_xticks(range(len(shown)), labels, fontsize=9)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share")
        axes.set_title(title, pad=26)  # above the legend
        place = {"loc": "lower left", "bbox_to_anchor": (0, 0.98)}
        handles, named_by = axes.get_legend_handles_labels()
        order = sorted(range(len(handles)), key=lambda one: LEGEND.index(named_by[one]))
        entries = [[one[at] for at in order] for one in (handles, named_by)]
        axes.legend(*entries, frameon=False, fontsize=9, ncols=3, borderaxespad=0.2, **place)
        explanation = "Shares with their 95 % intervals"
        explanation += "; the broken line is chance." if "chance" in named else "."
        return [Picture(name, title, explanation, save(made, folder, name, title))]


def _shares(line: Line) -> list:
    return [score for score in (line.base, line.run) if score is not None]


def _is_matrix(counts: Any, width: int) -> bool:
    """Whether it is (width - 1, width) of counts: a file may have been written by hand."""
    lines = counts if isinstance(counts, list) and len(counts) == width - 1 else [None]
    return all(
        isinstance(line, list) and len(line) == width and all(type(one) is int for one in line) for line in lines
    )


def _confusion(way: str, counts: Any, names: Sequence[str], folder: Path) -> Picture:
    """Rows are the right names, columns what was said, the last of them no name; shares of the row as colour.

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
                # a wash over the page rather than a colour of its own, so that it can be read on black as well
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
            "The trained model. Each row is a right name, each column what was said, its colour the share of the row; "
            "what lies off the diagonal is wrong."
        )
        return Picture(name, title, explanation, save(made, folder, name, title))
