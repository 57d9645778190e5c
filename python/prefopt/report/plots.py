"""The plots of a run: PNG and SVG files, and the same SVG ready to stand in a page of any colour."""

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

from prefopt.report.read import Run

INK = "#1b1f24"  # text and axes; in a page it gives way to the page's own colour
GOOD, BAD, OWN = "#2f8f5b", "#d0653a", "#3f7fd0"  # to be told apart on white and on near-black


@dataclass(frozen=True)
class Plot:
    """One plot: file name, title, unit of the y axis, (metric, legend, colour) of each line, and what it shows."""

    name: str
    title: str
    unit: str
    lines: tuple[tuple[str, str, str], ...]
    explanation: str


PLOTS = (
    Plot(
        "loss",
        "Loss",
        "loss",
        (("loss", "training", OWN), ("eval_loss", "evaluation", BAD)),
        "The method's loss, as its formula defines it; KTO's is 0.5 where the model still equals its reference, and lower as "
        "it agrees with the thumbs.",
    ),
    Plot(
        "rewards",
        "Rewards",
        "reward",
        (("rewards/chosen", "desirable", GOOD), ("rewards/rejected", "undesirable", BAD)),
        "How much likelier an answer is than under the reference model (beta times the log-ratio): desirable answers "
        "should end above undesirable ones. For a method without a reference model, beta times the log-probability.",
    ),
    Plot(
        "margin",
        "Reward margin",
        "reward",
        (("rewards/margins", "training", OWN), ("eval_rewards/margins", "evaluation", BAD)),
        "The distance between the two lines of the rewards: 0 means that nothing was learned.",
    ),
    Plot(
        "kl",
        "Reference point (KL)",
        "nats",
        (("kl", "estimate", OWN),),
        "KTO's baseline, estimated on mismatched answers and never below 0: how far the model has drifted from its "
        "reference in general.",
    ),
    Plot(
        "shift",
        "BCO's shift",
        "reward",
        (("shift", "estimate", OWN), ("shift_gate", "gate, 0 to 1", GOOD)),
        "The baseline of the rewards, and how far its gate is open.",
    ),
    Plot(
        "gradient_shares",
        "Shares of the gradient",
        "share",
        (
            ("grad/base", "KTO at its reference point", OWN),
            ("grad/shift", "shift", "#7a5fc7"),
            ("grad/value", "value function", GOOD),
            ("grad/weighting", "weighting", "#b08a1e"),
            ("grad/odds", "odds ratio", BAD),
        ),
        "Which part of the loss pulls how hard on the log-probabilities: the mean sizes of the parts, in shares of their sum.",
    ),
    Plot(
        "learning_rate",
        "Learning rate",
        "learning rate",
        (("learning_rate", "schedule", OWN),),
        "The size of the steps: warm-up first, then down to 0 unless another schedule was chosen.",
    ),
    Plot(
        "grad_norm",
        "Gradient norm",
        "norm",
        (("grad_norm", "before clipping", OWN),),
        "The length of the gradient before clipping: spikes tell of unstable steps, 0 of a model that cannot learn.",
    ),
)


def drawable(run: Run) -> list[Plot]:
    """The plots for which the run has logged at least one finite value."""
    return [plot for plot in PLOTS if any(run.finite(key) for key, _, _ in plot.lines)]


def draw(run: Run, plot: Plot, folder: Path) -> str:
    """Write ``<name>.png`` and ``<name>.svg`` into ``folder``; the SVG without background, for a page, is returned."""
    import matplotlib

    # Figure and its canvas, not pyplot: no global state, no window, and the caller's backend stays as it is.
    from matplotlib.figure import Figure

    style = {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "font.size": 10,
        "svg.fonttype": "none",  # text stays text: small, and set by the browser
        "svg.hashsalt": plot.name,  # the same ids every time, different ones in each plot of a page
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        for key, legend, colour in plot.lines:
            points = run.series(key)
            if points:
                steps, values = zip(*points, strict=True)
                values = [value if math.isfinite(value) else math.nan for value in values]
                few = len(points) < 12
                axes.plot(
                    steps,
                    values,
                    color=colour,
                    label=legend,
                    marker="o" if few else "",
                    ms=4,
                    lw=1.6,
                )
        axes.set_title(plot.title)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(plot.unit)
        axes.grid(color=INK, alpha=0.12, lw=0.6)
        if plot.name in ("rewards", "margin"):
            axes.axhline(0, color=INK, alpha=0.5, lw=0.8)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False, fontsize=9)
        figure.savefig(folder / f"{plot.name}.png", dpi=150)
        figure.savefig(folder / f"{plot.name}.svg", metadata={"Date": None})
        inline = io.StringIO()
        figure.savefig(inline, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(inline.getvalue(), plot)


def _for_page(svg: str, plot: Plot) -> str:
    """Only the element, as wide as its column, in the page's colour and font, with a name for screen readers."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(?<=font: )([^;\"']*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    # matplotlib also names every group, the same names in each figure; in one page an id must be unique
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    head = re.match(r"<svg[^>]*>", svg).group()
    box = re.search(r'viewBox="[^"]*"', head).group()
    start = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" aria-label="{plot.title}">'
    return start + svg[len(head) :]
