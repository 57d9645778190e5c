"""Liger's fused linear losses, by an import swap: the same names, arguments and results, on our op and losses.

    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss
    from prefopt_kernels.integrations.liger import LigerFusedLinearKTOLoss

Written against liger-kernel 0.8.5, which need not be installed. In fp32, values and gradients agree to 1e-5 of the
largest entry. Where they differ on purpose:

- ``kl`` of shape (B,) belongs row to row. Liger with ``chunk_size=1`` counts every row against every entry.
- A completion without a token that counts has mean log-probability 0; Liger's is NaN, 0 / 0.
- The logits stay fp32 with half-precision operands, and the head's gradient is summed in fp32 and rounded once.
- A reference that is passed with ``use_ref_model=False`` is refused; Liger leaves it out without a word.
- DPO also has ``loss_type="ipo"``.
- Cross-entropy has no ``return_predicted_tokens``, and no ``label_smoothing`` with a softcap: both need every logit.
- ``compiled``, ``chunk_size`` and ``accum_dtype`` are taken and have no effect.
"""

from prefopt_kernels.integrations.liger.cross_entropy import (
    CrossEntropyOutput,
    LigerFusedLinearCrossEntropyLoss,
)
from prefopt_kernels.integrations.liger.dpo import LigerFusedLinearDPOLoss
from prefopt_kernels.integrations.liger.kto import LigerFusedLinearKTOLoss
from prefopt_kernels.integrations.liger.pairs import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
