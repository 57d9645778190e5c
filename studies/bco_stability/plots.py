"""The study's plots: PNG and SVG files, and the same SVG for the report."""

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

# Figure and its canvas, not pyplot: no global state, no window, and the caller's backend stays as it is.
from matplotlib.figure import Figure

from prefopt.report.figures import BAD, GOOD, INK, OWN, STYLE, Picture
from studies.bco_stability.grid import COMPONENTS, Config, label, remedies_of, remedy_label
from studies.bco_stability.runs import share_name
from studies.bco_stability.table import Share, by_config, cell_of

SECOND = "#8a5cc4"  # beside the report's three: to be told apart on white and on near-black
SHARE_COLOURS = {"kto": INK, "shift": BAD, "value": OWN, "weighting": SECOND, "odds": GOOD}
SMALL = {"axes.titlesize": 10, "font.size": 9}  # several panels in a figure


def draw_all(rows: list[dict], traces: list[dict], folder: Path) -> list[Picture]:
    """Write every plot for which there are rows, as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = {config: cell_of(some).unstable for config, some in by_config(rows).items()}
    drawn = [_shares_plot(cells, folder)]
    for base in _remedied(cells):
        drawn.append(_remedies_plot(base, cells, folder))
    last = {Config.of(trace): trace for trace in traces}
    if last:
        drawn += _trace_plots(last, folder)
    return drawn


def _shares_plot(cells: dict[Config, Share], folder: Path) -> Picture:
    """Unstable share of every set of components: one panel a form and precision, one mark a learning rate."""
    plain = {config: share for config, share in cells.items() if not config.changes}
    sets = sorted(
        {config.components for config in plain if config.form == "naive"},
        key=lambda one: (len(one), [COMPONENTS.index(name) for name in one]),
        reverse=True,
    )
    panels = sorted({(c.form, c.precision) for c in plain}, key=lambda p: (p[0] == "ours", p[1] == "bf16"))
    rates = sorted({config.learning_rate for config in plain})
    colours = dict(zip(rates, [GOOD, OWN, SECOND, BAD][-len(rates) :], strict=False))

    def draw(axes: list[Axes]) -> None:
        for panel, (form, precision) in zip(axes, panels, strict=True):
            for rate in rates:
                found = [
                    (y + 0.18 * (rates.index(rate) - (len(rates) - 1) / 2), plain[config])
                    for y, components in enumerate(sets)
                    if (config := Config(form, components, precision, rate)) in plain
                ]
                _marks(panel, found, colours[rate], f"{rate:g}")
            panel.set_title(f"{form}, {precision}")
            panel.set_yticks(range(len(sets)), [label(one) for one in sets])
            _share_axis(panel)
        # A panel lacks the learning rates that its form was not run at: the legend has those of all panels.
        marks = {text: mark for panel in axes for mark, text in zip(*panel.get_legend_handles_labels(), strict=True)}
        axes[-1].legend(
            [marks[text] for text in sorted(marks, key=float)],
            sorted(marks, key=float),
            loc="center right",
            frameon=False,
            fontsize=8,
            title="learning rate",
            title_fontsize=8,
        )

    return _figure(
        folder,
        "unstable",
        "Share of unstable runs",
        "Share of unstable runs with its 95 % interval, by the components that are on, the form and the precision of "
        "the loss.",
        len(panels),
        (2.2 + 2.1 * len(panels), 0.8 + 0.34 * len(sets)),
        draw,
    )


def _remedied(cells: dict[Config, Share]) -> list[tuple[str, tuple[str, ...]]]:
    """(precision, components) of the naive cells whose remedies were run."""
    return sorted(
        {
            (config.precision, config.components)
            for config in cells
            if config.form == "naive" and config.changes in remedies_of(config.components)
        },
        key=str,
    )


def _remedies_plot(base: tuple[str, tuple[str, ...]], cells: dict[Config, Share], folder: Path) -> Picture:
    precision, components = base
    changes = [(), *remedies_of(components)][::-1]
    rates = sorted(
        {config.learning_rate for config in cells if config.changes and (config.precision, config.components) == base}
    )

    def draw(axes: list[Axes]) -> None:
        for panel, rate in zip(axes, rates, strict=True):
            found = [
                (y, cells[config])
                for y, change in enumerate(changes)
                if (config := Config("naive", components, precision, rate, change)) in cells
            ]
            _marks(panel, found, OWN, "")
            panel.set_title(f"learning rate {rate:g}")
            panel.set_yticks(range(len(changes)), [remedy_label(one) for one in changes])
            _share_axis(panel)

    name = f"remedies-{precision}-{'-'.join(components)}"
    return _figure(
        folder,
        name,
        f"Remedies: {label(components)}, {precision}",
        f"Share of unstable runs of the naive form with {label(components)} in {precision}, as it is, with each remedy "
        "alone, and with all.",
        len(rates),
        (2.4 + 2.2 * len(rates), 0.8 + 0.3 * len(changes)),
        draw,
    )


def _trace_plots(traces: dict[Config, dict], folder: Path) -> list[Picture]:
    ordered = sorted(traces.items(), key=lambda one: (one[0].form, one[0].learning_rate))

    def drawn(name: str, title: str, explanation: str, axis: str, lines: dict[str, tuple[str, str]]) -> Picture:
        def draw(axes: list[Axes]) -> None:
            for panel, (config, trace) in zip(axes, ordered, strict=True):
                for key, (text, colour) in lines.items():
                    panel.plot(trace["step"], trace[key], color=colour, label=text, lw=1.4)
                panel.set_title(f"{config.form}, {config.precision}, {config.learning_rate:g}")
                panel.set_xlabel("optimizer step")
                panel.grid(color=INK, alpha=0.12, lw=0.6)
                if axis == "reward":
                    panel.axhline(0, color=INK, alpha=0.5, lw=0.8)
                else:
                    panel.set_ylim(0, 1)
            axes[0].set_ylabel(axis)
            axes[0].legend(frameon=False, fontsize=8)

        return _figure(folder, name, title, explanation, len(ordered), (1.0 + 2.4 * len(ordered), 2.8), draw)

    return [
        drawn(
            "gradient-shares",
            "Gradient by component",
            "Share of each component in the sum of absolute coefficients d loss / d logps, the components switched on "
            "one after another; medians over the seeds that still run.",
            "share of the gradient",
            {share_name(name): (name, colour) for name, colour in SHARE_COLOURS.items()},
        ),
        drawn(
            "rewards-and-shift",
            "Rewards and shift",
            "Mean reward of desirable and of undesirable rows (beta times the log-ratio), the shift, and KTO's "
            "reference point in the same units; medians over the seeds that still run.",
            "reward",
            {
                "chosen": ("desirable", GOOD),
                "rejected": ("undesirable", BAD),
                "shift": ("shift", OWN),
                "z0": ("beta z0", SECOND),
            },
        ),
    ]


def _marks(axes: Axes, found: list[tuple[float, Share]], colour: str, legend: str) -> None:
    if not found:
        return
    ys, shares = zip(*found, strict=True)
    ends = [share.interval for share in shares]
    axes.hlines(ys, [low for low, _ in ends], [high for _, high in ends], color=colour, alpha=0.45)
    axes.plot([share.share for share in shares], ys, "o", color=colour, ms=4, label=legend)


def _share_axis(axes: Axes) -> None:
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.grid(axis="x", color=INK, alpha=0.15, lw=0.6)


def _figure(
    folder: Path,
    name: str,
    title: str,
    explanation: str,
    panels: int,
    size: tuple[float, float],
    draw: Callable[[list[Axes]], None],
) -> Picture:
    with matplotlib.rc_context(STYLE | SMALL | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
        draw(list(axes))
        figure.savefig(folder / f"{name}.png", dpi=120)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        inline = io.StringIO()
        figure.savefig(inline, format="svg", transparent=True, metadata={"Date": None})
    return Picture(name, title, explanation, inline.getvalue())
