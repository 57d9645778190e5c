"""The losses: pure functions of per-sequence log-probabilities, one value per row or pair, one file each."""

from prefopt_kernels.losses.apo import apo_zero_loss
from prefopt_kernels.losses.bco import bco_loss
from prefopt_kernels.losses.cpo import cpo_loss
from prefopt_kernels.losses.density_ratio import DensityRatio
from prefopt_kernels.losses.dpo import dpo_loss
from prefopt_kernels.losses.enhanced_kto import (
    EnhancedKTOComponents,
    decision_weights,
    enhanced_kto_components,
    enhanced_kto_loss,
)
from prefopt_kernels.losses.ipo import ipo_loss
from prefopt_kernels.losses.kto import kto_loss
from prefopt_kernels.losses.orpo import orpo_loss
from prefopt_kernels.losses.sft import sft_loss
from prefopt_kernels.losses.simpo import simpo_loss

__all__ = [
    "DensityRatio",
    "EnhancedKTOComponents",
    "apo_zero_loss",
    "bco_loss",
    "cpo_loss",
    "decision_weights",
    "dpo_loss",
    "enhanced_kto_components",
    "enhanced_kto_loss",
    "ipo_loss",
    "kto_loss",
    "orpo_loss",
    "sft_loss",
    "simpo_loss",
]
