"""Figures without pyplot: one style, PNG and SVG files, and the same SVG ready to stand in a page of any colour."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.files import temporary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1b1f24"  # text and axes; in a page it gives way to the page's own colour
GOOD, BAD, OWN = "#2f8f5b", "#d0653a", "#3f7fd0"  # to be told apart on white and on near-black
BASE_COLOUR = "#8a949f"  # of the model before training, beside OWN
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: small, and set by the browser
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its files' name without ending, title, what it shows, and the SVG element for a page."""

    name: str
    title: str
    explanation: str
    svg: str


@contextmanager
def figure(width: float, height: float, columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """(figure, axes) of the given inches in the house style; an array of axes where there are several columns."""
    import matplotlib

    # Figure and its canvas, not pyplot: no global state, no window, and the caller's backend stays as it is.
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        yield made, made.subplots(1, columns)


def save(made: "Figure", folder: Path, name: str, title: str) -> str:
    """Write ``<name>.png`` and ``<name>.svg`` into ``folder``; the SVG without background, for a page, is returned.

    Args:
        made: of ``figure``, still within its ``with``.
        title: for screen readers.
    """
    import matplotlib

    # the same ids every time, different ones in each plot of a page
    with matplotlib.rc_context({"svg.hashsalt": name}):
        made.savefig(folder / f"{name}.png", dpi=150)
        made.savefig(folder / f"{name}.svg", metadata={"Date": None})
        inline = io.StringIO()
        made.savefig(inline, format="svg", transparent=True, metadata={"Date": None})
    return for_page(inline.getvalue(), title)


def for_page(svg: str, title: str) -> str:
    """Only the element, as wide as its column, in the page's colour and font, with a name for screen readers."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(?<=font: )([^;\"']*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    # matplotlib also names every group, the same names in each figure; in one page an id must be unique
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    head, rest = svg.split(">", 1)
    box = re.findall(r'viewBox="[^"]*"', head)[0]
    start = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{start} {box} role="img" aria-label="{escape(title)}">{rest}'


@contextmanager
def placed(folder: Path) -> Iterator[Path]:
    """A scratch folder, whose files are moved into ``folder`` when all of them are there; none of them on an error."""
    with temporary(folder) as scratch:
        scratch.mkdir()
        yield scratch
        folder.mkdir(exist_ok=True)
        for file in sorted(scratch.iterdir()):
            os.replace(file, folder / file.name)
