"""Score completions of a Hugging Face causal LM with the fused op; the model never builds its logits.

The model runs as always. When its hidden states arrive at the head they are caught, the rows that predict a
completion token are picked out, and ``linear_logprob`` scores those with the head's own weight and adapter; the head
itself is left with an empty slice. So whatever a model does before its head stays right, as do tied heads, PEFT, DDP
and autocast, and prompt tokens cost nothing. What a model does *after* its head has to be known: ``lm_head_of`` reads
it from the configuration, ``check_lm_head`` compares with the model's own logits.

``patch_forward`` does the same behind a model's own loss, for the trainers that call ``model(..., labels=...)``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations.transformers.head import (
    LMHead,
    caught_at,
    check_lm_head,
    fsdp_units,
    lm_head_of,
    own_positions,
    whole_in_backward,
)
from prefopt_kernels.integrations.transformers.patch import FusedForward, patch_forward
from prefopt_kernels.ops.linear_logprob import TokenLogprobs

__all__ = [
    "FusedForward",
    "LMHead",
    "Packing",
    "check_lm_head",
    "completion_logprobs",
    "lm_head_of",
    "pack_completions",
    "patch_forward",
]


class Packing(NamedTuple):
    """Where the completion tokens of a padded batch are; all index tensors, made on the CPU beside the batch."""

    positions: Tensor  # (T,) int64, row of the flattened (B * L, H) hidden states that predicts each token
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B + 1,) int64, first token of each sequence, and T


def pack_completions(input_ids: Tensor, completion_mask: Tensor) -> Packing:
    """Find the completion tokens of a padded batch.

    Args:
        input_ids: (B, L) int64.
        completion_mask: (B, L), nonzero at the tokens to score. A sequence's first token has no predecessor, so it is
            never scored.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.transformers import pack_completions
        >>> ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> pack_completions(ids, mask)
        Packing(positions=tensor([0, 1, 3]), targets=tensor([6, 7, 9]), cu_seqlens=tensor([0, 2, 3]))
    """
    if input_ids.ndim != 2 or completion_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and completion_mask {tuple(completion_mask.shape)}; "
            "expected (B, L) for both"
        )
    scored = completion_mask[:, 1:].bool()  # (B, L - 1), at the predicting position
    row, column = scored.nonzero(as_tuple=True)
    counts = scored.sum(1)
    cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Packing(row * input_ids.shape[1] + column, input_ids[row, column + 1], cu_seqlens)


def completion_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    packing: Packing,
    *,
    head: LMHead | None = None,
    outputs: Sequence[str] = (),
    backend: str = "auto",
) -> TokenLogprobs:
    """Run the model and score its completion tokens.

    Args:
        model: the causal LM, or a wrapper of it (DDP, PEFT) that is called the same way.
        input_ids, attention_mask: (B, L) on the model's device.
        packing: of ``pack_completions``, on the same device.
        head: of ``lm_head_of``; found again when left out. Needed where ``model`` is wrapped by DDP.
        outputs, backend: as for ``linear_logprob``.

    Returns:
        TokenLogprobs, every tensor (T,), in the order of ``packing``; differentiable in the model's parameters.
    """
    head = lm_head_of(model) if head is None else head

    def score(hidden: Tensor) -> TokenLogprobs:
        rows = own_positions(model, head, hidden, input_ids).flatten(0, 1)
        rows = rows.index_select(0, packing.positions)
        return head.score(rows, packing.targets, outputs=outputs, backend=backend)

    with caught_at(head, score, keep=0) as caught:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    if len(caught) != 1:
        raise RuntimeError(
            f"{type(model).__name__} called its lm_head {len(caught)} times in one forward pass; expected once"
        )
    return whole_in_backward(fsdp_units(model)[:1], caught[0])  # the root, whose output is not used
