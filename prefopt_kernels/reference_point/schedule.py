"""When BCO's shift comes in."""

import math

from prefopt_kernels._checks import check_weight


class ShiftSchedule:
    r"""When BCO's shift comes in: a gate g in [0, 1], shut until a condition holds, then a linear ramp.

    .. math:: g = \mathrm{clip}\bigl((\text{step} - \text{start}) / \text{ramp}, \, 0, 1\bigr)

    It starts at ``start_step``, or earlier at a plateau: the margin's average (exponential, .9,
    bias-corrected) has not risen by more than ``min_gain`` over its best for ``patience`` updates. Plain
    numbers on the host; call it where the margin is logged and so read anyway.

    Args:
        start_step: step at which the ramp begins at the latest, 0 or above; None waits for a plateau.
        ramp_steps: steps from 0 to 1; 0 opens at once.
        patience: updates with a margin and without a gain, 1 or above; more than the warm-up of the
            learning rate, during which nothing is gained either. None looks for no plateau.
        min_gain: reward units, 0 or above.

    Raises:
        TypeError, ValueError: a number is out of range, or neither condition is given.

    Example:
        >>> schedule = ShiftSchedule(start_step=2, ramp_steps=4)
        >>> gates = []
        >>> for step in range(7):
        ...     schedule.update(step)
        ...     gates.append(schedule.gate())
        >>> gates
        [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    """

    _keys = ("step", "started_at", "average", "weight", "best", "stale")

    def __init__(
        self,
        *,
        start_step: int | None = None,
        ramp_steps: int = 0,
        patience: int | None = None,
        min_gain: float = 0.0,
    ):
        for name, value, least in (
            ("start_step", start_step, 0),
            ("ramp_steps", ramp_steps, 0),
            ("patience", patience, 1),
        ):
            if value is None and name != "ramp_steps":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is a {type(value).__name__}; expected an integer")
            if value < least:
                raise ValueError(f"{name} is {value}; expected {least} or above")
        check_weight("min_gain", min_gain)
        if start_step is None and patience is None:
            raise ValueError("start_step and patience are both None; expected at least one of them")
        self.start_step, self.ramp_steps = start_step, ramp_steps
        self.patience, self.min_gain = patience, min_gain
        self.step: int = 0
        self.started_at: int | None = None
        self.average = self.weight = 0.0  # of the margin, before the division of one by the other
        self.best: float | None = None
        self.stale = 0

    def gate(self) -> float:
        """g at the last step given to :meth:`update`; 0 before the start."""
        if self.started_at is None:
            return 0.0
        if self.ramp_steps == 0:
            return 1.0
        return min(1.0, (self.step - self.started_at) / self.ramp_steps)

    def update(self, step: int, margin: float | None = None) -> None:
        """Take note of an optimizer step, and of the margin where it is known.

        Args:
            step: the step's number, which never falls.
            margin: mean reward of the desirable rows less that of the others, reward units; one that is
                not finite is left out.

        Raises:
            ValueError: ``step`` is below the last one.
        """
        if step < self.step:
            raise ValueError(f"step is {step}; expected {self.step} or above, the last step's number")
        self.step = step
        if self.started_at is not None:
            return
        plateau = margin is not None and math.isfinite(margin) and self._stands_still(margin)
        if plateau or (self.start_step is not None and step >= self.start_step):
            self.started_at = step

    def _stands_still(self, margin: float) -> bool:
        self.average = 0.9 * self.average + 0.1 * margin
        self.weight = 0.9 * self.weight + 0.1
        smooth = self.average / self.weight
        if self.best is None or smooth > self.best + self.min_gain:
            self.best, self.stale = smooth, 0
        else:
            self.stale += 1
        return self.patience is not None and self.stale >= self.patience

    def state_dict(self) -> dict[str, float | int | None]:
        """Numbers by name; the constructor's arguments are not part of them."""
        return {key: getattr(self, key) for key in self._keys}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: a key is missing or unknown.
        """
        if set(state) != set(self._keys):
            raise ValueError(f"state has the keys {sorted(state)}; expected exactly {sorted(self._keys)}")
        for key in self._keys:
            setattr(self, key, state[key])
