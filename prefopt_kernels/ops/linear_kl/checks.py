"""What a call of linear_kl must look like, beyond what linear_logprob checks of each model's operands."""

from typing import TypeVar

import torch
from torch import Tensor

from prefopt_kernels._checks import check_device
from prefopt_kernels.ops.linear_logprob.checks import check_operands, check_transform

Number = TypeVar("Number", float, float | None)


def pair(name: str, value: Number | tuple[Number, Number]) -> tuple[Number, Number]:
    """The value of the policy and that of the reference model; one value holds for both.

    >>> pair("temperature", 0.7), pair("softcap", (30.0, None))
    ((0.7, 0.7), (30.0, None))
    """
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} has {len(value)} values; expected one, or a pair (policy, reference)")
    return value[0], value[1]


def check_transforms(
    scales: tuple[float, float], softcaps: tuple[float | None, float | None], temperatures: tuple[float, float]
) -> None:
    """Raise unless the numbers of both transforms fit fp32."""
    for i, numbers in enumerate(zip(scales, softcaps, temperatures, strict=True)):
        equal = scales[0] is scales[1] and softcaps[0] is softcaps[1] and temperatures[0] is temperatures[1]
        check_transform(*numbers, place="" if equal else f"[{i}]")


def check_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_lora: tuple[Tensor, Tensor, float] | None,
) -> None:
    """Raise unless the reference model's operands fit each other and the policy's, and are constants."""
    head, head_name = (weight, "weight") if ref_weight is None else (ref_weight, "ref_weight")
    check_operands(ref_hidden, head, targets, ref_bias, op="linear_kl", weight_name=head_name, prefix="ref_")
    if ref_hidden.dtype != hidden.dtype:
        raise TypeError(f"ref_hidden has dtype {ref_hidden.dtype}; expected that of hidden, {hidden.dtype}")
    check_device("hidden", hidden, ref_hidden=ref_hidden)
    if head.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight has shape {tuple(head.shape)}; expected {weight.shape[0]} rows, the vocabulary of weight"
        )
    named = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    if isinstance(ref_lora, (tuple, list)):
        named |= {f"ref_lora[{i}]": tensor for i, tensor in enumerate(ref_lora[:2])}
    for name, tensor in named.items():
        if torch.is_grad_enabled() and isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but the reference model is constant here; pass {name}.detach()")
