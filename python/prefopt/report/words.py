"""What happened, in sentences computed from the numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from prefopt.report.read import Run, is_number
from prefopt.report.statistics import paired_difference, wilson

NOTHING = 0.01  # reward units; a margin this small moves KTO's loss by about a thousandth
FEWEST_LOGS = 4


@dataclass(frozen=True)
class Judgement:
    """Shares before and after, each (share, low, high), and their difference."""

    before: tuple[float, float, float]
    after: tuple[float, float, float]
    difference: tuple[float, float, float] | None  # None where only the shares are known
    n: int


@dataclass(frozen=True)
class Story:
    """The verdict in one line, its tone, and the sentences that support it."""

    tone: Literal["good", "bad", "unclear"]
    verdict: str
    sentences: list[str]


def judgement(run: Run) -> Judgement | None:
    """The judged samples, or else the shares of summary.json; None if there are neither."""
    judged = [
        (sample["before_ok"], sample["after_ok"])
        for sample in run.samples
        if isinstance(sample.get("before_ok"), bool) and isinstance(sample.get("after_ok"), bool)
    ]
    if judged:
        before, after = ([pair[side] for pair in judged] for side in (0, 1))
        n = len(judged)
        return Judgement(
            (sum(before) / n, *wilson(sum(before), n)),
            (sum(after) / n, *wilson(sum(after), n)),
            paired_difference(before, after),
            n,
        )
    before, after, n = (run.summary.get(key) for key in ("before", "after", "n"))
    if run.summary.get("kind") != "share" or not all(map(is_number, (before, after, n))):
        return None
    if not (0 <= before <= 1 and 0 <= after <= 1 and n >= 1):
        return None
    shares = [(share, *wilson(round(share * n), int(n))) for share in (before, after)]
    return Judgement(shares[0], shares[1], None, int(n))


def tell(run: Run) -> Story:
    """Learned or not, by how much, and what supports it."""
    tone, verdict = _verdict(run)
    sentences = [*_end(run), *_judged(run), *_margin(run), *_likelihoods(run), *_loss(run)]
    return Story(tone, verdict, sentences)


def closing(run: Run) -> list[str]:
    """What the terminal shows when a run is over: the numbers on held-out rows, the verdict and the warnings."""
    names = {
        "loss": "loss",
        "rewards/margins": "margin",
        "rewards/accuracies": "accuracy",
        "kl": "kl",
    }
    found = {name: run.last(f"eval_{key}") for key, name in names.items()}
    numbers = [f"{name} {number(value)}" for name, value in found.items() if value is not None]
    lines = []
    if numbers:
        lines.append(f"held-out rows: {', '.join([*numbers, *_held_out_count(run)])}")
    lines.append(f"verdict: {tell(run).verdict}")
    findings = run.record.get("diagnostics")
    for finding in findings if isinstance(findings, list) else []:
        lines.append(f"warning: {said_of(finding)}")
    return lines


def said_of(finding: Any) -> str:
    """A finding of the trainer as one text: its step, reason and remedy."""
    if not isinstance(finding, dict):
        return str(finding)
    step = f"Step {finding['step']}: " if finding.get("step") else ""
    sentences = [str(finding[key]).rstrip(".") for key in ("reason", "remedy") if finding.get(key)]
    return step + ". ".join(sentences or [str(finding.get("name", finding))]) + "."


def percent(share: float) -> str:
    """A share with one digit after the point, or three where that would be 0 or 100 and the share is not.

    Example:
        >>> percent(0.417), percent(1.0), percent(0.00038)
        ('41.7 %', '100.0 %', '0.038 %')
    """
    digits = 3 if 0 < min(share, 1 - share) < 0.0005 else 1
    return f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """Four places after the point below 1, three significant digits otherwise."""
    return f"{value:.4f}" if 0.0001 <= abs(value) < 1 else f"{value:,.3g}" if value else "0"


def _verdict(run: Run) -> tuple[Literal["good", "bad", "unclear"], str]:
    judged = judgement(run)
    if judged is not None and judged.difference is not None:
        change, low, high = judged.difference
        points = f"{100 * change:+.1f} points"
        if low > 0:
            return "good", f"The answers became better: {points}."
        if high < 0:
            return "bad", f"The answers became worse: {points}."
        return "unclear", f"No clear change in the answers ({points}, and the interval includes 0)."
    ends = _end_margins(run)
    if ends is None:
        return _by_loss(run)
    mean, deviation = ends
    if abs(mean) < NOTHING:
        return (
            "bad",
            f"The model learned next to nothing: the reward margin ended at {number(mean)}.",
        )
    if mean > deviation:
        held_out = run.last("eval_rewards/margins")
        if held_out is not None and held_out < NOTHING:
            return (
                "bad",
                "The model tells desirable answers from undesirable ones on the training rows, but not on the held-out "
                f"rows, where the margin is {number(held_out)}.",
            )
        return "good", "The model learned to prefer desirable answers to undesirable ones."
    if mean < -deviation:
        return "bad", "The model learned the opposite: undesirable answers are rewarded more."
    return (
        "unclear",
        "It is not clear that the model learned: the margin is smaller than it varies from log to log.",
    )


def _by_loss(run: Run) -> tuple[Literal["good", "bad", "unclear"], str]:
    """Of a run without margins, such as sft's: whether its loss fell."""
    losses = run.finite("loss")
    quarter = len(losses) // 4
    if quarter < 2 or run.finite("rewards/margins"):
        return "unclear", "Too little was logged to say whether the model learned."
    (first, deviation), (last, last_deviation) = map(_mean_and_deviation, (losses[:quarter], losses[-quarter:]))
    if first - last > max(deviation, last_deviation):
        return (
            "good",
            f"The model learned what it was shown: the loss fell from {number(first)} to {number(last)}.",
        )
    if last >= first:
        return (
            "bad",
            f"The model learned nothing: the loss did not fall ({number(first)} to {number(last)}).",
        )
    return (
        "unclear",
        "It is not clear that the model learned: the loss fell by less than it varies.",
    )


def _end(run: Run) -> list[str]:
    if run.record.get("status") == "stopped":
        reason = run.record.get("stopped_by") or "an unknown cause"
        return [f"Training stopped before its end: {reason}."]
    if run.record.get("status") == "running":
        return ["Training had not ended when this report was written."]
    return []


def _judged(run: Run) -> list[str]:
    judged = judgement(run)
    metric = run.summary.get("metric")
    if judged is None:
        before, after, n = (run.summary.get(key) for key in ("before", "after", "n"))
        if isinstance(metric, str) and is_number(before) and is_number(after):
            rows = f" ({n:,} rows)" if is_number(n) else ""
            return [f"{_capital(metric)}: {number(before)} before, {number(after)} after{rows}."]
        return []
    (before, *before_ends), (after, *after_ends) = judged.before, judged.after
    sentences = [
        f"{_capital(metric if isinstance(metric, str) else 'share of desirable answers')}: "
        f"{percent(before)} before ({percent(before_ends[0])} to {percent(before_ends[1])}) and "
        f"{percent(after)} after ({percent(after_ends[0])} to {percent(after_ends[1])}), n = {judged.n}; "
        "in brackets the 95 % intervals."
    ]
    if judged.difference is not None:
        change, low, high = (100 * value for value in judged.difference)
        sentences.append(
            f"That is a change of {change:+.1f} points, with a 95 % interval from {low:+.1f} to {high:+.1f}."
        )
        ends = _end_margins(run)
        if low <= 0 and ends is not None and ends[0] - ends[1] > NOTHING:
            sentences.append(
                "Rewards on the rows did move apart, but sampled answers are not clearly better: look for something "
                "other than the answer by which the rows can be told apart, or for a model that was pushed too far."
            )
    return sentences


def _end_margins(run: Run) -> tuple[float, float] | None:
    """Mean margin over the last quarter of the logs (at least four) and its standard deviation; None if fewer."""
    margins = run.finite("rewards/margins")
    last = margins[-_end_size(margins) :]
    return _mean_and_deviation(last) if len(last) >= FEWEST_LOGS else None


def _end_size(logs: Sequence[float]) -> int:
    return max(FEWEST_LOGS, len(logs) // 4)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Of logs in a row. They depend on each other, so their spread gives no interval for the mean."""
    return fmean(values), stdev(values)


def _margin(run: Run) -> list[str]:
    sentences = []
    margins, ends = run.finite("rewards/margins"), _end_margins(run)
    if ends is not None:
        mean, deviation = ends
        side = "above" if mean >= 0 else "below"
        sentences.append(
            f"In the last {_end_size(margins)} of {len(margins)} logs a desirable row's reward was on average "
            f"{number(abs(mean))} {side} an "
            f"undesirable one's; from log to log the margin varied with a standard deviation of {number(deviation)}."
        )
    held_out = run.last("eval_rewards/margins")
    if held_out is not None:
        sentences.append(
            "On rows that were not trained on, the margin ended at "
            f"{', '.join([number(held_out), *_held_out_count(run)])}."
        )
    return sentences


def _held_out_count(run: Run) -> list[str]:
    """``n = 118`` of the evaluation rows, or of the pairs; empty where it is not known."""
    data = run.record.get("data")
    counts = data.get("eval") if isinstance(data, dict) else None
    n = counts.get("rows") if isinstance(counts, dict) else None
    return [f"n = {n:,}"] if is_number(n) else []


def _likelihoods(run: Run) -> list[str]:
    if run.record.get("reference", {}).get("kind") == "none":
        return []  # the rewards of such a method compare with nothing and are always negative
    chosen = run.last("rewards/chosen")
    if chosen is None or chosen >= -NOTHING:
        return []
    return [
        "In the last log desirable answers, too, were less likely than under the reference model: the margin came from "
        "pushing the undesirable ones down further."
    ]


def _loss(run: Run) -> list[str]:
    losses = run.finite("loss")
    if len(losses) < 2:
        return []
    quarter = max(1, len(losses) // 4)
    first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
    span = "log" if quarter == 1 else f"{quarter} logs"
    sentence = f"The loss went from {number(first)} (first {span}) to {number(last)} (last {span})"
    kl = run.last("kl")
    return [f"{sentence}; KTO's reference point ended at {number(kl)} nats." if kl is not None else f"{sentence}."]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
