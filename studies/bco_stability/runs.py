"""One cell of the grid: training of its seeds, and a verdict on each."""

import statistics
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from studies.bco_stability.components import (
    BETA,
    EMA,
    SHARES,
    Running,
    Window,
    coefficients,
    pair_means,
    rewards,
    schedule_of,
    shares,
)
from studies.bco_stability.grid import Config
from studies.bco_stability.policy import Reference, new_adapters, preference, score, sequence_logps

BATCH = 16  # rows of one optimizer step: 8 micro-batches of 2
NOISE = 0.15  # share of labels that are wrong
WARMUP, CLIP_NORM = 0.05, 1.0  # of the steps; of the gradient's norm
TRACE_EVERY = 5  # steps

# Instability, as the study defines it.
SPIKE = 20.0  # times the running median of the norms
MEDIAN_OF, FIRST_JUDGED = 50, 20  # norms in the running median; norms before one is judged
SMOOTHED, COLLAPSED = 30, 0.2  # steps over which a margin is averaged; share of its peak that is a collapse


class Verdict(NamedTuple):
    """Outcome of a run, its step, and the largest ratio of a norm to the running median."""

    outcome: str  # "stable", "not finite", "spike" or "collapse"
    step: int | None
    largest_ratio: float


@dataclass
class Outcome:
    """The rows of one cell, and its traces: medians over the seeds that have not failed."""

    rows: list[dict]
    trace: dict[str, list[float]] | None


def judge(norms: list[float], margins: list[float], failed_at: int | None) -> Verdict:
    """Whether a run was stable.

    In this order: *not finite*, a coefficient or a gradient was NaN or infinite; *spike*, a gradient norm above
    20 times the median of the (up to) 50 norms before it, from the 20th step on; *collapse*, the margin of
    rewards, averaged over 30 steps, ends at or below 0 or below a fifth of its highest value.

    Args:
        norms: before clipping, one a step, up to the failure.
        margins: mean reward of desirable rows less that of undesirable ones, one a step.
        failed_at: step of the first value that is not finite; None if there was none.

    Example:
        >>> judge([1.0] * 60, [0.01 * i for i in range(60)], None)
        Verdict(outcome='stable', step=None, largest_ratio=1.0)
        >>> judge([1.0] * 50 + [25.0] + [1.0] * 9, [0.01 * i for i in range(60)], None)
        Verdict(outcome='spike', step=50, largest_ratio=25.0)
    """
    ratios = [
        norm / max(statistics.median(norms[max(0, t - MEDIAN_OF) : t]), 1e-12)
        for t, norm in enumerate(norms)
        if t >= FIRST_JUDGED
    ]
    largest = max(ratios, default=0.0)
    if failed_at is not None:
        return Verdict("not finite", failed_at, largest)
    if largest > SPIKE:
        first = next(t for t, ratio in enumerate(ratios, FIRST_JUDGED) if ratio > SPIKE)
        return Verdict("spike", first, largest)
    width = min(SMOOTHED, len(margins))
    smooth = [sum(margins[t - width : t]) / width for t in range(width, len(margins) + 1)]
    if smooth[-1] <= 0 or smooth[-1] < COLLAPSED * max(smooth):
        return Verdict("collapse", len(margins) - 1, largest)
    return Verdict("stable", None, largest)


def run_cell(reference: Reference, config: Config, seeds: list[int], steps: int, traced: bool = False) -> Outcome:
    """Train one policy per seed and judge each.

    AdamW without weight decay, linear warm-up and decay, gradient clipped to norm 1: common trainer defaults. One
    optimizer step is a window of 8 micro-batches of 2 rows. The policy is constant within it, so the 16 rows are
    computed at once; only micro-batch statistics are computed separately.

    Args:
        reference: of :func:`studies.bco_stability.policy.make_reference`.
        config: the cell.
        seeds: each decides an adapter's start, the order of the rows and which labels are wrong.
        steps: optimizer steps.
        traced: whether to keep traces.

    Returns:
        A row for each seed, in order: its configuration, verdict, and accuracy and margin on held-out pairs.
    """
    run = _Run(reference, config, seeds, steps)
    for step in range(steps):
        if not run.alive.any():
            break
        run.step(step, traced and step % TRACE_EVERY == 0)
    accuracy, margin = preference(reference, run.adapters, BETA)
    norms, margins = (torch.stack(one, 1).tolist() for one in (run.norms, run.margins))
    rows = []
    for i, seed in enumerate(seeds):
        failed = run.failed_at[i]
        verdict = judge(norms[i][:failed], margins[i][:failed], failed)
        rows.append(
            config.fields()
            | {
                "seed": seed,
                "steps": steps,
                "outcome": verdict.outcome,
                "at": verdict.step,
                "ratio": round(verdict.largest_ratio, 2),
                "accuracy": round(float(accuracy[i]), 4),
                "margin": round(float(margin[i]), 4),
            }
        )
    return Outcome(rows, run.trace if traced else None)


class _Run:
    """The state of S runs: adapters, optimizer, statistics."""

    def __init__(self, reference: Reference, config: Config, seeds: list[int], steps: int):
        self.reference, self.config, self.steps = reference, config, steps
        self.order, self.labels, self.mismatched = _rows_of(reference, tuple(seeds), steps)
        self.adapters = new_adapters(seeds).requires_grad_()
        self.first, self.second = torch.zeros_like(self.adapters), torch.zeros_like(self.adapters)
        self.shift, self.schedule = _estimator(config, len(seeds)), schedule_of(config, steps)
        self.alive = torch.ones(len(seeds), dtype=torch.bool)
        self.failed_at: list[int | None] = [None] * len(seeds)
        self.norms: list[Tensor] = []
        self.margins: list[Tensor] = []
        self.trace: dict[str, list[float]] = {
            name: [] for name in ("step", "chosen", "rejected", "shift", "z0", *map(share_name, SHARES))
        }

    def step(self, step: int, traced: bool) -> None:
        config, rows = self.config, self.reference.rows
        now = slice(step * BATCH, (step + 1) * BATCH)
        at = self.order[:, now]
        prompts, answers, lengths = rows.prompts[at], rows.answers[at], rows.lengths[at]
        ref_logps, labels = rows.ref_logps[at], self.labels[:, now]
        gate = 0.0
        if self.schedule is not None:
            self.schedule.update(step)
            gate = self.schedule.gate()
        z0 = torch.zeros_like(ref_logps)
        if gate < 1 or traced:
            z0 = self._z0(prompts, answers, lengths, self.mismatched[:, now])
        logps = sequence_logps(self.reference.base, self.adapters, prompts, answers, lengths)
        seen = rewards(config, logps, ref_logps)
        window = Window(logps.detach(), ref_logps, labels, lengths, z0, self.shift.next(seen, labels), gate)
        pull = coefficients(config, window)
        finite = pull.isfinite().all(1)
        used = torch.where((finite & self.alive)[:, None], pull, 0.0) / BATCH
        (gradient,) = torch.autograd.grad((used * logps).sum(), self.adapters)
        norm = gradient.double().square().sum(1).sqrt().float()
        finite &= norm.isfinite()
        for i in (self.alive & ~finite).nonzero()[:, 0].tolist():
            self.failed_at[i] = step
        self.alive &= finite
        self.norms.append(norm)
        self.margins.append(_class_mean(seen, labels) - _class_mean(seen, ~labels))
        if traced:
            self._keep_trace(step, window, seen)
        self._update(step, gradient, norm)

    def _z0(self, prompts: Tensor, answers: Tensor, lengths: Tensor, ref_logps: Tensor) -> Tensor:
        """KTO's reference point from mismatched answers: naive per micro-batch, ours per window."""
        swapped = torch.arange(BATCH) ^ 1
        with torch.no_grad():
            rows = (prompts, answers[:, swapped], lengths[:, swapped])
            logps = sequence_logps(self.reference.base, self.adapters, *rows)
        log_ratios = logps - ref_logps
        if self.config.form == "ours":
            return log_ratios.mean(1, keepdim=True).clamp(min=0).expand_as(log_ratios)
        return pair_means(log_ratios).clamp(min=0)

    def _update(self, step: int, gradient: Tensor, norm: Tensor) -> None:
        """AdamW with betas .9 and .999, for the seeds that are alive."""
        warmup = min(1.0, (step + 1) / max(1.0, WARMUP * self.steps))
        rate = self.config.learning_rate * warmup * (1 - step / self.steps)
        scale = (CLIP_NORM / (norm + 1e-6)).clamp(max=1.0)
        gradient = torch.where(self.alive[:, None], gradient * scale[:, None], 0.0)
        with torch.no_grad():
            self.first.lerp_(gradient, 0.1)
            self.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            root = (self.second / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
            change = rate * (self.first / (1 - 0.9 ** (step + 1))) / root
            self.adapters -= torch.where(self.alive[:, None], change, 0.0)

    def _keep_trace(self, step: int, window: Window, seen: Tensor) -> None:
        values = {
            "chosen": _class_mean(seen, window.labels),
            "rejected": _class_mean(seen, ~window.labels),
            "shift": window.shift.mean(1),
            "z0": BETA * window.z0.mean(1),
        }
        values |= {share_name(one): x for one, x in shares(self.config, window).items()}
        self.trace["step"].append(step)
        for name, value in values.items():
            self.trace[name].append(round(float(value[self.alive].nanmedian()), 4))


def share_name(component: str) -> str:
    """The key of a component's gradient share in a trace."""
    return f"share of {component}"


def _estimator(config: Config, seeds: int) -> "Running | EMA":
    ours = config.form == "ours" and "running mean" not in config.changes
    if ours or "EMA window" in config.changes:
        return EMA(seeds)
    return Running(seeds, unit=1 / BETA if "shift in nats" in config.changes else 1.0)


@lru_cache(maxsize=8)
def _rows_of(reference: Reference, seeds: tuple[int, ...], steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each seed's order of rows, noisy labels, and reference log-probabilities of the mismatched answers."""
    n, used = len(reference.rows.good), steps * BATCH
    orders, labels = [], []
    for seed in seeds:
        rng = torch.Generator().manual_seed(1000 + seed)
        order = torch.randperm(n, generator=rng)[:used]
        wrong = torch.rand(used, generator=rng) < NOISE
        orders.append(order)
        labels.append(reference.rows.good[order] ^ wrong)
    order = torch.stack(orders)
    swapped = torch.arange(used) ^ 1
    rows = reference.rows
    exchanged = (rows.prompts[order], rows.answers[order][:, swapped], rows.lengths[order][:, swapped])
    mismatched = score(reference.base, None, *exchanged)
    return order, torch.stack(labels), mismatched


def _class_mean(values: Tensor, of: Tensor) -> Tensor:
    """(S,) mean over the rows of one class; 0 without such rows."""
    return torch.where(of, values, 0.0).sum(1) / of.sum(1).clamp(min=1)
