"""What a backend is given: the operands of a call, what its forward kept, and the gradients that come back."""

from typing import NamedTuple

from torch import Tensor

FILTER_TILE = 64  # token ids of a tile that a gradient filter keeps or leaves out, by 128 tokens


class Operands(NamedTuple):
    """raw logits = hidden weight^T + low_hidden low_weight^T + bias, over the rows with targets >= 0."""

    hidden: Tensor  # (T, H) fp32 | bf16 | fp16
    weight: Tensor  # (V, H), dtype of hidden
    targets: Tensor  # (T,) int64 | int32
    bias: Tensor | None = None  # (V,), dtype of hidden
    low_hidden: Tensor | None = None  # (T, R) fp32: scale A h of a low-rank adapter on the head
    low_weight: Tensor | None = None  # (V, R), dtype of hidden or fp32: the adapter's B


class Upstream(NamedTuple):
    """d loss / d output, each (T,) fp32, or None where the output was not used."""

    logp: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None


class Saved(NamedTuple):
    """What the forward leaves for the backward, with the filters of the call."""

    lse: Tensor  # (T,) fp32
    entropy: Tensor | None  # (T,) fp32, where it was an output
    tile_max: Tensor | None  # (tiles, T) fp32, largest logit of each FILTER_TILE ids
    grad_filter: float
    head_grad_filter: float
