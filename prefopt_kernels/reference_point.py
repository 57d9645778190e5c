"""KTO's reference point z0: the mean log-ratio of mismatched completions, clamped at 0 last.

A mismatched row is a prompt with another prompt's completion. How far the policy has drifted on those,
in nats, is the baseline that KTO subtracts from every row (arXiv:2402.01306, section 4.1). It is a
constant to the gradient. Two estimators, one interface; both reduce over the ranks of a process group.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class _ReferencePoint:
    """The last estimate, its state_dict, and the one collective that both estimators need."""

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        self.group = group
        self.value = torch.zeros(())  # 0-dim fp32, nats

    def state_dict(self) -> dict[str, Tensor]:
        """``{"value": 0-dim fp32}``, a copy."""
        return {"value": self.value.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: a key is missing or unknown, or the value is not a 0-dim tensor.
        """
        if set(state) != {"value"}:
            raise ValueError(f"state has the keys {sorted(state)}; expected exactly ['value']")
        value = state["value"]
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"state['value'] is {got}; expected a 0-dim tensor")
        self.value = value.detach().to(torch.float32).clone()

    def _mean_over_ranks(self, numerator: Tensor, denominator: int, update: bool) -> Tensor:
        """Sum both over the ranks in one all-reduce, divide, clamp, remember."""
        packed = torch.stack([numerator, numerator.new_tensor(float(denominator))])  # (2,)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(packed, group=self.group)
        # No row on any rank leaves 0 / 1: a reference point of 0, which is APO-zero's.
        estimate = (packed[0] / packed[1].clamp(min=1.0)).clamp(min=0.0)
        if update:
            self.value = estimate
        return estimate


class MicrobatchKL(_ReferencePoint):
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
        log_ratios = _checked(log_ratios)
        n = log_ratios.shape[0]
        return self._mean_over_ranks(log_ratios.sum() / max(n, 1), min(n, 1), update)


class WindowKL(_ReferencePoint):
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
        log_ratios = _checked(log_ratios)
        return self._mean_over_ranks(log_ratios.sum(), log_ratios.shape[0], update)


def _checked(log_ratios: Tensor) -> Tensor:
    if not isinstance(log_ratios, Tensor):
        raise TypeError(f"log_ratios is a {type(log_ratios).__name__}; expected a tensor (n,)")
    if not log_ratios.is_floating_point():
        raise TypeError(f"log_ratios has dtype {log_ratios.dtype}; expected floating point (nats)")
    if log_ratios.ndim != 1:
        raise ValueError(f"log_ratios has shape {tuple(log_ratios.shape)}; expected (n,)")
    return log_ratios.detach().to(torch.float32)
