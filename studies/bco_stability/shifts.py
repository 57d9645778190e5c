"""BCO's shift for S runs side by side, and the schedule that stages it."""

import torch
from torch import Tensor

from prefopt_kernels.reference_point import EMAShift, ShiftSchedule
from studies.bco_stability.components import pair_means
from studies.bco_stability.grid import Config

GATE_AT, RAMP = 0.3, 0.1  # of the steps
DECAY = 0.9


def schedule_of(config: Config, steps: int) -> ShiftSchedule | None:
    """When the shift takes the place of KTO's reference point; None where it is off."""
    if "shift" not in config.components:
        return None
    staged = "no staging" not in config.changes if config.form == "ours" else "staging" in config.changes
    if not staged:
        return ShiftSchedule(start_step=0)
    return ShiftSchedule(start_step=round(GATE_AT * steps), ramp_steps=round(RAMP * steps))


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
    """Our shift: one :class:`prefopt_kernels.reference_point.EMAShift` a seed, fed once per window before its use.

    Args:
        seeds: S.
    """

    def __init__(self, seeds: int):
        self.shifts = [EMAShift(decay=DECAY) for _ in range(seeds)]

    def next(self, rewards: Tensor, labels: Tensor) -> Tensor:
        """(S, B) the shift of each row, the same in a whole window."""
        windows = zip(self.shifts, rewards, labels, strict=True)
        now = torch.stack([shift.estimate(*window) for shift, *window in windows])
        return now[:, None].expand_as(rewards)
