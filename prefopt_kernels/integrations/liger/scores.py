"""Shared by the classes with Liger's signatures: padded sequences to log-probabilities and logged sums."""

from typing import NamedTuple

import torch
from torch import Tensor

from prefopt_kernels.modules import sequence_logps
from prefopt_kernels.ops.linear_logprob import linear_logprob


class Scores(NamedTuple):
    """Scores of B padded sequences; fp32."""

    logps: Tensor  # (B,) nats, sum over the scored tokens, or their mean
    lengths: Tensor  # (B,) int64, number of scored tokens
    logp_sums: Tensor  # (B,) nats, always the sum


def score(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    average: bool = False,
) -> Scores:
    """Score (B, L, H) hidden states for (B, L) targets; positions with ``ignore_index`` cost nothing."""
    B, L = target.shape
    counts = target != ignore_index
    tokens = linear_logprob(hidden.flatten(0, 1), weight, torch.where(counts, target, -1).flatten(), bias)
    bounds = torch.arange(0, B * L + 1, max(L, 1), device=target.device)
    logp_sums = sequence_logps(tokens.logp, bounds)
    lengths = counts.sum(1)
    logps = logp_sums / lengths.clamp(min=1) if average else logp_sums
    return Scores(logps, lengths, logp_sums)


@torch.no_grad()
def reference_logps(
    use_ref_model: bool,
    hidden: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    average: bool,
) -> Tensor:
    """(B,) log-probabilities under the reference model; 0 without one.

    Raises:
        ValueError: a reference is missing, or is passed with ``use_ref_model=False``.
    """
    if not use_ref_model:
        if hidden is not None:
            raise ValueError("ref_input is given with use_ref_model=False; expected use_ref_model=True or no ref_input")
        return torch.zeros(target.shape[0], device=target.device)
    for name, value in (("ref_input", hidden), ("ref_weight", weight)):
        if value is None:
            raise ValueError(f"{name} is None; expected it with use_ref_model=True")
    assert hidden is not None and weight is not None
    check_padded(hidden, target, "ref_input")
    return score(hidden, weight, target, bias, ignore_index=ignore_index, average=average).logps


@torch.no_grad()
def logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B,) fp32 sum of the logits over all positions, padding included, and the vocabulary, as Liger logs it.

    sum_tv (W_v . h_t + b_v) = (sum_v W_v) . (sum_t h_t) + L sum_v b_v, so no logits are needed.
    """
    # not a matrix product, which autocast would round
    sums = (hidden.sum(1, dtype=torch.float32) * weight.sum(0, dtype=torch.float32)).sum(-1)
    return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=torch.float32)


def check_padded(hidden: Tensor, target: Tensor, name: str = "_input") -> None:
    """Raise ValueError unless the shapes are (B, L, H) and (B, L)."""
    if hidden.ndim != 3 or target.ndim != 2 or hidden.shape[:2] != target.shape:
        raise ValueError(
            f"{name} has shape {tuple(hidden.shape)} and target {tuple(target.shape)}; expected (B, L, H) and (B, L)"
        )
