"""The losses: pure functions of per-sequence log-probabilities, one value per row, one file each."""

from prefopt_kernels.losses.apo import apo_zero_loss
from prefopt_kernels.losses.kto import kto_loss

__all__ = ["apo_zero_loss", "kto_loss"]
