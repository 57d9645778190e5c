"""The C++ kernels of csrc/linear_kl: allocates the outputs and calls them once a pass."""

from torch import Tensor

from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.linear_kl.operands import Saved, Transforms, Upstream
from prefopt_kernels.ops.linear_logprob import cpu
from prefopt_kernels.ops.linear_logprob.cpu import arguments, new_gradients, why_not
from prefopt_kernels.ops.linear_logprob.operands import Operands
from prefopt_kernels.ops.linear_logprob.reference import new_outputs

__all__ = ["KEEPS_UNIT", "backward", "forward", "why_not"]

KEEPS_UNIT = True  # whether the forward can make the unit gradient of a frozen head


def forward(policy: Operands, ref: Operands, transforms: Transforms, want: frozenset[str]) -> dict[str, Tensor]:
    """Every wanted output."""
    out = new_outputs(policy.hidden, want)
    names = ("logp", "ref_logp", "lse", "ref_lse", "kl", "entropy", "mean_logit", "is_top1", "unit")
    outputs = [out.get(name) for name in names]
    _extension.ops().linear_kl_forward(*_arguments(policy, ref, transforms), *outputs, cpu.instruction_set())
    return out


def backward(
    policy: Operands, ref: Operands, upstream: Upstream, saved: Saved, transforms: Transforms, need: frozenset[str]
) -> dict[str, Tensor]:
    """Every needed gradient."""
    grads = new_gradients(policy, need)
    given = [None if tensor is None else tensor.contiguous() for tensor in (*upstream, *saved)]
    outputs = [grads.get(name) for name in ("hidden", "weight", "bias", "low_hidden", "low_weight")]
    call = (*_arguments(policy, ref, transforms), *given, *outputs, cpu.instruction_set())
    _extension.ops().linear_kl_backward(*call)
    if "bias" in need:
        grads["bias"] = grads["bias"].to(policy.weight.dtype)
    return grads


def _arguments(policy: Operands, ref: Operands, transforms: Transforms) -> tuple[Tensor | list[float] | None, ...]:
    """Both models' operands as the kernels read them; one head stays one tensor, by which they know it."""
    own = arguments(policy)
    if ref.weight is policy.weight:
        weight = own[1]  # it may be a copy in another layout
        assert weight is not None
        ref = ref._replace(weight=weight)
    hidden, weight, _targets, *rest = arguments(ref)
    numbers = [number or 0.0 for transform in transforms for number in transform]
    return (*own, hidden, weight, *rest, numbers)
