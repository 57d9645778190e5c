"""Estimates of BCO's shift: over everything ever seen, per window, and an average per class."""

import torch
from torch import Tensor

from prefopt_kernels._checks import check_vector
from prefopt_kernels.reference_point.estimator import (
    AveragingEstimator,
    Estimator,
    checked,
    sums_and_counts,
)


class CumulativeShift(Estimator):
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
            total, n = self._over_ranks(sums_and_counts(rewards, rewards.isfinite()))
            self.count = self.count + n
            step = total / n.clamp(min=1.0) - self.value
            self.value = self.value + step * (n / self.count.clamp(min=1.0))
        return self.value


class WindowShift(Estimator):
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
        sums, counts = self._over_ranks(sums_and_counts(rewards, classes))  # (2,), (2,)
        balanced = (sums / counts.clamp(min=1.0)).mean()
        estimate = torch.where((counts > 0).all(), balanced, self.value)
        if update:
            self.value = estimate
        return estimate


class EMAShift(AveragingEstimator):
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

    _shapes = {"value": (), "numerator": (2,), "denominator": (2,)}  # (2,) desirable, undesirable

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
            sums, counts = self._over_ranks(sums_and_counts(rewards, classes))  # (2,), (2,)
            balanced = self._average(sums, counts).mean()
            seen = (self.denominator > 0).all()
            self.value = torch.where(seen, balanced, torch.zeros_like(balanced))
        return self.value


def _checked_rewards(rewards: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) fp32 rewards, and (2, n) which rows are finite and desirable, finite and undesirable."""
    rewards = checked("rewards", rewards, "beta * nats")
    check_vector("labels", labels, len(rewards), dtypes=(torch.bool,))
    return rewards, torch.stack([labels, ~labels]) & rewards.isfinite()
