"""Refusal of forward-mode derivatives, which a custom op of torch would drop without a word."""

from torch import Tensor
from torch.autograd import forward_ad


def refuse_tangents(op: str, operands: dict[str, Tensor | None]) -> None:
    """Raise NotImplementedError if an operand carries a tangent of ``torch.func.jvp`` or ``torch.autograd.forward_ad``.

    >>> import torch
    >>> refuse_tangents("linear_logprob", {"hidden": torch.eye(2), "bias": None})
    """
    for name, operand in operands.items():
        if isinstance(operand, Tensor) and forward_ad.unpack_dual(operand).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative, and {name} carries a tangent (torch.func.jvp, jacfwd or "
                "hessian, or "
                f"torch.autograd.forward_ad); use reverse mode, torch.autograd.grad or backward(), or detach {name}"
            )
