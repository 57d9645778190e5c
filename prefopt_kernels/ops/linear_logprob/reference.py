"""The definition of linear_logprob in plain torch, chunked over tokens. Every kernel is tested against it."""

import torch
from torch import Tensor

from prefopt_kernels.ops.linear_logprob.operands import Operands, Saved, Upstream
from prefopt_kernels.ops.linear_logprob.transform import Transform, logit_gradient

CHUNK_BYTES = 64 * 2**20  # one fp32 (tokens, V) tensor of a chunk; a few of them live at a time


FILTERS_HEAD = False  # whether the backward uses tile_max


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    return None


def forward(operands: Operands, transform: Transform, want: frozenset[str], grad_filter: float) -> dict[str, Tensor]:
    """Fill every wanted output row by row, ``unit`` = d logp / d hidden among them; nothing is filtered here."""
    out = new_outputs(operands.hidden, want)
    operands = operands._replace(weight=operands.weight.float())
    for rows in chunks(operands):
        fill(out, rows, operands, *transform.apply(raw_logits(operands, rows)))
    return out


def new_outputs(hidden: Tensor, want: frozenset[str]) -> dict[str, Tensor]:
    """Zeros for every wanted output."""
    T, H = hidden.shape
    out = {name: hidden.new_zeros(T, dtype=torch.float32) for name in want}
    if "is_top1" in want:
        out["is_top1"] = out["is_top1"].bool()
    if "unit" in want:
        out["unit"] = hidden.new_zeros(T, H)
    return out


def fill(out: dict[str, Tensor], rows: Tensor, operands: Operands, z: Tensor, slope: Tensor | float) -> None:
    """Write a chunk's outputs from its logits ``z`` (C, V). ``operands.weight`` is fp32."""
    target = operands.targets[rows, None].long()  # (C, 1)
    lse = z.logsumexp(-1)
    z_target = z.gather(-1, target).squeeze(-1)
    out["lse"][rows] = lse
    out["logp"][rows] = z_target - lse
    if "mean_logit" in out:
        out["mean_logit"][rows] = z.mean(-1)
    if "is_top1" in out:
        out["is_top1"][rows] = z_target >= z.amax(-1)
    log_p = z - lse[:, None]
    if "entropy" in out:
        out["entropy"][rows] = torch.special.entr(log_p.exp()).sum(-1)  # 0 where p is 0
    if "unit" in out:
        dz = -log_p.exp()
        dz.scatter_add_(-1, target, torch.ones_like(z_target)[:, None])
        out["unit"][rows] = ((dz * slope) @ operands.weight).to(operands.hidden.dtype)


def backward(
    operands: Operands, upstream: Upstream, saved: Saved, transform: Transform, need: frozenset[str]
) -> dict[str, Tensor]:
    """Gradients of ``sum(dlogp * logp + dlse * lse + dentropy * entropy)`` for the needed operands; fp32 sums."""
    grads = new_gradients(operands, need)
    wide = operands._replace(weight=operands.weight.float())
    for rows in chunks(operands):
        z, slope = transform.apply(raw_logits(wide, rows))  # (C, V)
        dz = logit_gradient(
            z,
            operands.targets[rows].long(),
            saved.lse[rows],
            *(None if value is None else value[rows] for value in (*upstream, saved.entropy)),
        )
        add_products(grads, rows, wide, dz * slope)
    return {name: grad.to(getattr(operands, name).dtype) for name, grad in grads.items()}


def new_gradients(operands: Operands, need: frozenset[str]) -> dict[str, Tensor]:
    """fp32 zeros for every needed gradient."""
    return {
        name: torch.zeros_like(operand, dtype=torch.float32, memory_format=torch.contiguous_format)
        for name, operand in operands._asdict().items()
        if name in need
    }


def add_products(grads: dict[str, Tensor], rows: Tensor, operands: Operands, dz: Tensor) -> None:
    """Add a chunk's part, with ``dz`` (C, V) the gradient in the raw logits. ``operands.weight`` is fp32."""
    if "hidden" in grads:
        grads["hidden"][rows] = dz @ operands.weight
    if "weight" in grads:
        grads["weight"] += dz.T @ operands.hidden[rows].float()
    if "bias" in grads:
        grads["bias"] += dz.sum(0)
    if "low_hidden" in grads and operands.low_weight is not None:
        grads["low_hidden"][rows] = dz @ operands.low_weight.float()
    if "low_weight" in grads and operands.low_hidden is not None:
        grads["low_weight"] += dz.T @ operands.low_hidden[rows]


def raw_logits(operands: Operands, rows: Tensor) -> Tensor:
    """(C, V) fp32; ``operands.weight`` comes in fp32."""
    raw = operands.hidden[rows].float() @ operands.weight.T
    if operands.low_hidden is not None and operands.low_weight is not None:
        raw += operands.low_hidden[rows] @ operands.low_weight.float().T
    return raw if operands.bias is None else raw + operands.bias.float()


def chunks(operands: Operands) -> tuple[Tensor, ...]:
    """Indices of the rows that count, cut so that a chunk's logits take at most CHUNK_BYTES."""
    rows = (operands.targets >= 0).nonzero().squeeze(-1)
    return rows.split(max(1, CHUNK_BYTES // (4 * operands.weight.shape[0]))) if rows.numel() else ()
