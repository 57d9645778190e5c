"""The C++ kernels of csrc/linear_logprob: allocates the outputs and calls them once a pass."""

from functools import cache

import torch
from torch import Tensor

from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.linear_logprob.operands import Operands, Saved, Upstream
from prefopt_kernels.ops.linear_logprob.reference import new_outputs
from prefopt_kernels.ops.linear_logprob.transform import Transform

FILTERS_HEAD = False  # whether the backward uses tile_max


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.device.type != "cpu":
        return f"hidden is on {hidden.device}, the C++ kernels run on the CPU"
    return _extension.why_not()


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of this machine that have kernels, best first.

    "+mkl" means that MKL computes the bf16 products.
    """
    return tuple(_extension.ops().instruction_sets())


@cache
def instruction_set() -> str:
    return instruction_sets()[0]


def forward(operands: Operands, transform: Transform, want: frozenset[str], grad_filter: float) -> dict[str, Tensor]:
    """Every wanted output; nothing is filtered here."""
    out = new_outputs(operands.hidden, want)
    names = ("logp", "lse", "entropy", "mean_logit", "is_top1", "unit")
    outputs = [out.get(name) for name in names]
    call = (*arguments(operands), *_numbers(transform), *outputs, instruction_set())
    _extension.ops().linear_logprob_forward(*call)
    return out


def backward(
    operands: Operands, upstream: Upstream, saved: Saved, transform: Transform, need: frozenset[str]
) -> dict[str, Tensor]:
    """Every needed gradient."""
    grads = new_gradients(operands, need)
    given = [None if tensor is None else tensor.contiguous() for tensor in (*upstream, saved.lse, saved.entropy)]
    outputs = [grads.get(name) for name in ("hidden", "weight", "bias", "low_hidden", "low_weight")]
    call = (*arguments(operands), *_numbers(transform), *given, *outputs, instruction_set())
    _extension.ops().linear_logprob_backward(*call)
    if "bias" in need:
        grads["bias"] = grads["bias"].to(operands.weight.dtype)
    return grads


def new_gradients(operands: Operands, need: frozenset[str]) -> dict[str, Tensor]:
    """What the kernels write every needed gradient into; that of the bias is fp32."""
    named = operands._asdict()
    # rows without a target stay 0; the gradients of the head are written whole
    make = {"hidden": torch.zeros, "low_hidden": torch.zeros}
    grads = {name: make.get(name, torch.empty)(named[name].shape, dtype=named[name].dtype) for name in need}
    if "bias" in need:
        grads["bias"] = grads["bias"].float()
    return grads


def arguments(operands: Operands) -> tuple[Tensor | None, ...]:
    """The operands in the layout that the kernels read: rows of unit stride, int64 targets, fp32 bias."""
    hidden, weight, targets, bias, low_hidden, low_weight = operands
    weight = _unit_stride(weight)
    if weight.stride(0) < weight.shape[1]:  # rows that overlap, such as an expanded one
        weight = weight.clone(memory_format=torch.contiguous_format)
    return (
        _unit_stride(hidden),
        weight,
        targets.long().contiguous(),
        None if bias is None else bias.float().contiguous(),
        None if low_hidden is None else low_hidden.contiguous(),
        None if low_weight is None else _unit_stride(low_weight),
    )


def _numbers(transform: Transform) -> tuple[float, float, float]:
    return transform.scale, transform.softcap or 0.0, transform.temperature


def _unit_stride(matrix: Tensor) -> Tensor:
    # not contiguous(): torch calls a matrix of one column contiguous whatever its strides
    return matrix if matrix.stride(1) == 1 else matrix.clone(memory_format=torch.contiguous_format)
