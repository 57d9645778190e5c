"""What several losses do to their rows before the formula: widen them, sign them, divide by tokens."""

from functools import reduce

import torch
from torch import Tensor


def widened(*logps: Tensor) -> tuple[Tensor, ...]:
    """All in one dtype, fp32 or fp64: a bf16 sum near -200 has a step of 1 nat, so widen first."""
    dtype = reduce(torch.promote_types, (value.dtype for value in logps), torch.float32)
    return tuple(value.to(dtype) for value in logps)


def constant(value: Tensor | float, like: Tensor) -> Tensor | float:
    """A baseline in the rows' dtype, cut from the graph; a number stays a number."""
    return value.detach().to(like.dtype) if isinstance(value, Tensor) else value


def signed(labels: Tensor, value: Tensor) -> Tensor:
    """(B,) ``value`` where desirable, ``-value`` where not."""
    return torch.where(labels, value, -value)


def per_token(logps: Tensor, lengths: Tensor) -> Tensor:
    """(B,) mean log-probability of a token; a row without tokens is divided by 1."""
    return logps / lengths.clamp(min=1).to(logps.dtype)
