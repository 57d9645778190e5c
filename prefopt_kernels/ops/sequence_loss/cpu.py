"""The C++ function of csrc/sequence_loss: allocates the outputs and calls it once a pass."""

import torch
from torch import Tensor

from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.sequence_loss.parameters import METHODS, WEIGHTINGS, Form, Parameters


def why_not(logp: Tensor) -> str | None:
    if logp.device.type != "cpu":
        return f"logp is on {logp.device}, the C++ function runs on the CPU"
    return _extension.why_not()


def forward(
    logp: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    lengths: Tensor | None,
    form: Form,
    parameters: Parameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B = ref_logps.shape[0]
    rows = [torch.empty(B) for _ in range(5)]  # losses, logps, log_ratios, rewards, slopes
    sums = torch.empty(8, dtype=torch.float64)
    _extension.ops().sequence_loss_forward(
        logp.contiguous(),
        cu_seqlens.long().contiguous(),
        ref_logps.contiguous(),
        labels.contiguous(),
        None if lengths is None else lengths.long().contiguous(),
        METHODS.index(form.method),
        0 if form.win_weighting is None else 1 + WEIGHTINGS.index(form.win_weighting),
        0 if form.decision_weighting is None else 1 + WEIGHTINGS.index(form.decision_weighting),
        [float(number) for number in parameters],  # a tensor is on the CPU, where reading is free
        *rows,
        sums,
    )
    losses, logps, log_ratios, rewards, slopes = rows
    return losses, logps, log_ratios, rewards, sums, slopes


def backward(dlosses: Tensor | None, dlogps: Tensor | None, cu_seqlens: Tensor, slopes: Tensor, tokens: int) -> Tensor:
    dlogp = torch.empty(tokens)
    _extension.ops().sequence_loss_backward(
        None if dlosses is None else dlosses.contiguous(),
        None if dlogps is None else dlogps.contiguous(),
        cu_seqlens.long().contiguous(),
        slopes,
        dlogp,
    )
    return dlogp
