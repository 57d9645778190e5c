"""What a row's reward is compared with: KTO's reference point z0 in nats, BCO's shift in reward units.

z0 is the mean log-ratio of mismatched completions (a prompt with another prompt's completion), clamped at
0 last: how far the policy has drifted on those is the baseline that KTO subtracts from every row
(arXiv:2402.01306, section 4.1). BCO's shift is a mean of the rows' own rewards (arXiv:2404.04656). Both are
constants to the gradient. An estimator is fed once per micro-batch or window, sums over the ranks of a
process group in one all-reduce, never waits for a device, and keeps its state in ``state_dict``.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


class _Estimator:
    """The last estimate and what else it takes to go on, as fp32 tensors; the one collective."""

    _shapes: dict[str, tuple[int, ...]] = {"value": ()}
    value: Tensor  # 0-dim

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
            raise ValueError(
                f"state has the keys {sorted(state)}; expected exactly {sorted(self._shapes)}"
            )
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


class _MeanKL(_Estimator):
    """An estimate that only knows the rows of one call."""

    def _mean_over_ranks(self, numerator: Tensor, denominator: int, update: bool) -> Tensor:
        """Sum both over the ranks in one all-reduce, divide, clamp, remember."""
        packed = torch.stack([numerator, numerator.new_tensor(float(denominator))])  # (2,)
        packed = self._over_ranks(packed)
        # No row on any rank leaves 0 / 1: a reference point of 0, which is APO-zero's.
        estimate = (packed[0] / packed[1].clamp(min=1.0)).clamp(min=0.0)
        if update:
            self.value = estimate
        return estimate


class MicrobatchKL(_MeanKL):
    r"""One estimate per micro-batch: the mean over ranks of each rank's mean.

    .. math:: z_0 = \max\Bigl(0, \tfrac{1}{R} \sum_{k=1}^{R} \tfrac{1}{n_k} \sum_i r_{k,i}\Bigr)

    The definition of TRL's KTOTrainer, for comparisons with it. Each rank counts the same whatever its
    number of rows; a rank without rows is left out of R.

    Args:
        group: process group to reduce over; None is the default group. Used once
            ``torch.distributed`` is initialised, otherwise this process is alone.

    Example:
        >>> import torch
        >>> kl = MicrobatchKL()
        >>> kl.estimate(torch.tensor([1.0, 3.0]))
        tensor(2.)
        >>> kl.estimate(torch.tensor([-5.0, 3.0])), kl.value
        (tensor(0.), tensor(0.))
    """

    def estimate(self, log_ratios: Tensor, *, update: bool = True) -> Tensor:
        """Reduce this micro-batch's log-ratios over all ranks.

        Args:
            log_ratios: (n,) floating point, nats, of this rank's mismatched completions; n may be 0.
            update: False leaves ``value`` as it is (evaluation).

        Returns:
            0-dim fp32 on the device of ``log_ratios``, detached, 0 or above; NaN if a row is NaN.

        Raises:
            TypeError, ValueError: ``log_ratios`` is not floating point or not (n,).
        """
        log_ratios = _checked("log_ratios", log_ratios, "nats")
        n = log_ratios.shape[0]
        return self._mean_over_ranks(log_ratios.sum() / max(n, 1), min(n, 1), update)


class WindowKL(_MeanKL):
    r"""One estimate per optimizer step: the mean over every row of the window on every rank.

    .. math:: z_0 = \max\Bigl(0, \frac{\sum_k \sum_i r_{k,i}}{\sum_k n_k}\Bigr)

    Call it once per optimizer step with the log-ratios of all micro-batches, concatenated: accumulation
    over small micro-batches then has the reference point of one large batch, with its smaller variance.
    Sum and count are reduced separately, so ranks may have different numbers of rows.

    Args:
        group: as in :class:`MicrobatchKL`.

    Example:
        >>> import torch
        >>> kl = WindowKL()
        >>> kl.estimate(torch.tensor([1.0, 3.0, 5.0]))
        tensor(3.)
        >>> kl.estimate(torch.tensor([9.0]), update=False), kl.value
        (tensor(9.), tensor(3.))
    """

    def estimate(self, log_ratios: Tensor, *, update: bool = True) -> Tensor:
        """Reduce the window's log-ratios over all ranks.

        Args:
            log_ratios: (n,) floating point, nats, of this rank's mismatched completions in the whole
                window; n may be 0.
            update: False leaves ``value`` as it is (evaluation).

        Returns:
            0-dim fp32 on the device of ``log_ratios``, detached, 0 or above; NaN if a row is NaN.

        Raises:
            TypeError, ValueError: ``log_ratios`` is not floating point or not (n,).
        """
        log_ratios = _checked("log_ratios", log_ratios, "nats")
        return self._mean_over_ranks(log_ratios.sum(), log_ratios.shape[0], update)


class EMAKL(_Estimator):
    r"""An exponential average of the window means, clamped at 0 after the averaging.

    .. math:: N \leftarrow \rho N + (1 - \rho) \, \bar r, \quad D \leftarrow \rho D + (1 - \rho), \quad
              z_0 = \max(0, N / D)

    Call it once per optimizer step, as :class:`WindowKL`. D corrects the start, so the first estimate is
    the first window's mean. Rows that are not finite, and a window without rows, leave the average alone.

    Args:
        group: as in :class:`MicrobatchKL`.
        decay: :math:`\rho`, in [0, 1); 0 is :class:`WindowKL`.

    Example:
        >>> import torch
        >>> kl = EMAKL(decay=0.5)
        >>> kl.estimate(torch.tensor([-1.0]))  # N / D = -1
        tensor(0.)
        >>> kl.estimate(torch.tensor([5.0]))  # N / D = (-.25 + 2.5) / .75
        tensor(3.)
    """

    _shapes = {"value": (), "numerator": (), "denominator": ()}
    numerator: Tensor
    denominator: Tensor

    def __init__(self, group: "dist.ProcessGroup | None" = None, *, decay: float = 0.9):
        super().__init__(group)
        self.decay = _checked_decay(decay)

    def estimate(self, log_ratios: Tensor, *, update: bool = True) -> Tensor:
        """Average the window's log-ratios, over all ranks, into the earlier ones.

        Args:
            log_ratios: (n,) floating point, nats, of this rank's mismatched completions in the whole
                window; n may be 0.
            update: False returns ``value`` and leaves everything as it is (evaluation).

        Returns:
            0-dim fp32 on the device of ``log_ratios``, detached, 0 or above; 0 before the first row.

        Raises:
            TypeError, ValueError: ``log_ratios`` is not floating point or not (n,).
        """
        log_ratios = _checked("log_ratios", log_ratios, "nats")
        self._follow(log_ratios.device)
        if update:
            sums, counts = self._over_ranks(_sums_and_counts(log_ratios, log_ratios.isfinite()))
            self.numerator, self.denominator = _averaged(self, sums, counts, self.decay)
            self.value = (self.numerator / self.denominator.clamp(min=_TINY)).clamp(min=0.0)
        return self.value


class CumulativeShift(_Estimator):
    r"""The mean of every reward ever seen, all with the same weight: TRL's baseline, for comparisons with it.

    .. math:: \delta = \frac{1}{n} \sum_{i=1}^{n} \beta r_i

    It leans to the majority class and never forgets the first steps. TRL calls it once per micro-batch,
    before the loss. Unlike TRL's, it leaves out rows that are not finite, one of which would otherwise
    stay in the mean for ever.

    Args:
        group: as in :class:`MicrobatchKL`.

    Example:
        >>> import torch
        >>> shift, labels = CumulativeShift(), torch.tensor([True, True, False])
        >>> shift.estimate(torch.tensor([2.0, 2.0, -1.0]), labels)
        tensor(1.)
        >>> shift.estimate(torch.tensor([5.0]), torch.tensor([True]))
        tensor(2.)
    """

    _shapes = {"value": (), "count": ()}
    count: Tensor

    def estimate(self, rewards: Tensor, labels: Tensor, *, update: bool = True) -> Tensor:
        """Add the rewards of all ranks to the mean.

        Args:
            rewards: (n,) floating point, reward units (beta times nats), of this rank; n may be 0.
            labels: (n,) bool. True is desirable. Not used here.
            update: False returns ``value`` and leaves everything as it is (evaluation).

        Returns:
            0-dim fp32 on the device of ``rewards``, detached; 0 before the first row.

        Raises:
            TypeError, ValueError: ``rewards`` is not floating point or not (n,), or ``labels`` does not
            fit it.
        """
        rewards, _ = _checked_rewards(rewards, labels)
        self._follow(rewards.device)
        if update:
            total, n = self._over_ranks(_sums_and_counts(rewards, rewards.isfinite()))
            self.count = self.count + n
            step = total / n.clamp(min=1.0) - self.value
            self.value = self.value + step * (n / self.count.clamp(min=1.0))
        return self.value


class WindowShift(_Estimator):
    r"""One baseline per optimizer step: half the sum of the window's two class means.

    .. math:: \delta = \tfrac12 \bigl(\overline{\beta r}_D + \overline{\beta r}_U\bigr)

    That is where BCO's bound on DPO is tightest, whatever the share of the classes. Call it once per
    window with the rewards of all its rows, from a pass without gradient, so that all micro-batches share
    one baseline. Rows that are not finite are left out; a window without one of the classes keeps the last
    value.

    Args:
        group: as in :class:`MicrobatchKL`.

    Example:
        >>> import torch
        >>> shift, labels = WindowShift(), torch.tensor([True, True, False])
        >>> shift.estimate(torch.tensor([2.0, 2.0, -1.0]), labels)
        tensor(0.5000)
        >>> shift.estimate(torch.tensor([9.0]), torch.tensor([True]))
        tensor(0.5000)
    """

    def estimate(self, rewards: Tensor, labels: Tensor, *, update: bool = True) -> Tensor:
        """Balance the window's rewards over all ranks.

        Args:
            rewards: (n,) floating point, reward units (beta times nats), of this rank in the whole
                window; n may be 0.
            labels: (n,) bool. True is desirable.
            update: False leaves ``value`` as it is (evaluation).

        Returns:
            0-dim fp32 on the device of ``rewards``, detached; 0 before both classes were seen.

        Raises:
            TypeError, ValueError: as :meth:`CumulativeShift.estimate`.
        """
        rewards, classes = _checked_rewards(rewards, labels)
        self._follow(rewards.device)
        sums, counts = self._over_ranks(_sums_and_counts(rewards, classes))  # (2,), (2,)
        balanced = (sums / counts.clamp(min=1.0)).mean()
        estimate = torch.where((counts > 0).all(), balanced, self.value)
        if update:
            self.value = estimate
        return estimate


class EMAShift(_Estimator):
    r"""An exponential average per class, bias-corrected, and half the sum of the two.

    .. math:: N_c \leftarrow \rho N_c + (1 - \rho) \, \overline{\beta r}_c, \quad
              D_c \leftarrow \rho D_c + (1 - \rho), \quad
              \delta = \tfrac12 (N_D / D_D + N_U / D_U)

    Call it once per optimizer step with the rewards of the whole window; ``value`` before the call is the
    baseline with a lag of one step, the returned one contains the window. Rows that are not finite are
    left out; a class without rows keeps its average.

    Args:
        group: as in :class:`MicrobatchKL`.
        decay: :math:`\rho`, in [0, 1).

    Example:
        >>> import torch
        >>> shift, labels = EMAShift(decay=0.5), torch.tensor([True, True, False])
        >>> shift.estimate(torch.tensor([2.0, 2.0, -1.0]), labels)
        tensor(0.5000)
        >>> shift.estimate(torch.tensor([5.0]), torch.tensor([True]))  # (.25 * 2 + .5 * 5) / .75 = 4
        tensor(1.5000)
    """

    _shapes = {"value": (), "numerator": (2,), "denominator": (2,)}
    numerator: Tensor  # (2,) desirable, undesirable
    denominator: Tensor

    def __init__(self, group: "dist.ProcessGroup | None" = None, *, decay: float = 0.9):
        super().__init__(group)
        self.decay = _checked_decay(decay)

    def estimate(self, rewards: Tensor, labels: Tensor, *, update: bool = True) -> Tensor:
        """Average the window's rewards, over all ranks, into the earlier ones.

        Args:
            rewards: (n,) floating point, reward units (beta times nats), of this rank in the whole
                window; n may be 0.
            labels: (n,) bool. True is desirable.
            update: False returns ``value`` and leaves everything as it is (evaluation).

        Returns:
            0-dim fp32 on the device of ``rewards``, detached; 0 before both classes were seen.

        Raises:
            TypeError, ValueError: as :meth:`CumulativeShift.estimate`.
        """
        rewards, classes = _checked_rewards(rewards, labels)
        self._follow(rewards.device)
        if update:
            sums, counts = self._over_ranks(_sums_and_counts(rewards, classes))  # (2,), (2,)
            self.numerator, self.denominator = _averaged(self, sums, counts, self.decay)
            balanced = (self.numerator / self.denominator.clamp(min=_TINY)).mean()
            seen = (self.denominator > 0).all()
            self.value = torch.where(seen, balanced, torch.zeros_like(balanced))
        return self.value


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
        if isinstance(min_gain, bool) or not isinstance(min_gain, (int, float)):
            raise TypeError(f"min_gain is a {type(min_gain).__name__}; expected a number")
        if not 0 <= min_gain < math.inf:
            raise ValueError(f"min_gain is {min_gain}; expected a finite number, 0 or above")
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
            raise ValueError(
                f"step is {step}; expected {self.step} or above, the last step's number"
            )
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
            raise ValueError(
                f"state has the keys {sorted(state)}; expected exactly {sorted(self._keys)}"
            )
        for key in self._keys:
            setattr(self, key, state[key])


def _sums_and_counts(rows: Tensor, masks: Tensor) -> Tensor:
    """(2, ...) sums of the rows under each mask, and how many there are; packed for one all-reduce."""
    sums = torch.where(masks, rows, torch.zeros_like(rows)).sum(-1)
    return torch.stack([sums, masks.sum(-1).to(rows.dtype)])


def _averaged(
    state: "EMAKL | EMAShift", sums: Tensor, counts: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator after one more window; unchanged where it has no rows."""
    seen = counts > 0
    numerator = decay * state.numerator + (1 - decay) * sums / counts.clamp(min=1.0)
    denominator = decay * state.denominator + (1 - decay)
    return (
        torch.where(seen, numerator, state.numerator),
        torch.where(seen, denominator, state.denominator),
    )


def _checked(name: str, rows: Tensor, unit: str) -> Tensor:
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} is a {type(rows).__name__}; expected a tensor (n,)")
    if not rows.is_floating_point():
        raise TypeError(f"{name} has dtype {rows.dtype}; expected floating point ({unit})")
    if rows.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}; expected (n,)")
    return rows.detach().to(torch.float32)


def _checked_rewards(rewards: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) fp32 rewards, and (2, n) which rows are finite and desirable, finite and undesirable."""
    rewards = _checked("rewards", rewards, "beta * nats")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}; expected a tensor (n,)")
    if labels.dtype != torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; expected torch.bool (True = desirable)")
    if labels.shape != rewards.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected that of rewards, {tuple(rewards.shape)}"
        )
    return rewards, torch.stack([labels, ~labels]) & rewards.isfinite()


def _checked_decay(decay: float) -> float:
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise TypeError(f"decay is a {type(decay).__name__}; expected a number in [0, 1)")
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; expected a number in [0, 1)")
    return decay
