"""The plots of a run's training: what was logged, over the optimizer's steps."""

import math
from dataclasses import dataclass
from pathlib import Path

from prefopt.report.figures import BAD, GOOD, INK, OWN, Picture, figure, save
from prefopt.report.read import Run


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
        "The method's loss, as its formula defines it; KTO's is 0.5 where the model still equals its reference, and "
        "lower as it agrees with the labels.",
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
        "Reward of desirable answers minus that of undesirable ones: 0 means that nothing was learned.",
    ),
    Plot(
        "log_ratios",
        "Likelihood against the reference model",
        "nats per token",
        (
            ("log_ratios/chosen", "desirable", GOOD),
            ("log_ratios/rejected", "undesirable", BAD),
            ("eval_log_ratios/chosen", "desirable, evaluation", OWN),
        ),
        "How much likelier a token of an answer is than under the reference model. Desirable answers should not fall: "
        "a loss of a quarter of a nat is a collapse.",
    ),
    Plot(
        "entropy",
        "Entropy",
        "nats",
        (("entropy", "training", OWN), ("eval_entropy", "evaluation", BAD)),
        "How undecided the model is about the next token of an answer: a large change in either direction is damage.",
    ),
    Plot(
        "kl_per_token",
        "KL per token",
        "nats",
        (("kl_per_token", "training", OWN), ("eval_kl_per_token", "evaluation", BAD)),
        "The exact KL of the model and its reference over the vocabulary, on average over the tokens of the answers.",
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
        "The components of the gradient with respect to the log-probabilities: their mean absolute values, in "
        "shares of their sum.",
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
        "The length of the gradient before clipping: spikes are unstable steps; at 0 the model does not learn.",
    ),
)


def drawable(run: Run) -> list[Plot]:
    """The plots for which the run has logged at least one finite value."""
    return [plot for plot in PLOTS if any(run.finite(key) for key, _, _ in plot.lines)]


def draw(run: Run, plot: Plot, folder: Path) -> Picture:
    """Write ``<name>.png`` and ``<name>.svg`` into ``folder``."""
    with figure(5, 3) as (made, axes):
        for key, legend, colour in plot.lines:
            points = run.series(key)
            if points:
                steps = [step for step, _ in points]
                values = [value if math.isfinite(value) else math.nan for _, value in points]
                marker = "o" if len(points) < 12 else ""
                axes.plot(steps, values, color=colour, label=legend, marker=marker, ms=4, lw=1.6)
        axes.set_title(plot.title)
        axes.set_xlabel("optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)  # no half steps
        axes.set_ylabel(plot.unit)
        axes.grid(color=INK, alpha=0.12, lw=0.6)
        if plot.name in ("rewards", "margin"):
            axes.axhline(0, color=INK, alpha=0.5, lw=0.8)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False, fontsize=9)
        svg = save(made, folder, plot.name, plot.title)
    return Picture(plot.name, plot.title, plot.explanation, svg)
