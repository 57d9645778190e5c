"""Shared by the classes with Liger's signatures: padded sequences in, log-probabilities and logged sums out."""

from typing import NamedTuple

import torch
from torch import Tensor

from prefopt_kernels.modules import sequence_logps
from prefopt_kernels.ops.linear_logprob import linear_logprob


class Scores(NamedTuple):
    """Of B padded sequences; fp32."""

    logps: Tensor  # (B,) nats, summed over the tokens that count, or their mean
    lengths: Tensor  # (B,) int64, tokens that count
    logp_sums: Tensor  # (B,) nats, summed in either case


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
def logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B,) sum of the logits over all positions, padding too, and the vocabulary; fp32.

    That is what Liger logs. The sum over tokens and vocabulary goes through the product, so it takes no logits:
    sum_tv (W_v . h_t + b_v) = (sum_v W_v) . (sum_t h_t) + L sum_v b_v.
    """
    # Not a matrix product, which autocast would round.
    sums = (hidden.sum(1, dtype=torch.float32) * weight.sum(0, dtype=torch.float32)).sum(-1)
    return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=torch.float32)


def check_padded(hidden: Tensor, target: Tensor, name: str = "_input") -> None:
    """Raise unless the two are (B, L, H) and (B, L)."""
    if hidden.ndim != 3 or target.ndim != 2 or hidden.shape[:2] != target.shape:
        raise ValueError(
            f"{name} has shape {tuple(hidden.shape)} and target {tuple(target.shape)}; expected (B, L, H) and (B, L)"
        )


def check_reference(use_ref_model: bool, target: Tensor, ref_input: Tensor | None, ref_weight: Tensor | None) -> None:
    """Raise unless the reference model is there where it is asked for, and only there.

    Liger leaves a reference that is passed with ``use_ref_model=False`` out of the loss without a word.
    """
    if not use_ref_model:
        if ref_input is not None:
            raise ValueError(
                "ref_input is given with use_ref_model=False, which would leave it out of the loss; expected "
                "use_ref_model=True, or no ref_input"
            )
        return
    for name, value in (("ref_input", ref_input), ("ref_weight", ref_weight)):
        if value is None:
            raise ValueError(f"{name} is None; expected it with use_ref_model=True")
    check_padded(ref_input, target, "ref_input")
