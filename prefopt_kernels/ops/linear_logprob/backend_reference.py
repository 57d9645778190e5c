"""The definition of linear_logprob in plain torch, chunked over tokens. Every kernel is tested against it."""

import torch
from torch import Tensor

from prefopt_kernels.ops.linear_logprob.transform import Transform, logit_gradient

CHUNK_BYTES = 64 * 2**20  # one fp32 (tokens, V) tensor of a chunk; a few of them live at a time


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    return None


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: Transform,
    want: dict[str, bool],
    unit_gradient: bool,
) -> dict[str, Tensor]:
    """Fill ``logp``, ``lse``, the wanted outputs and, if asked, ``unit`` = d logp / d hidden, row by row."""
    T, H = hidden.shape
    out = {
        name: hidden.new_zeros(T, dtype=torch.float32)
        for name in ("logp", "lse", *want)
        if want.get(name, True)
    }
    if want["is_top1"]:
        out["is_top1"] = out["is_top1"].bool()
    if unit_gradient:
        out["unit"] = hidden.new_zeros(T, H)
    weight = weight.float()  # (V, H)
    for rows in _chunks(targets, weight.shape[0]):
        target = targets[rows, None].long()  # (C, 1)
        z, slope = transform.apply(_raw_logits(hidden[rows], weight, bias))  # (C, V)
        lse = z.logsumexp(-1)
        z_target = z.gather(-1, target).squeeze(-1)
        out["lse"][rows] = lse
        out["logp"][rows] = z_target - lse
        if want["mean_logit"]:
            out["mean_logit"][rows] = z.mean(-1)
        if want["is_top1"]:
            out["is_top1"][rows] = z_target >= z.amax(-1)
        log_p = z - lse[:, None]
        if want["entropy"]:
            out["entropy"][rows] = torch.special.entr(log_p.exp()).sum(-1)  # 0 where p is 0
        if unit_gradient:
            dz = -log_p.exp()
            dz.scatter_add_(-1, target, torch.ones_like(z_target)[:, None])
            out["unit"][rows] = ((dz * slope) @ weight).to(hidden.dtype)
    return out


def backward(
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    transform: Transform,
    need: dict[str, bool],
) -> dict[str, Tensor]:
    """Gradients of ``sum(dlogp * logp + dlse * lse + dentropy * entropy)`` for the wanted operands; fp32 sums."""
    grads = {
        name: torch.zeros_like(operand, dtype=torch.float32, memory_format=torch.contiguous_format)
        for name, operand in (("hidden", hidden), ("weight", weight), ("bias", bias))
        if need[name]
    }
    dtype, weight = weight.dtype, weight.float()
    for rows in _chunks(targets, weight.shape[0]):
        z, slope = transform.apply(_raw_logits(hidden[rows], weight, bias))  # (C, V)
        dz = logit_gradient(
            z,
            targets[rows].long(),
            lse[rows],
            *(None if grad is None else grad[rows] for grad in (dlogp, dlse, dentropy, entropy)),
        )
        dz *= slope
        if need["hidden"]:
            grads["hidden"][rows] = dz @ weight
        if need["weight"]:
            grads["weight"] += dz.T @ hidden[rows].float()
        if need["bias"]:
            grads["bias"] += dz.sum(0)
    return {name: grad.to(dtype) for name, grad in grads.items()}


def _raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    raw = hidden.float() @ weight.T  # (C, V)
    return raw if bias is None else raw + bias.float()


def _chunks(targets: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Indices of the rows that count, cut so that a chunk's logits take at most CHUNK_BYTES."""
    rows = (targets >= 0).nonzero().squeeze(-1)
    return rows.split(max(1, CHUNK_BYTES // (4 * vocabulary))) if rows.numel() else ()
