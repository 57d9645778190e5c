"""What the rows of an optimizer step are compared with, estimated once for all its micro-batches and ranks.

KTO's reference point is :mod:`prefopt.train.mismatched`'s. Here are BCO's shift, the gate that lets it in, and the mean
that decision weights are divided by. All are constants to the gradient, and evaluation changes none of them.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from prefopt.train.config import PreferenceConfig
from prefopt.train.methods import Baselines, Options, Sequences
from prefopt_kernels.losses import decision_weights
from prefopt_kernels.reference_point import CumulativeShift, EMAShift, ShiftSchedule, WindowShift

PLATEAU = 0.1  # share of the logs for which the margin must not have risen
FEWEST_LOGS = 3


class BaselineEstimators:
    """Shift, gate and decision mean of a run, with what a checkpoint must hold of them.

    Args:
        args: the configuration, with the method's options filled in.
    """

    def __init__(self, args: PreferenceConfig):
        self.args: Options = args
        self.weighted = (args.decision_weighting or "off") != "off"
        self.shift: CumulativeShift | WindowShift | EMAShift | None = None
        self.schedule: ShiftSchedule | None = None
        self.reset(max_steps=0)

    def reset(self, max_steps: int) -> None:
        """Start a run of ``max_steps`` optimizer steps; 0 if their number is not known yet."""
        args = self.args
        if (args.shift or "off") == "off":
            return
        if args.shift == "ema":
            self.shift = EMAShift(decay=args.shift_decay)
        else:
            self.shift = WindowShift() if args.shift == "window" else CumulativeShift()
        when: dict[str, int] = {}
        if args.shift_start == "plateau":
            every = args.logging_steps if args.logging_steps >= 1 else args.logging_steps * max_steps
            logs, warm = (steps / max(every, 1.0) for steps in (max_steps, args.get_warmup_steps(max_steps)))
            when["patience"] = max(FEWEST_LOGS, math.ceil(PLATEAU * logs)) + math.ceil(warm)
        else:
            when["start_step"] = round(args.shift_start * max_steps)
        self.schedule = ShiftSchedule(**when, ramp_steps=round(args.shift_ramp * max_steps))

    def step(self, step: int, margin: float | None = None) -> None:
        """Optimizer step ``step`` begins; or it was logged, with this margin."""
        if self.schedule is not None:
            self.schedule.update(step, margin)

    def estimate(self, rows: Sequences, *, update: bool) -> Baselines:
        """From all the rows that this rank has in the optimizer step, each once.

        Args:
            rows: unpaired rows; only detached values are read.
            update: False in evaluation.
        """
        shift = mean = None
        logps = rows.logps.detach()
        if self.shift is not None:
            rewards = self.args.beta * (logps - rows.reference)
            shift = self.shift.estimate(rewards, rows.labels, update=update)
        if self.weighted:
            weights = decision_weights(
                logps,
                rows.lengths,
                weighting=self.args.decision_weighting,
                clip=tuple(self.args.decision_clip),
            )
            mean = _mean_over_ranks(weights)
        return Baselines(shift=shift, gate=self.gate, decision_mean=mean)

    @property
    def gate(self) -> float:
        """How far the shift is let in, from 0 to 1."""
        return 1.0 if self.schedule is None else self.schedule.gate()

    def state_dict(self) -> dict:
        """JSON-ready; fp32 numbers come back to the bit."""
        if self.shift is None or self.schedule is None:
            return {}
        return {
            "shift": {name: value.tolist() for name, value in self.shift.state_dict().items()},
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from ``state_dict``."""
        if self.shift is not None and self.schedule is not None:
            self.shift.load_state_dict({name: torch.tensor(value) for name, value in state["shift"].items()})
            self.schedule.load_state_dict(state["schedule"])


def _mean_over_ranks(weights: Tensor) -> Tensor:
    """0-dim mean of the finite values of all ranks, 1 if there are none."""
    finite = weights.isfinite()
    packed = torch.stack([torch.where(finite, weights, 0).sum(), finite.sum().to(weights.dtype)])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(packed)
    return torch.where(packed[1] > 0, packed[0] / packed[1].clamp(min=1), 1.0)
