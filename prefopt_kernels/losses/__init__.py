"""The losses: pure functions of per-sequence log-probabilities, one value per row, one file each."""

from prefopt_kernels.losses.apo import apo_zero_loss
from prefopt_kernels.losses.bco import bco_loss
from prefopt_kernels.losses.enhanced_kto import (
    EnhancedKTOComponents,
    decision_weights,
    enhanced_kto_components,
    enhanced_kto_loss,
)
from prefopt_kernels.losses.kto import kto_loss

__all__ = [
    "EnhancedKTOComponents",
    "apo_zero_loss",
    "bco_loss",
    "decision_weights",
    "enhanced_kto_components",
    "enhanced_kto_loss",
    "kto_loss",
]
