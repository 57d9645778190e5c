"""The Triton kernels' entry; they run where those of linear_logprob do."""

from torch import Tensor

from prefopt_kernels.ops.linear_kl.operands import Saved, Transforms, Upstream
from prefopt_kernels.ops.linear_logprob.operands import Operands
from prefopt_kernels.ops.linear_logprob.triton_kernels import backend
from prefopt_kernels.ops.linear_logprob.triton_kernels.backend import why_not

if backend.triton is not None:
    from prefopt_kernels.ops.linear_kl.triton_kernels.launches import TwoModels

__all__ = ["KEEPS_UNIT", "backward", "forward", "why_not"]

KEEPS_UNIT = False  # with a second scan it would cost as much as the recomputation that it saves


def forward(policy: Operands, ref: Operands, transforms: Transforms, want: frozenset[str]) -> dict[str, Tensor]:
    return TwoModels(policy, ref, transforms).forward(want)


def backward(
    policy: Operands, ref: Operands, upstream: Upstream, saved: Saved, transforms: Transforms, need: frozenset[str]
) -> dict[str, Tensor]:
    return TwoModels(policy, ref, transforms).backward(upstream, saved, need)
