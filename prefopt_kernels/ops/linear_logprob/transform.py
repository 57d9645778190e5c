"""The logit transform and the gradient of the outputs in the logits: the formulas that plain torch code shares."""

from typing import NamedTuple

import torch
from torch import Tensor


class Transform(NamedTuple):
    """``z = softcap * tanh(scale * raw / softcap) / temperature``; without softcap ``scale * raw / temperature``."""

    scale: float
    softcap: float | None
    temperature: float

    def apply(self, raw: Tensor) -> tuple[Tensor, Tensor | float]:
        """Transformed logits ``z`` and ``dz / draw``."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return raw * factor, factor
        t = torch.tanh(raw * (self.scale / self.softcap))
        return t * (self.softcap / self.temperature), (1 - t.square()) * factor

    def slope_at(self, z: Tensor) -> Tensor | float:
        """``dz / draw`` from ``z`` itself."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        return (1 - (z * (self.temperature / self.softcap)).square()) * factor


def logit_gradient(
    z: Tensor,
    target: Tensor,
    lse: Tensor,
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    entropy: Tensor | None,
) -> Tensor:
    """(C, V) gradient of ``sum(dlogp * logp + dlse * lse + dentropy * entropy)`` in the transformed logits ``z``.

    With p = exp(z - lse): d logp = onehot - p, d lse = p, d entropy = -p (log p + entropy).
    """
    log_p = z - lse[:, None]
    p = log_p.exp()
    factor = torch.zeros_like(lse)
    if dlse is not None:
        factor = factor + dlse
    if dlogp is not None:
        factor = factor - dlogp
    if dentropy is None:
        dz = p * factor[:, None]
    else:
        assert entropy is not None  # an output that has a gradient
        bounded = log_p.clamp(min=-1000)  # p is 0 long before; keeps 0 * -inf out
        dz = p * (factor[:, None] - dentropy[:, None] * (bounded + entropy[:, None]))
    return dz if dlogp is None else dz.scatter_add(-1, target[:, None], dlogp[:, None])
