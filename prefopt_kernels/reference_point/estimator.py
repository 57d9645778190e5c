"""What every estimator has: its state, its one collective, and the checks of what it is given."""

import torch
import torch.distributed as dist
from torch import Tensor

from prefopt_kernels._checks import check_between, check_vector

TINY = torch.finfo(torch.float32).tiny


class Estimator:
    """The last estimate and what else it takes to go on, as fp32 tensors; the one collective."""

    _shapes: dict[str, tuple[int, ...]] = {"value": ()}
    value: Tensor  # 0-dim
    standard_error: Tensor | float = 0.0  # of the last window's mean, where there is one

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        self.group = group
        for name, shape in self._shapes.items():
            setattr(self, name, torch.zeros(shape))

    def state_dict(self) -> dict[str, Tensor]:
        """The estimator's tensors by name, copies; ``value`` is the last estimate, 0-dim fp32."""
        return {name: getattr(self, name).clone() for name in self._shapes}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: a key is missing or unknown, or a value is not a tensor of the right shape.
        """
        if set(state) != set(self._shapes):
            raise ValueError(f"state has the keys {sorted(state)}; expected exactly {sorted(self._shapes)}")
        for name, shape in self._shapes.items():
            value = state[name]
            if not isinstance(value, Tensor) or value.shape != shape:
                got = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                expected = f"tensor of shape {shape}" if shape else "0-dim tensor"
                raise ValueError(f"state['{name}'] is {got}; expected a {expected}")
        for name in self._shapes:
            setattr(self, name, state[name].detach().to(torch.float32).clone())

    def _follow(self, device: torch.device) -> None:
        for name in self._shapes:
            setattr(self, name, getattr(self, name).to(device))

    def _over_ranks(self, packed: Tensor) -> Tensor:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(packed, group=self.group)
        return packed


class AveragingEstimator(Estimator):
    """An exponential average over windows, kept as numerator and denominator, which correct the start."""

    numerator: Tensor
    denominator: Tensor

    def __init__(self, group: "dist.ProcessGroup | None" = None, *, decay: float = 0.9):
        super().__init__(group)
        self.decay = checked_decay(decay)

    def _average(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Take one more window in, which changes nothing where it has no rows; the average, 0 before the first row."""
        seen = counts > 0
        numerator = self.decay * self.numerator + (1 - self.decay) * sums / counts.clamp(min=1.0)
        denominator = self.decay * self.denominator + (1 - self.decay)
        self.numerator = torch.where(seen, numerator, self.numerator)
        self.denominator = torch.where(seen, denominator, self.denominator)
        return self.numerator / self.denominator.clamp(min=TINY)


def sums_and_counts(rows: Tensor, masks: Tensor) -> Tensor:
    """(2, ...) sums of the rows under each mask, and how many there are; packed for one all-reduce."""
    sums = torch.where(masks, rows, torch.zeros_like(rows)).sum(-1)
    return torch.stack([sums, masks.sum(-1).to(rows.dtype)])


def checked(name: str, rows: Tensor, unit: str) -> Tensor:
    check_vector(name, rows)
    if not rows.is_floating_point():
        raise TypeError(f"{name} has dtype {rows.dtype}; expected floating point ({unit})")
    return rows.detach().to(torch.float32)


def checked_decay(decay: float) -> float:
    check_between("decay", decay, 0, 1, open_high=True)
    return decay
