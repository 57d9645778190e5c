"""Score completions of a Hugging Face causal LM with the fused op, without building its logits.

The model runs its own forward. A hook on the head captures the hidden states, selects the rows that predict completion
tokens, and scores them with ``linear_logprob`` and the head's own weight and adapter; the head itself gets an empty
slice. Everything a model does before its head is unchanged, including tied heads, PEFT, DDP and autocast; prompt tokens
cost nothing. What a model does *after* its head must be known: ``lm_head_of`` reads it from the configuration,
``check_lm_head`` compares with the model's own logits.

``patch_forward`` does the same for the model's own loss, for trainers that call ``model(..., labels=...)``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations.transformers.head import (
    LMHead,
    capture_hidden,
    check_lm_head,
    drop_virtual_tokens,
    fsdp_units,
    lm_head_of,
    unshard_in_backward,
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
    """Positions of a padded batch's completion tokens. Their number depends on the data: build it on the CPU."""

    positions: Tensor  # (T,) int64, row of the flattened (B * L, H) hidden states that predicts each token
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B + 1,) int64, first token of each sequence, and T last


def pack_completions(input_ids: Tensor, completion_mask: Tensor) -> Packing:
    """Find the completion tokens of a padded batch.

    Args:
        input_ids: (B, L) int64.
        completion_mask: (B, L), nonzero at the tokens to score. The first token of a sequence has no predecessor and is
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
    attention_mask: Tensor | None,
    packing: Packing,
    *,
    head: LMHead | None = None,
    outputs: Sequence[str] = (),
    backend: str = "auto",
) -> TokenLogprobs:
    """Run the model and score its completion tokens.

    Args:
        model: the causal LM, or a wrapper (DDP, PEFT) that is called the same way.
        input_ids, attention_mask: (B, L) on the model's device.
        packing: from ``pack_completions``, on the same device.
        head: from ``lm_head_of``; by default that of ``model``. Required if ``model`` is wrapped by DDP.
        outputs, backend: as for ``linear_logprob``.

    Returns:
        TokenLogprobs, every tensor (T,), in the order of ``packing``; differentiable in the model's parameters.
    """
    head = lm_head_of(model) if head is None else head
    tokens, _ = score_completions(model, head, input_ids, attention_mask, packing, outputs, backend)
    return tokens


def score_completions(
    model: nn.Module,
    head: LMHead,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    packing: Packing,
    outputs: Sequence[str],
    backend: str,
    **inputs: object,
) -> tuple[TokenLogprobs, Any]:
    """As :func:`completion_logprobs`, with further ``inputs`` of the model; also returns the model's outputs."""

    def score(hidden: Tensor) -> TokenLogprobs:
        rows = drop_virtual_tokens(model, head, hidden, input_ids).flatten(0, 1)
        rows = rows.index_select(0, packing.positions)
        return head.score(rows, packing.targets, outputs=outputs, backend=backend)

    with capture_hidden(head, score) as scored:
        result = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
    if len(scored) != 1:
        raise RuntimeError(
            f"{type(model).__name__} called its lm_head {len(scored)} times in one forward pass; expected once"
        )
    return unshard_in_backward(fsdp_units(model)[:1], scored[0]), result  # the root, whose output is not used
