"""What happened in a run, in sentences computed from its numbers."""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from prefopt.report.read import Run
from prefopt.report.score import is_number
from prefopt.report.statistics import number, percent
from prefopt.report.verdict import NEGLIGIBLE, Interval, Tone, end_margins, end_size, judgement, verdict


@dataclass(frozen=True)
class Summary:
    """The verdict in one line, its tone, and the sentences that support it."""

    tone: Tone
    verdict: str
    sentences: list[str]


def summarize(run: Run) -> Summary:
    """Whether the model learned, how much, and the evidence."""
    tone, found = verdict(run)
    sentences = [*_end(run), *_judged(run), *_margin(run), *_likelihoods(run), *_loss(run)]
    return Summary(tone, found, sentences)


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
        ends = end_margins(run)
        if low <= 0 and ends is not None and ends[0] - ends[1] > NEGLIGIBLE:
            sentences.append(
                "The rewards of the training rows separated, but sampled answers are not clearly better: check whether "
                "something other than the quality of the answer predicts the label, and whether the model was trained "
                "too far."
            )
    return sentences


def _margin(run: Run) -> list[str]:
    sentences = []
    margins, ends = run.finite("rewards/margins"), end_margins(run)
    if ends is not None:
        mean, deviation = ends
        side = "above" if mean >= 0 else "below"
        sentences.append(
            f"In the last {end_size(margins)} of {len(margins)} logs a desirable row's reward was on average "
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
