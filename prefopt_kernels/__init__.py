"""Fused losses for preference optimisation: per-token log-probabilities straight from hidden states and the LM head."""

from prefopt_kernels.losses import (
    DensityRatio,
    EnhancedKTOComponents,
    apo_zero_loss,
    bco_loss,
    cpo_loss,
    decision_weights,
    dpo_loss,
    enhanced_kto_components,
    enhanced_kto_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    sft_loss,
    simpo_loss,
)
from prefopt_kernels.modules import FusedLinearKTOLoss, KTOMetrics, sequence_logps
from prefopt_kernels.ops.linear_kl import TokenKL, linear_kl
from prefopt_kernels.ops.linear_logprob import TokenLogprobs, explain, linear_logprob
from prefopt_kernels.ops.sequence_loss import SequenceLoss, sequence_loss
from prefopt_kernels.parallel.vocab import vocab_parallel_linear_logprob
from prefopt_kernels.reference_point import (
    EMAKL,
    CumulativeShift,
    EMAShift,
    MicrobatchKL,
    ShiftSchedule,
    WindowKL,
    WindowShift,
)

__version__ = "0.1.0"

__all__ = [
    "EMAKL",
    "CumulativeShift",
    "DensityRatio",
    "EMAShift",
    "EnhancedKTOComponents",
    "FusedLinearKTOLoss",
    "KTOMetrics",
    "MicrobatchKL",
    "SequenceLoss",
    "ShiftSchedule",
    "TokenKL",
    "TokenLogprobs",
    "WindowKL",
    "WindowShift",
    "apo_zero_loss",
    "bco_loss",
    "cpo_loss",
    "decision_weights",
    "dpo_loss",
    "enhanced_kto_components",
    "enhanced_kto_loss",
    "explain",
    "ipo_loss",
    "kto_loss",
    "linear_kl",
    "linear_logprob",
    "orpo_loss",
    "sequence_logps",
    "sequence_loss",
    "sft_loss",
    "simpo_loss",
    "vocab_parallel_linear_logprob",
]
