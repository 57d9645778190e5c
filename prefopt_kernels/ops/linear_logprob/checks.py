"""What a call of linear_logprob must look like; each refusal names the argument, what was got and what is expected."""

from collections.abc import Sequence

import torch
from torch import Tensor

from prefopt_kernels._checks import LARGEST, check_between, check_device, check_number, check_tensor
from prefopt_kernels.ops._forward_mode import refuse_tangents

OUTPUTS = ("entropy", "mean_logit", "is_top1")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST = 2.0**-149  # of fp32; below it rounds to 0


def check_call(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: Sequence[str],
) -> None:
    """Raise TypeError, ValueError or NotImplementedError unless the call is one that every backend understands.

    Reads metadata only, so it costs no device synchronisation and traces under torch.compile.
    """
    check_operands(hidden, weight, targets, bias)
    check_transform(logit_scale, softcap, temperature)
    check_outputs(outputs)


def check_operands(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    op: str = "linear_logprob",
    weight_name: str = "weight",
    prefix: str = "",
) -> None:
    """Raise unless hidden states, head and targets fit each other; ``prefix`` of the names of hidden and bias."""
    hidden_name, bias_name = f"{prefix}hidden", f"{prefix}bias"
    check_tensor(hidden_name, hidden, "(T, H)", 2)
    check_tensor(weight_name, weight, "(V, H)", 2)
    check_tensor("targets", targets, "(T,)", 1)
    if hidden.dtype not in FLOATS:
        raise TypeError(f"{hidden_name} has dtype {hidden.dtype}; expected one of {_names(FLOATS)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{weight_name} has dtype {weight.dtype}; expected that of {hidden_name}, {hidden.dtype}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets has dtype {targets.dtype}; expected torch.int64 or torch.int32")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{weight_name} has shape {tuple(weight.shape)}; expected (V, {hidden.shape[1]}), "
            f"because {hidden_name} has shape {tuple(hidden.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{weight_name} has shape (0, H); expected a vocabulary of at least one token")
    if targets.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; expected ({hidden.shape[0]},), "
            f"one id for each row of {hidden_name}"
        )
    named = {weight_name: weight, "targets": targets}
    if bias is not None:
        check_tensor(bias_name, bias, "(V,)", 1)
        if bias.dtype != hidden.dtype:
            raise TypeError(f"{bias_name} has dtype {bias.dtype}; expected that of {hidden_name}, {hidden.dtype}")
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{bias_name} has shape {tuple(bias.shape)}; expected ({weight.shape[0]},), one for each token id"
            )
        named[bias_name] = bias
    check_device(hidden_name, hidden, **named)
    refuse_tangents(op, {hidden_name: hidden, weight_name: weight, bias_name: bias})


def check_transform(logit_scale: float, softcap: float | None, temperature: float, place: str = "") -> None:
    """Raise unless the numbers of a logit transform fit fp32; ``place`` follows their names in a message."""
    _check_number(f"logit_scale{place}", logit_scale, positive=False)
    _check_number(f"temperature{place}", temperature, positive=True)
    if softcap is not None:
        _check_number(f"softcap{place}", softcap, positive=True)


def check_outputs(outputs: Sequence[str]) -> None:
    """Raise unless every name is in OUTPUTS."""
    if isinstance(outputs, str) or any(name not in OUTPUTS for name in outputs):
        raise ValueError(f"outputs is {outputs!r}; expected a sequence of names out of {OUTPUTS}")


def check_filters(grad_filter: float, head_grad_filter: float) -> None:
    """Raise unless both are probabilities below 1."""
    for name, value in (("grad_filter", grad_filter), ("head_grad_filter", head_grad_filter)):
        check_between(name, value, 0, 1, open_high=True)


def check_lora(
    lora: tuple[Tensor, Tensor, float] | None,
    hidden: Tensor,
    weight: Tensor,
    *,
    op: str = "linear_logprob",
    prefix: str = "",
) -> tuple[Tensor | None, Tensor | None, float]:
    """A, B and the factor of a low-rank adapter on the head, or Nones; raise unless they fit the operands."""
    if lora is None:
        return None, None, 1.0
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise TypeError(f"{prefix}lora is {_brief(lora)}; expected (A, B, scale) or None")
    A, B, scale = lora
    _check_number(f"{prefix}lora[2], the scale,", scale, positive=False)
    for name, tensor, shape in (("A", A, "(R, H)"), ("B", B, "(V, R)")):
        name = f"{prefix}lora's {name}"
        check_tensor(name, tensor, shape, 2)
        if tensor.dtype not in (hidden.dtype, torch.float32):
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; expected that of {prefix}hidden, {hidden.dtype}, or torch.float32"
            )
        check_device(f"{prefix}hidden", hidden, **{name: tensor})
    R = A.shape[0]
    for name, tensor, sizes in (("A", A, (R, hidden.shape[1])), ("B", B, (weight.shape[0], R))):
        if R == 0 or tuple(tensor.shape) != sizes:
            raise ValueError(
                f"{prefix}lora's {name} has shape {tuple(tensor.shape)}; expected {sizes} with a rank of 1 or more, "
                f"because A has shape {tuple(A.shape)}, {prefix}hidden {tuple(hidden.shape)} and the head "
                f"{tuple(weight.shape)}"
            )
    refuse_tangents(op, {f"{prefix}lora's A": A, f"{prefix}lora's B": B})
    return A, B, float(scale)


def _brief(value: object) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"a {type(value).__name__}{size}"


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise ValueError if a target is not below the vocabulary's size. CPU tensors only: it reads the values."""
    if targets.numel() and (largest := int(targets.max())) >= vocabulary:
        row = int((targets >= vocabulary).nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])} (largest {largest}); expected ids below V = {vocabulary}, "
            "or negative ids for rows that do not count"
        )


def _check_number(name: str, value: float, *, positive: bool) -> None:
    above = " above 0" if positive else ""
    # as fp32, in which the logits are computed
    check_number(name, value, f"a finite number{above} that fits fp32", SMALLEST if positive else -LARGEST)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
