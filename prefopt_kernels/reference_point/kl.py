"""Estimates of KTO's reference point z0: per micro-batch, per window, and an average over windows."""

import torch
from torch import Tensor

from prefopt_kernels.reference_point.estimator import (
    AveragingEstimator,
    Estimator,
    checked,
)


class _MeanKL(Estimator):
    """An estimate that only knows the rows of one call."""

    def _mean_over_ranks(self, numerator: Tensor, denominator: int, update: bool) -> Tensor:
        """Sum both over the ranks in one all-reduce, divide, clamp, remember."""
        packed = self._over_ranks(torch.stack([numerator, numerator.new_tensor(float(denominator))]))  # (2,)
        return self._clamped(packed, update)

    def _clamped(self, packed: Tensor, update: bool) -> Tensor:
        # No row on any rank leaves 0 / 1: a reference point of 0, which is APO-zero's.
        estimate = (packed[0] / packed[1].clamp(min=1.0)).clamp(min=0.0)
        if update:
            self.value = estimate
        return estimate


def _moments(log_ratios: Tensor, n: Tensor | int) -> Tensor:
    """(3,) sum, number ``n`` and sum of squares."""
    return torch.stack([log_ratios.sum(), torch.as_tensor(n).to(log_ratios), log_ratios.square().sum()])


def _standard_error(moments: Tensor) -> Tensor:
    """Of the mean, 0-dim; 0 for fewer than two rows."""
    total, n, squares = moments
    variance = (squares - total * total / n.clamp(min=1.0)) / (n - 1).clamp(min=1.0)
    return torch.where(n > 1, (variance.clamp(min=0.0) / n.clamp(min=1.0)).sqrt(), 0.0)


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
        log_ratios = checked("log_ratios", log_ratios, "nats")
        n = log_ratios.shape[0]
        return self._mean_over_ranks(log_ratios.sum() / max(n, 1), min(n, 1), update)


class WindowKL(_MeanKL):
    r"""One estimate per optimizer step: the mean over every row of the window on every rank.

    .. math:: z_0 = \max\Bigl(0, \frac{\sum_k \sum_i r_{k,i}}{\sum_k n_k}\Bigr)

    Call it once per optimizer step with the log-ratios of all micro-batches, concatenated: accumulation
    over small micro-batches then has the reference point of one large batch, with its smaller variance.
    Sum and count are reduced separately, so ranks may have different numbers of rows. ``standard_error`` is that of the
    last call's mean before the clamp, 0-dim fp32 in nats; 0 for fewer than two rows.

    Args:
        group: as in :class:`MicrobatchKL`.

    Example:
        >>> import torch
        >>> kl = WindowKL()
        >>> kl.estimate(torch.tensor([1.0, 3.0, 5.0])), kl.standard_error  # 2 / sqrt(3)
        (tensor(3.), tensor(1.1547))
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
        log_ratios = checked("log_ratios", log_ratios, "nats")
        packed = self._over_ranks(_moments(log_ratios, len(log_ratios)))
        self.standard_error = _standard_error(packed)
        return self._clamped(packed, update)


class EMAKL(AveragingEstimator):
    r"""An exponential average of the window means, clamped at 0 after the averaging.

    .. math:: N \leftarrow \rho N + (1 - \rho) \, \bar r, \quad D \leftarrow \rho D + (1 - \rho), \quad
              z_0 = \max(0, N / D)

    Call it once per optimizer step, as :class:`WindowKL`; ``standard_error`` is that of the window's mean, too. D
    corrects the start, so the first estimate is the first window's mean. Rows that are not finite, and a window
    without rows, leave the average alone.

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
        log_ratios = checked("log_ratios", log_ratios, "nats")
        self._follow(log_ratios.device)
        if update:
            finite = log_ratios.isfinite()
            packed = self._over_ranks(_moments(torch.where(finite, log_ratios, 0.0), finite.sum()))
            self.standard_error = _standard_error(packed)
            self.value = self._average(packed[0], packed[1]).clamp(min=0.0)
        return self.value
