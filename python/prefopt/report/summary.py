"""What happened in a run, in sentences computed from its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from prefopt.report.read import Run
from prefopt.report.score import is_number
from prefopt.report.statistics import paired_difference, wilson

NEGLIGIBLE = 0.01  # reward units; a margin this small moves KTO's loss by about a thousandth
FEWEST_LOGS = 4

Tone = Literal["good", "bad", "unclear"]
Interval = tuple[float, float, float]  # value, lower and upper end of its 95 % interval


@dataclass(frozen=True)
class Judgement:
    """Shares of desirable answers before and after, and their difference if both are known for each answer."""

    before: Interval
    after: Interval
    difference: Interval | None
    n: int


@dataclass(frozen=True)
class Summary:
    """The verdict in one line, its tone, and the sentences that support it."""

    tone: Tone
    verdict: str
    sentences: list[str]


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


def summarize(run: Run) -> Summary:
    """Whether the model learned, how much, and the evidence."""
    tone, verdict = _verdict(run)
    sentences = [*_end(run), *_judged(run), *_margin(run), *_likelihoods(run), *_loss(run)]
    return Summary(tone, verdict, sentences)


def closing_lines(run: Run) -> list[str]:
    """The last lines on the terminal: figures on held-out rows, the verdict and the warnings."""
    names = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy", "kl": "kl"}
    found = {name: run.last(f"eval_{key}") for key, name in names.items()}
    numbers = [f"{name} {number(value)}" for name, value in found.items() if value is not None]
    lines = [f"held-out rows: {', '.join([*numbers, *_held_out_count(run)])}"] if numbers else []
    findings = run.record.get("diagnostics")
    warnings = [f"warning: {describe_finding(one)}" for one in findings] if isinstance(findings, list) else []
    return [*lines, f"verdict: {summarize(run).verdict}", *warnings]


def describe_finding(finding: Any) -> str:
    """A finding of the trainer's checks as one text: step, reason and remedy."""
    if not isinstance(finding, dict):
        return str(finding)
    step = f"Step {finding['step']}: " if finding.get("step") else ""
    sentences = [str(finding[key]).rstrip(".") for key in ("reason", "remedy") if finding.get(key)]
    return step + ". ".join(sentences or [str(finding.get("name", finding))]) + "."


def percent(share: float) -> str:
    """A share with one digit after the point, or three if it would round to 0 or 100 % but is neither.

    Example:
        >>> percent(0.417), percent(1.0), percent(0.00038)
        ('41.7 %', '100.0 %', '0.038 %')
    """
    digits = 3 if 0 < min(share, 1 - share) < 0.0005 else 1
    return f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """Four digits after the point below 1, three significant digits otherwise."""
    return f"{value:.4f}" if 0.0001 <= abs(value) < 1 else f"{value:,.3g}" if value else "0"


def _verdict(run: Run) -> tuple[Tone, str]:
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
    if abs(mean) < NEGLIGIBLE:
        return "bad", f"The model learned next to nothing: the reward margin ended at {number(mean)}."
    if mean > deviation:
        held_out = run.last("eval_rewards/margins")
        if held_out is None or held_out >= NEGLIGIBLE:
            return "good", "The model learned to prefer desirable answers to undesirable ones."
        return "bad", (
            "The model separates desirable from undesirable answers on the training rows, but not on the held-out "
            f"rows, where the margin is {number(held_out)}."
        )
    if mean < -deviation:
        return "bad", "The model learned the opposite: undesirable answers have the higher rewards."
    return "unclear", "It is not clear that the model learned: the margin is smaller than it varies from log to log."


def _by_loss(run: Run) -> tuple[Tone, str]:
    """The verdict on a run without margins, such as sft's, from its loss."""
    losses = run.finite("loss")
    quarter = len(losses) // 4
    if quarter < 2 or run.finite("rewards/margins"):
        return "unclear", "Too little was logged to say whether the model learned."
    first, last = fmean(losses[:quarter]), fmean(losses[-quarter:])
    if first - last > max(stdev(losses[:quarter]), stdev(losses[-quarter:])):
        return (
            "good",
            f"The model learned from its training rows: the loss fell from {number(first)} to {number(last)}.",
        )
    if last >= first:
        return "bad", f"The model learned nothing: the loss did not fall ({number(first)} to {number(last)})."
    return "unclear", "It is not clear that the model learned: the loss fell by less than it varies."


def _end(run: Run) -> list[str]:
    status = run.record.get("status")
    if status == "stopped":
        return [f"Training stopped before its end: {run.record.get('stopped_by') or 'an unknown cause'}."]
    return ["Training had not ended when this report was written."] if status == "running" else []


def _judged(run: Run) -> list[str]:
    judged, metric = judgement(run), run.summary.get("metric")
    if judged is None:
        before, after, n = (run.summary.get(key) for key in ("before", "after", "n"))
        if not (isinstance(metric, str) and is_number(before) and is_number(after)):
            return []
        rows = f" ({n:,} rows)" if is_number(n) else ""
        return [f"{_capital(metric)}: {number(before)} before, {number(after)} after{rows}."]

    def with_interval(interval: Interval, when: str) -> str:
        share, low, high = map(percent, interval)
        return f"{share} {when} ({low} to {high})"

    sentences = [
        f"{_capital(metric if isinstance(metric, str) else 'share of desirable answers')}: "
        f"{with_interval(judged.before, 'before')} and {with_interval(judged.after, 'after')}, n = {judged.n}; "
        "in brackets the 95 % intervals."
    ]
    if judged.difference is not None:
        change, low, high = (100 * value for value in judged.difference)
        sentences.append(
            f"That is a change of {change:+.1f} points, with a 95 % interval from {low:+.1f} to {high:+.1f}."
        )
        ends = _end_margins(run)
        if low <= 0 and ends is not None and ends[0] - ends[1] > NEGLIGIBLE:
            sentences.append(
                "The rewards of the training rows separated, but sampled answers are not clearly better: check whether "
                "something other than the quality of the answer predicts the label, and whether the model was trained "
                "too far."
            )
    return sentences


def _end_margins(run: Run) -> tuple[float, float] | None:
    """Mean margin over the last quarter of the logs (at least four) and its standard deviation; None if fewer.

    Successive logs are correlated, so their spread gives no interval for the mean.
    """
    margins = run.finite("rewards/margins")
    last = margins[-_end_size(margins) :]
    return (fmean(last), stdev(last)) if len(last) >= FEWEST_LOGS else None


def _end_size(logs: Sequence[float]) -> int:
    return max(FEWEST_LOGS, len(logs) // 4)


def _margin(run: Run) -> list[str]:
    sentences = []
    margins, ends = run.finite("rewards/margins"), _end_margins(run)
    if ends is not None:
        mean, deviation = ends
        side = "above" if mean >= 0 else "below"
        sentences.append(
            f"In the last {_end_size(margins)} of {len(margins)} logs a desirable row's reward was on average "
            f"{number(abs(mean))} {side} an undesirable one's; from log to log the margin varied with a standard "
            f"deviation of {number(deviation)}."
        )
    held_out = run.last("eval_rewards/margins")
    if held_out is not None:
        count = ", ".join([number(held_out), *_held_out_count(run)])
        sentences.append(f"On held-out rows, the margin ended at {count}.")
    return sentences


def _held_out_count(run: Run) -> list[str]:
    """``n = 118`` rows or pairs of the evaluation; empty if unknown."""
    data = run.record.get("data")
    counts = data.get("eval") if isinstance(data, dict) else None
    n = counts.get("rows") if isinstance(counts, dict) else None
    return [f"n = {n:,}"] if is_number(n) else []


def _likelihoods(run: Run) -> list[str]:
    if run.record.get("reference", {}).get("kind") == "none":
        return []  # without a reference model, rewards are log-probabilities and always negative
    chosen = run.last("rewards/chosen")
    if chosen is None or chosen >= -NEGLIGIBLE:
        return []
    return [
        "In the last log desirable answers, too, were less likely than under the reference model: the margin comes "
        "from undesirable answers becoming even less likely."
    ]


def _loss(run: Run) -> list[str]:
    losses = run.finite("loss")
    if len(losses) < 2:
        return []
    quarter = max(1, len(losses) // 4)
    first, last = fmean(losses[:quarter]), fmean(losses[-quarter:])
    span = "log" if quarter == 1 else f"{quarter} logs"
    kl = run.last("kl")
    end = "" if kl is None else f"; KTO's reference point ended at {number(kl)} nats"
    return [f"The loss went from {number(first)} (first {span}) to {number(last)} (last {span}){end}."]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
