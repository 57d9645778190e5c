"""Supervised fine-tuning: the negative log-likelihood per token of each completion."""

from torch import Tensor

from prefopt_kernels._checks import check_lengths, check_logps
from prefopt_kernels.losses._rows import per_token, widened


def sft_loss(logps: Tensor, lengths: Tensor) -> Tensor:
    r"""Negative log-likelihood per token, one value per row; the caller reduces.

    .. math:: \ell_i = -\log\pi_i / T_i

    Its plain mean gives every row the same weight. The mean over tokens, which transformers' Trainer
    takes, is the mean weighted by T: ``(loss * lengths).sum() / lengths.sum()``. The gradient to ``logps``
    is :math:`-1 / T`.

    Args:
        logps: (B,) floating point, nats, summed over the completion's tokens.
        lengths: (B,) integers, tokens of the completion; 0 is taken as 1.

    Returns:
        (B,) fp32, 0 or above, nats per token; fp64 inputs stay fp64.

    Raises:
        TypeError, ValueError: an argument's type, dtype or shape is wrong.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.sft import sft_loss
        >>> sft_loss(torch.tensor([-8.0, -3.0]), torch.tensor([4, 1]))
        tensor([2., 3.])
    """
    check_logps("B", logps=logps)
    check_lengths(logps, lengths=lengths)
    (logps,) = widened(logps)
    return -per_token(logps, lengths)
