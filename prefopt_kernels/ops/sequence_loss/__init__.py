"""From token log-probabilities to per-sequence losses and their gradient. Start at op.py."""

from prefopt_kernels.ops.sequence_loss.op import SUMS, SequenceLoss, sequence_loss

__all__ = ["SUMS", "SequenceLoss", "sequence_loss"]
