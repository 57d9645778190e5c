"""The losses of the study as coefficients, d loss / d logps: the naive textbook form, and ours.

The naive form composes the components as the literature defines them, 1 - w(sigmoid(v(u))) plus the odds ratio, in the
dtype of the log-probabilities. Each remedy replaces one part. Ours is :func:`prefopt_kernels.enhanced_kto_loss`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt_kernels.losses import enhanced_kto_loss
from prefopt_kernels.losses._odds import log_odds
from prefopt_kernels.losses._prospect import TVERSKY_KAHNEMAN, curved, missed, missed_at_zero
from prefopt_kernels.reference_point import EMAShift, ShiftSchedule
from studies.bco_stability.grid import COMPONENTS, Config

BETA = 0.1
LOSS_AVERSION, ALPHA, KAPPA, GAMMA = 2.25, 0.88, 0.1, 0.61
GUARD = 1e-8  # usually added before the power
ODDS_WEIGHT = 0.1
SHIFT_BOUND = 0.5  # reward units
MAIN_BOUND, ODDS_BOUND = BETA / 4, 2 * ODDS_WEIGHT  # of the coefficients: KTO's own, and per token
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GATE_AT, RAMP = 0.3, 0.1  # shares of the steps: start of the staged shift, length of its ramp
DECAY = 0.9  # of our shift's average
# The order in which gradient shares are told apart; as in prefopt_kernels.losses.enhanced_kto.
SHARES = ("kto", "shift", "value", "weighting", "odds")


class Window:
    """One optimizer step of S seeds: (S, B) rows, and the inputs of the reference point."""

    def __init__(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        labels: Tensor,
        lengths: Tensor,
        z0: Tensor,
        shift: Tensor,
        gate: float,
    ):
        """``z0`` (S, B) nats and ``shift`` (S, B) reward units, detached; ``gate`` from 0 to 1."""
        self.logps, self.ref_logps, self.labels, self.lengths = logps, ref_logps, labels, lengths
        self.z0, self.shift, self.gate = z0, shift, gate


def coefficients(config: Config, window: Window) -> Tensor:
    """d (sum of the rows' losses) / d logps.

    Returns:
        (S, B) fp32, 1/nats; NaN or infinite where the form is.
    """
    leaf = window.logps.detach().clone().requires_grad_()
    terms = (_naive_terms if config.form == "naive" else _our_terms)(config, window, leaf)
    parts = [torch.autograd.grad(term.sum(), leaf, retain_graph=True)[0] for term in terms]
    if config.form == "naive" and "component clip" in config.changes:
        bounds = (torch.full_like(leaf, MAIN_BOUND), ODDS_BOUND / window.lengths)
        parts = [_clipped(part, bound) for part, bound in zip(parts, bounds, strict=False)]
    return torch.stack(parts).sum(0)


def shares(config: Config, window: Window) -> dict[str, Tensor]:
    """Contribution of each component to the gradient, with the components switched on one after another.

    Returns:
        name of :data:`SHARES` -> (S,) share of the sum of the absolute coefficients.
    """
    parts, before, on = [], torch.zeros_like(window.logps), set()
    for name in SHARES:
        on.add(name)
        components = tuple(one for one in COMPONENTS if one in on and one in config.components)
        stripped = Config(config.form, components, config.precision, config.learning_rate, config.changes)
        now = coefficients(stripped, window).nan_to_num(0.0, 0.0, 0.0)
        parts.append((now - before).abs().sum(1))
        before = now
    whole = torch.stack(parts).sum(0).clamp(min=1e-30)
    return {name: part / whole for name, part in zip(SHARES, parts, strict=True)}


def rewards(config: Config, logps: Tensor, ref_logps: Tensor) -> Tensor:
    """beta times the log-ratio with the form's rounding, in reward units: (S, B) fp32, detached."""
    dtype = DTYPES[config.precision]
    low = logps.detach().to(dtype), ref_logps.to(dtype)
    if config.form == "ours":  # converted to fp32 first
        return BETA * (low[0].float() - low[1].float())
    return (BETA * (low[0] - low[1])).float()


def _our_terms(config: Config, window: Window, leaf: Tensor) -> list[Tensor]:
    on, changes = set(config.components), set(config.changes)
    settings: dict = {"beta": BETA}
    if "value" in on:
        aversion = 1.5 if "loss aversion 1.5" in changes else LOSS_AVERSION
        settings |= {"loss_aversion": aversion, "alpha": ALPHA, "kappa": KAPPA}
    if "weighting" in on:
        kind = "win_weighting" if "win weighting" in changes else "decision_weighting"
        settings[kind] = TVERSKY_KAHNEMAN
    if "odds" in on:
        settings["odds_weight"] = ODDS_WEIGHT
    if "shift" in on:  # as in the trainer, with bounds on the coefficients
        bound = 1e9 if "no shift bound" in changes else SHIFT_BOUND
        settings |= {"shift_gate": window.gate, "shift_bound": bound}
        if "no component bounds" not in changes:
            settings |= {"main_bound": MAIN_BOUND, "odds_bound": ODDS_BOUND}
    dtype = DTYPES[config.precision]

    def loss(logps, ref_logps, labels, lengths, z0, shift):
        return enhanced_kto_loss(logps, ref_logps, labels, lengths, reference_point=z0, shift=shift, **settings)

    # vmap over seeds: decision weights are normalised to mean 1 within a seed's window.
    rows = (window.ref_logps.to(dtype), window.labels, window.lengths, window.z0, window.shift)
    return [torch.vmap(loss)(leaf.to(dtype), *rows)]


def _naive_terms(config: Config, window: Window, leaf: Tensor) -> list[Tensor]:
    """The main term and the optional odds term, (S, B) each, in the dtype of the configuration."""
    dtype, on, changes = DTYPES[config.precision], set(config.components), set(config.changes)
    logps, ref_logps = leaf.to(dtype), window.ref_logps.to(dtype)
    reward = BETA * (logps - ref_logps)
    point = BETA * window.z0
    if "shift" in on:
        shift = window.shift
        if "bounded shift" in changes:
            shift = shift.clamp(-SHIFT_BOUND, SHIFT_BOUND)
        if "shift not detached" in changes:
            shift = pair_means(reward)
        point = (1 - window.gate) * point + window.gate * shift
    sign = torch.where(window.labels, 1.0, -1.0).to(dtype)
    u = sign * (reward - point.to(dtype))
    terms = [_naive_main(u, on, changes)]
    if "odds" in on:
        m = logps / window.lengths
        odds = log_odds(m) if "safe odds" in changes else m - torch.log1p(-torch.exp(m))
        terms.append(-ODDS_WEIGHT * F.logsigmoid(sign * odds))
    return terms


def _naive_main(u: Tensor, on: set[str], changes: set[str]) -> Tensor:
    """1 - w(sigmoid(v(u))), or with the value bounded and loss aversion outside."""
    if "value" in on and "bounded value" in changes:
        loss = _weighted_loss(curved(u, ALPHA, KAPPA), on, changes)
        even = missed_at_zero(TVERSKY_KAHNEMAN if "weighting" in on else None)
        return torch.where(u >= 0, loss, even + LOSS_AVERSION * (loss - even))
    return _weighted_loss(_power(u) if "value" in on else u, on, changes)


def _power(u: Tensor) -> Tensor:
    """Tversky and Kahneman's value function: u^.88 for gains, -2.25 |u|^.88 for losses."""
    gains = (u.clamp(min=0) + GUARD) ** ALPHA
    losses = -LOSS_AVERSION * ((-u).clamp(min=0) + GUARD) ** ALPHA
    return torch.where(u >= 0, gains, losses)


def _weighted_loss(a: Tensor, on: set[str], changes: set[str]) -> Tensor:
    """1 - w(sigmoid(a))."""
    if "weighting" not in on:
        return 1 - torch.sigmoid(a)
    if "safe weighting" in changes:
        return missed(a, TVERSKY_KAHNEMAN)
    p = torch.sigmoid(a)
    return 1 - p**GAMMA / (p**GAMMA + (1 - p) ** GAMMA) ** (1 / GAMMA)


def _clipped(part: Tensor, bound: Tensor) -> Tensor:
    """Coefficients clamped to their bound; NaN becomes 0."""
    return torch.nan_to_num(part, 0.0, float("inf"), float("-inf")).clamp(-bound, bound)


def pair_means(values: Tensor) -> Tensor:
    """(S, B) mean of each micro-batch of two rows, repeated for both rows."""
    return values.unflatten(1, (-1, 2)).mean(-1).repeat_interleave(2, 1)


# The shift of S runs side by side, and its schedule


def schedule_of(config: Config, steps: int) -> ShiftSchedule | None:
    """The schedule on which the shift replaces KTO's reference point; None if the shift is off."""
    if "shift" not in config.components:
        return None
    staged = "no staging" not in config.changes if config.form == "ours" else "staging" in config.changes
    if not staged:
        return ShiftSchedule(start_step=0)
    return ShiftSchedule(start_step=round(GATE_AT * steps), ramp_steps=round(RAMP * steps))


class Running:
    """The textbook shift: the running mean of all rewards, updated by each micro-batch before use.

    Args:
        seeds: S.
        unit: factor of the rewards; 1 / beta reproduces the mistake of a mean in nats.
    """

    def __init__(self, seeds: int, unit: float = 1.0):
        self.total, self.count, self.unit = torch.zeros(seeds, 1), 0, unit

    def next(self, rewards: Tensor, labels: Tensor) -> Tensor:
        """(S, B) shift of each row, from the window's (S, B) rewards."""
        means = self.unit * pair_means(rewards)  # each of a pair's two rows
        counts = self.count + 2 * (torch.arange(means.shape[1]) // 2 + 1)
        totals = self.total + means.cumsum(1)
        totals[:, ::2] = totals[:, 1::2]  # both rows of a micro-batch see all of it
        self.total, self.count = totals[:, -1:], int(counts[-1])
        return totals / counts


class EMA:
    """Our shift: one :class:`prefopt_kernels.reference_point.EMAShift` per seed, updated once per window before use."""

    def __init__(self, seeds: int):
        self.shifts = [EMAShift(decay=DECAY) for _ in range(seeds)]

    def next(self, rewards: Tensor, labels: Tensor) -> Tensor:
        """(S, B) shift of each row, constant within a window."""
        windows = zip(self.shifts, rewards, labels, strict=True)
        now = torch.stack([shift.estimate(*window) for shift, *window in windows])
        return now[:, None].expand_as(rewards)
