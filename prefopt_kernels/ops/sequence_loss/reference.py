"""The definition of sequence_loss in plain torch: fp64 sums, prefopt_kernels.losses, torch's autograd."""

import math
from typing import Any

import torch
from torch import Tensor

from prefopt_kernels.losses import apo_zero_loss, bco_loss, enhanced_kto_loss, kto_loss
from prefopt_kernels.ops.sequence_loss.checks import check_values
from prefopt_kernels.ops.sequence_loss.parameters import Form, Parameters


def why_not(logp: Tensor) -> str | None:
    return None


def forward(
    logp: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    lengths: Tensor | None,
    form: Form,
    parameters: Parameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``losses``, ``logps``, ``log_ratios``, ``rewards`` and ``sums``, as op.py describes them."""
    if logp.device.type == "cpu" and not torch.compiler.is_compiling():
        check_values(cu_seqlens, lengths, logp.shape[0])
    offsets = cu_seqlens.long().clamp(0, logp.shape[0])  # a wrong one must not read past the end
    # unsafe=True leaves out torch's own check, which would read the offsets back to the host.
    sums = torch.segment_reduce(logp.double(), "sum", offsets=offsets, initial=0.0, unsafe=True)
    logps, ref_logps = sums.float(), ref_logps.detach()  # (B,)
    lengths = offsets.diff() if lengths is None else lengths
    losses = loss(logps, ref_logps, labels, lengths, form, parameters)
    log_ratios = logps.detach() - ref_logps
    rewards = parameters.beta * log_ratios
    each = torch.stack([torch.ones_like(rewards), rewards, logps.detach(), losses.detach()])
    by_class = [torch.where(side, each.double(), 0.0).sum(1) for side in (labels, ~labels)]
    return losses, logps, log_ratios, rewards, torch.cat(by_class)


def loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    lengths: Tensor,
    form: Form,
    parameters: Parameters,
) -> Tensor:
    """(B,) the loss that ``form`` names, by the one copy of its mathematics."""
    p = parameters
    rows: dict[str, Any] = {"logps": logps, "ref_logps": ref_logps, "labels": labels, "beta": p.beta}
    weights: dict[str, Any] = {"desirable_weight": p.desirable_weight, "undesirable_weight": p.undesirable_weight}
    if form.method == "kto":
        return kto_loss(**rows, reference_point=p.reference_point, **weights)
    if form.method == "apo_zero":
        return apo_zero_loss(**rows, **weights)
    if form.method == "bco":
        return bco_loss(**rows, shift=p.shift)
    own_mean = not isinstance(p.decision_mean, Tensor) and p.decision_mean == 0
    return enhanced_kto_loss(
        **rows,
        lengths=lengths,
        reference_point=p.reference_point,
        shift=p.shift,
        shift_gate=p.shift_gate,
        shift_bound=p.shift_bound,
        loss_aversion=p.loss_aversion,
        alpha=p.alpha,
        kappa=p.kappa,
        win_weighting=form.win_weighting,
        decision_weighting=form.decision_weighting,
        decision_clip=(p.decision_low, p.decision_high),
        decision_mean=None if own_mean else p.decision_mean,
        odds_weight=p.odds_weight,
        odds_baseline=p.odds_baseline,
        main_bound=None if math.isinf(p.main_bound) else p.main_bound,
        odds_bound=None if math.isinf(p.odds_bound) else p.odds_bound,
        **weights,
    )
