"""BCO's shift for S runs side by side, and the gate that stages it."""

import torch
from torch import Tensor

from prefopt.study.components import pair_means
from prefopt.study.grid import Config
from prefopt_kernels.reference_point import EMAShift

GATE_AT, RAMP = 0.3, 0.1  # of the steps
DECAY = 0.9


def gate_at(config: Config, step: int, steps: int) -> float:
    """How far the shift has taken KTO's place as reference point, from 0 to 1, at a step."""
    if "shift" not in config.components:
        return 0.0
    staged = (
        "no staging" not in config.changes if config.form == "ours" else "staging" in config.changes
    )
    return min(1.0, max(0.0, (step / steps - GATE_AT) / RAMP)) if staged else 1.0


class Running:
    """The textbook shift: the mean of all rewards ever seen, updated by each micro-batch before its use.

    Args:
        seeds: S.
        unit: reward units are multiplied by it; 1 / beta is the mistake of a mean in nats.
    """

    def __init__(self, seeds: int, unit: float = 1.0):
        self.total, self.count, self.unit = torch.zeros(seeds, 1), 0, unit

    def next(self, rewards: Tensor, labels: Tensor) -> Tensor:
        """(S, B) the shift of each row, from (S, B) rewards of the window."""
        means = self.unit * pair_means(rewards)  # each of a pair's two rows
        counts = self.count + 2 * (torch.arange(means.shape[1]) // 2 + 1)
        totals = self.total + means.cumsum(1)
        totals[:, ::2] = totals[:, 1::2]  # both rows of a micro-batch see all of it
        self.total, self.count = totals[:, -1:], int(counts[-1])
        return totals / counts


class EMA:
    """Our shift, one :class:`prefopt_kernels.reference_point.EMAShift` a seed, used one window later.

    Args:
        seeds: S.
    """

    def __init__(self, seeds: int):
        self.shifts = [EMAShift(decay=DECAY) for _ in range(seeds)]

    def next(self, rewards: Tensor, labels: Tensor) -> Tensor:
        """(S, B) the shift of each row: of the windows before; 0 in the first."""
        lagged = torch.stack([shift.value for shift in self.shifts])
        for shift, *window in zip(self.shifts, rewards, labels, strict=True):
            shift.estimate(*window)
        return lagged[:, None].expand_as(rewards)
