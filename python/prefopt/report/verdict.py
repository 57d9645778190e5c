"""The verdict on a run: what it reached on rows that it was not trained on, and whether the model is intact."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from prefopt.report.read import Run
from prefopt.report.score import is_number
from prefopt.report.statistics import Z, number, paired_difference, wilson
from prefopt.train.diagnostics import LESS_LIKELY, collapse_signs

NEGLIGIBLE = 0.01  # reward units; a margin this small moves KTO's loss by about a thousandth
FEWEST_LOGS = 4
NOT_TESTED = "The run had no held-out rows, so nothing was tested"

Tone = Literal["good", "bad", "unclear"]
Interval = tuple[float, float, float]  # value, lower and upper end of its 95 % interval


@dataclass(frozen=True)
class Judgement:
    """Shares of desirable answers before and after, and their difference if both are known for each answer."""

    before: Interval
    after: Interval
    difference: Interval | None
    n: int


def verdict(run: Run) -> tuple[Tone, str]:
    """In one sentence: damage first, then judged answers, then the margin or the loss on held-out rows."""
    broken = damage(run)
    if broken is not None:
        return "bad", broken
    judged = judgement(run)
    if judged is not None and judged.difference is not None:
        change, low, high = judged.difference
        points = f"{100 * change:+.1f} points"
        if low > 0:
            return "good", f"The answers became better: {points}."
        if high < 0:
            return "bad", f"The answers became worse: {points}."
        return "unclear", f"No clear change in the answers ({points}, and the interval includes 0)."
    return _by_margin(run) or _by_loss(run)


def damage(run: Run) -> str | None:
    """What training has broken, by held-out rows where there are any, else by the last log; None if nothing."""
    held_out = run.last("eval_log_ratios/chosen") is not None
    prefix = "eval_" if held_out else ""
    ratio, entropies = run.last(f"{prefix}log_ratios/chosen"), run.finite(f"{prefix}entropy")
    if ratio is None or not entropies:
        return None
    # evaluated once only, at the end: then the first log of training says where it started
    start = entropies[0] if len(entropies) > 1 else (run.finite("entropy") or entropies)[0]
    signs = collapse_signs(-ratio, entropies[-1], start, run.last(f"{prefix}flat_rows") or 0.0)
    if signs:
        return f"The model collapsed: {', '.join(signs)}."
    margin = run.last(f"{prefix}rewards/margins")
    if -ratio > LESS_LIKELY and margin is not None and margin > NEGLIGIBLE:
        return (
            f"Desirable answers became less likely, by {-ratio:.2f} nats per token: the margin comes from undesirable "
            "answers that fell faster."
        )
    return None


def _by_margin(run: Run) -> tuple[Tone, str] | None:
    """From the rewards of held-out rows; None for a run without margins, such as sft's."""
    ends, margin = end_margins(run), run.last("eval_rewards/margins")
    if margin is None:
        if ends is None:
            return None
        return "unclear", f"{NOT_TESTED}. On its training rows the reward margin ended at {number(ends[0])}."
    reach = Z * (run.last("eval_rewards/margins_standard_error") or 0.0)
    shown = f"{number(margin)} (95 % interval {number(margin - reach)} to {number(margin + reach)})"
    shown = shown if reach else number(margin)
    separated = ends is not None and ends[0] > max(ends[1], NEGLIGIBLE)
    if margin - reach > 0 and margin >= NEGLIGIBLE:
        return "good", f"The model learned to prefer desirable answers: on held-out rows the margin is {shown}."
    if margin + reach < 0 and margin <= -NEGLIGIBLE:
        return "bad", f"The model learned the opposite: on held-out rows the margin is {shown}."
    if separated:
        return "bad", (
            "The model separates desirable from undesirable answers on the training rows, but not on the held-out "
            f"rows, where the margin is {shown}."
        )
    if abs(margin) < NEGLIGIBLE:
        return "bad", f"The model learned next to nothing: on held-out rows the margin is {shown}."
    return "unclear", f"It is not clear that the model learned: on held-out rows the margin is {shown}."


def _by_loss(run: Run) -> tuple[Tone, str]:
    """The verdict on a run without margins, from the loss on held-out rows before and after."""
    evaluated = [(step, value) for step, value in run.series("eval_loss") if value == value]
    if len(evaluated) > 1 and evaluated[0][0] == 0:
        before, after = evaluated[0][1], evaluated[-1][1]
        change = f"the loss on held-out rows went from {number(before)} to {number(after)}."
        return ("good", f"The model learned: {change}") if after < before else ("bad", f"No learning: {change}")
    losses = run.finite("loss")
    quarter = len(losses) // 4
    if quarter < 2 or run.finite("rewards/margins"):
        return "unclear", "Too little was logged to say whether the model learned."
    first, last = fmean(losses[:quarter]), fmean(losses[-quarter:])
    if last >= first:
        return "bad", f"The model learned nothing: the loss did not fall ({number(first)} to {number(last)})."
    return "unclear", f"{NOT_TESTED}. On its training rows the loss went from {number(first)} to {number(last)}."


def judgement(run: Run) -> Judgement | None:
    """From the judged samples, or else from the shares in summary.json; None if there are neither."""
    judged = [(sample.get("before_ok"), sample.get("after_ok")) for sample in run.samples]
    pairs = [(a, b) for a, b in judged if isinstance(a, bool) and isinstance(b, bool)]
    if pairs:
        before, after = [a for a, _ in pairs], [b for _, b in pairs]
        shares = [_share(sum(side) / len(pairs), len(pairs)) for side in (before, after)]
        return Judgement(shares[0], shares[1], paired_difference(before, after), len(pairs))
    first, last, n = (run.summary.get(key) for key in ("before", "after", "n"))
    if run.summary.get("kind") != "share" or not (is_number(first) and is_number(last) and is_number(n)):
        return None
    if not (0 <= first <= 1 and 0 <= last <= 1 and n >= 1):
        return None
    return Judgement(_share(first, int(n)), _share(last, int(n)), None, int(n))


def _share(share: float, n: int) -> Interval:
    return share, *wilson(round(share * n), n)


def end_margins(run: Run) -> tuple[float, float] | None:
    """Mean margin over the last quarter of the logs (at least four) and its standard deviation; None if fewer.

    Successive logs are correlated, so their spread gives no interval for the mean.
    """
    margins = run.finite("rewards/margins")
    last = margins[-end_size(margins) :]
    return (fmean(last), stdev(last)) if len(last) >= FEWEST_LOGS else None


def end_size(logs: Sequence[float]) -> int:
    """How many logs are the end of a run."""
    return max(FEWEST_LOGS, len(logs) // 4)
