"""KTO with the parts of prospect theory that it left out, each one switchable and each one bounded.

KTO: arXiv:2402.01306. Value function and probability weighting: Tversky and Kahneman 1992; Prelec 1998.
Odds ratio: arXiv:2403.07691. Shift: arXiv:2404.04656. docs/losses.md has the table of the components.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt_kernels._checks import (
    check_baseline,
    check_between,
    check_choice,
    check_interval,
    check_lengths,
    check_logps,
    check_positive,
    check_rows,
    check_weight,
)
from prefopt_kernels.losses._odds import log_odds, log_odds_slope
from prefopt_kernels.losses._prospect import (
    WEIGHTINGS,
    curved,
    curved_slope,
    decision_weight,
    missed,
    missed_at_zero,
    missed_slope,
)
from prefopt_kernels.losses._rows import constant, per_token, signed, widened
from prefopt_kernels.losses.kto import kto_margin


class EnhancedKTOComponents(NamedTuple):
    """(B,) each, d loss / d logps in 1/nats, detached; the five sum to the row's whole gradient."""

    kto: Tensor  # KTO at z0: what is left with every component off
    shift: Tensor  # what moving the reference point adds
    value: Tensor  # what curvature and loss aversion add to that
    weighting: Tensor  # what win and decision weighting add to that
    odds: Tensor  # the odds term


def enhanced_kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    reference_point: Tensor | float,
    shift: Tensor | float = 0.0,
    shift_gate: Tensor | float = 0.0,
    shift_bound: float = 10.0,
    loss_aversion: float = 1.0,
    alpha: float = 1.0,
    kappa: float = 0.1,
    win_weighting: str | None = None,
    decision_weighting: str | None = None,
    decision_clip: tuple[float, float] = (0.5, 2.0),
    decision_mean: Tensor | float | None = None,
    odds_weight: float = 0.0,
    odds_baseline: Tensor | float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    main_bound: float | None = None,
    odds_bound: float | None = None,
) -> Tensor:
    r"""Enhanced KTO's loss, one value per row; every default is "off", and all off is ``kto_loss`` bit for bit.

    .. math::
        z &= (1 - g) \, z_0 + g \, \mathrm{clip}(\delta, \pm\delta_{\max}) / \beta \\
        u &= s \, \beta \, (\log\pi - \log\pi^{\mathrm{ref}} - z) \\
        a &= \mathrm{sign}(u) \, \tfrac{\kappa}{\alpha} [(1 + |u| / \kappa)^\alpha - 1] \\
        V &= (W(\sigma(a)) - W(\tfrac12)) \cdot (1 \text{ if } u \ge 0 \text{ else } \lambda) \\
        \ell &= w \, \omega \, [1 - W(\tfrac12) - V] + w_o \, \mathrm{softplus}(-s \, (o - b))

    with :math:`m = \log\pi / T`, log-odds :math:`o = m - \log(1 - e^m)`, and the decision weight
    :math:`\omega = \mathrm{clip}(W(e^m) / e^m)`, a constant to the gradient, divided by its mean.

    The gradient of the main term to ``logps`` is at most
    :math:`w \, \omega \, \beta \max(1, \lambda) \, h`, with h = 1/4, or .138 for the Tversky-Kahneman win
    weighting, or .173 for Prelec's; the decision weight is at most ``decision_clip[1] / decision_clip[0]``
    where this call divides by the mean. That of the odds term is at most
    :math:`w_o \max(1, e^{b}) / T` in a desirable row and :math:`w_o / ((1-p) \, T)` in another, p being
    the mean token probability :math:`e^m`, and never above :math:`10{,}001 \, w_o / T`; bound it with
    ``odds_bound``, for which :math:`2 w_o` is a good value.

    Args:
        logps: (B,) floating point, nats, summed over the completion's tokens. Policy.
        ref_logps: (B,) the same under the frozen reference model.
        labels: (B,) bool. True is desirable (s = 1).
        lengths: (B,) integers, tokens of the completion (T); 0 is taken as 1.
        beta: inverse temperature, 1/nats, finite and above 0.
        reference_point: z0 in nats, a number, a 0-dim tensor or (B,); a constant to the gradient.
        shift: :math:`\delta` in reward units (beta times nats), as ``reference_point``.
        shift_gate: g in [0, 1], a number or a 0-dim tensor. 0 leaves z0 alone, 1 is BCO's shift alone.
        shift_bound: largest size of the shift, reward units, above 0.
        loss_aversion: :math:`\lambda`, slope where u < 0, above 0. Outside the sigmoid on purpose.
        alpha: curvature in (0, 1]; 1 is none.
        kappa: reward units, above 0: the curvature sets in at this distance.
        win_weighting: W on the win probability: None, "tversky-kahneman" (.61) or "prelec" (.65).
        decision_weighting: W of the decision weight; None is :math:`\omega = 1`.
        decision_clip: (low, high), 0 < low <= high.
        decision_mean: what decision weights are divided by, above 0, a number or a 0-dim tensor; None is
            their mean over the rows given. To have mean 1 over a window of several calls, pass the mean of
            :func:`decision_weights` over the window.
        odds_weight: :math:`w_o`, 0 or above.
        odds_baseline: b in log-odds, as ``reference_point``.
        desirable_weight, undesirable_weight: w, finite, 0 or above. They multiply the main term.
        main_bound: None, or the largest |d main term / d logps|, 1/nats, weights included.
        odds_bound: None, or the largest |d odds term / d (logps / T)|. A bound scales the gradient of the
            rows above it and changes no value.

    Returns:
        (B,) fp32; fp64 inputs stay fp64. Finite, as is its gradient, for every finite input.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or range is wrong. Tensor values are not
        read; a NaN in a row stays a NaN in that row.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.enhanced_kto import enhanced_kto_loss
        >>> logps, ref_logps = torch.tensor([-10.0, -30.0]), torch.tensor([-20.0, -20.0])
        >>> labels, lengths = torch.tensor([True, True]), torch.tensor([5, 10])
        >>> arguments = {"beta": 0.1, "reference_point": 0.0}
        >>> enhanced_kto_loss(logps, ref_logps, labels, lengths, **arguments)  # KTO: u is 1 and -1
        tensor([0.2689, 0.7311])
        >>> enhanced_kto_loss(logps, ref_logps, labels, lengths, **arguments, loss_aversion=2.0)
        tensor([0.2689, 0.9621])
    """
    check_rows(logps, ref_logps, labels)
    check_lengths(logps, lengths=lengths)
    check_positive("beta", beta)
    check_baseline("reference_point", reference_point, logps)
    check_baseline("shift", shift, logps, unit="reward, beta * nats")
    if isinstance(shift_gate, Tensor):
        check_baseline("shift_gate", shift_gate, logps, per_row=False, unit="0 to 1")
    else:
        check_between("shift_gate", shift_gate, 0, 1)
    check_positive("shift_bound", shift_bound)
    check_positive("loss_aversion", loss_aversion)
    check_between("alpha", alpha, 0, 1, open_low=True)
    check_positive("kappa", kappa)
    check_choice("win_weighting", win_weighting, WEIGHTINGS, or_none=True)
    check_choice("decision_weighting", decision_weighting, WEIGHTINGS, or_none=True)
    check_interval("decision_clip", decision_clip)
    if isinstance(decision_mean, Tensor):
        check_baseline("decision_mean", decision_mean, logps, per_row=False, unit="weights")
    elif decision_mean is not None:
        check_positive("decision_mean", decision_mean)
    check_weight("odds_weight", odds_weight)
    check_baseline("odds_baseline", odds_baseline, logps, unit="log-odds")
    check_weight("desirable_weight", desirable_weight)
    check_weight("undesirable_weight", undesirable_weight)
    for name, bound in (("main_bound", main_bound), ("odds_bound", odds_bound)):
        if bound is not None:
            check_positive(name, bound)

    logps, ref_logps = widened(logps, ref_logps)
    mean_logps = per_token(logps, lengths)  # (B,)
    z = _moved(
        constant(reference_point, logps),
        constant(shift, logps),
        constant(shift_gate, logps),
        shift_bound,
        beta,
    )
    u = kto_margin(logps - ref_logps, labels, beta, z)
    a = u if alpha == 1 else curved(u, alpha, kappa)
    main = missed(a, win_weighting)
    if loss_aversion != 1:
        even = missed_at_zero(win_weighting)
        main = torch.where(u >= 0, main, even + loss_aversion * (main - even))
    ones = torch.ones_like(main)
    weights = torch.where(labels, desirable_weight * ones, undesirable_weight * ones)
    if decision_weighting is not None:
        omega = decision_weight(mean_logps, decision_weighting, decision_clip)
        mean = omega.nanmean() if decision_mean is None else constant(decision_mean, omega)
        weights = weights * (omega / mean)
    loss = weights * main
    if main_bound is not None:
        slope = weights * beta * missed_slope(a, win_weighting)
        if alpha != 1:
            slope = slope * curved_slope(u, alpha, kappa)
        slope = torch.where(u >= 0, slope, loss_aversion * slope)
        loss = _bounded(loss, slope, main_bound)
    if odds_weight > 0:
        ahead = signed(labels, log_odds(mean_logps) - constant(odds_baseline, logps))
        odds = -odds_weight * F.logsigmoid(ahead)
        if odds_bound is not None:
            slope = odds_weight * torch.sigmoid(-ahead) * log_odds_slope(mean_logps)
            odds = _bounded(odds, slope, odds_bound)
        loss = loss + odds
    return loss


def enhanced_kto_components(
    logps: Tensor, ref_logps: Tensor, labels: Tensor, lengths: Tensor, **settings
) -> EnhancedKTOComponents:
    r"""Which part of the loss pulls on a row, and how hard: d loss / d logps, split into five.

    The parts are switched on one after the other, in the order of the fields of
    :class:`EnhancedKTOComponents`, bounds in force throughout; each field is what its step adds. So the
    five sum to the gradient of :func:`enhanced_kto_loss` up to rounding, and a part that is off is 0.

    Args:
        logps, ref_logps, labels, lengths, settings: as :func:`enhanced_kto_loss`.

    Returns:
        :class:`EnhancedKTOComponents`, 1/nats, in the loss's dtype, detached.

    Raises:
        TypeError, ValueError: as :func:`enhanced_kto_loss`.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.enhanced_kto import enhanced_kto_components
        >>> parts = enhanced_kto_components(
        ...     torch.tensor([-20.0]), torch.tensor([-20.0]), torch.tensor([True]), torch.tensor([10]),
        ...     beta=0.1, reference_point=0.0, loss_aversion=2.0, odds_weight=0.5)
        >>> parts.kto, parts.value, parts.odds  # -beta/4; u = 0 is no loss; -odds_weight/T
        (tensor([-0.0250]), tensor([0.]), tensor([-0.0500]))
    """
    steps = {name: settings.pop(name) for names in _STEPS for name in names if name in settings}
    (wide,) = widened(logps)
    before, parts = torch.zeros_like(wide), []
    for names in _STEPS:
        settings |= {name: steps[name] for name in names if name in steps}
        with torch.enable_grad():
            leaf = wide.detach().requires_grad_()
            loss = enhanced_kto_loss(leaf, ref_logps, labels, lengths, **settings)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        parts.append(gradient - before)
        before = gradient
    return EnhancedKTOComponents(*parts)


# The settings that each field of EnhancedKTOComponents switches on; the others are always in force.
_STEPS = (
    (),
    ("shift_gate",),
    ("loss_aversion", "alpha"),
    ("win_weighting", "decision_weighting"),
    ("odds_weight",),
)


def decision_weights(
    logps: Tensor, lengths: Tensor, *, weighting: str, clip: tuple[float, float] = (0.5, 2.0)
) -> Tensor:
    r"""Decision weights before the division by their mean, for a mean over more rows than one call has.

    .. math:: \omega_i = \mathrm{clip}(W(c_i) / c_i), \qquad c_i = e^{\log\pi_i / T_i}

    Args:
        logps: (B,) floating point, nats, summed over the completion's tokens.
        lengths: (B,) integers, tokens; 0 is taken as 1.
        weighting: "tversky-kahneman" (.61) or "prelec" (.65).
        clip: (low, high), 0 < low <= high.

    Returns:
        (B,) fp32, detached; fp64 stays fp64.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or range is wrong.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.enhanced_kto import decision_weights
        >>> logps, lengths = torch.tensor([-0.5, -20.0]), torch.tensor([1, 10])
        >>> decision_weights(logps, lengths, weighting="tversky-kahneman")  # m is -.5 and -2
        tensor([0.7873, 1.5953])
    """
    check_logps("B", logps=logps)
    check_lengths(logps, lengths=lengths)
    if weighting is None:
        raise ValueError(f"weighting is None; expected one of {WEIGHTINGS}")
    check_choice("weighting", weighting, WEIGHTINGS, or_none=True)
    check_interval("clip", clip)
    (logps,) = widened(logps)
    return decision_weight(per_token(logps, lengths), weighting, clip)


def _moved(
    z0: Tensor | float,
    shift: Tensor | float,
    gate: Tensor | float,
    bound: float,
    beta: float,
) -> Tensor | float:
    """The reference point in nats: z0, moved towards the bounded shift as far as the gate is open."""
    if not isinstance(gate, Tensor) and gate == 0:
        return z0
    shift = shift.clamp(-bound, bound) if isinstance(shift, Tensor) else max(-bound, min(bound, shift))
    moved = (1 - gate) * z0 + gate * (shift / beta)
    # A closed gate keeps out a shift that is NaN, too.
    return torch.where(gate > 0, moved, z0) if isinstance(gate, Tensor) else moved


def _bounded(loss: Tensor, slope: Tensor, bound: float) -> Tensor:
    """``loss``, whose gradient is scaled down in the rows where ``slope``, its size, exceeds ``bound``."""
    scale = (bound / slope.detach().clamp(min=bound)).detach()  # (B,) in (0, 1]
    return loss.detach() + scale * (loss - loss.detach())
