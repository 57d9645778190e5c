"""Drop-in replacements for Liger's fused linear losses: same names, arguments and results, on our op and losses.

    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss
    from prefopt_kernels.integrations.liger import LigerFusedLinearKTOLoss

Written against liger-kernel 0.8.5, which need not be installed. In fp32, values and gradients agree to 1e-5 of the
largest entry. Intended differences:

- ``kl`` of shape (B,) is applied per row. Liger with ``chunk_size=1`` compares every row with every entry.
- The mean log-probability of a completion without scored tokens is 0; Liger's is NaN, 0 / 0.
- Logits stay fp32 with half-precision operands; the head's gradient is summed in fp32 and rounded once.
- A reference passed with ``use_ref_model=False`` raises an error; Liger silently ignores it.
- DPO also has ``loss_type="ipo"``.
- Cross-entropy has no ``return_predicted_tokens``, and no ``label_smoothing`` with a softcap: both need every logit.
- ``compiled``, ``chunk_size`` and ``accum_dtype`` are accepted and have no effect.
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
