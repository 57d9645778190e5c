"""CPO, Xu et al. 2024 (arXiv:2401.08417), eq. 3: DPO against a uniform reference, anchored by the NLL."""

import torch.nn.functional as F
from torch import Tensor

from prefopt_kernels._checks import (
    check_lengths,
    check_logps,
    check_positive,
    check_weight,
)
from prefopt_kernels.losses._rows import per_token, widened


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float,
    alpha: float = 1.0,
) -> Tensor:
    r"""CPO's loss, one value per pair; the caller reduces. No reference model.

    .. math:: \ell = -\log \sigma(\beta \, (\log\pi_w - \log\pi_l)) - \alpha \, \frac{\log\pi_w}{T_w}

    The second term is the chosen completion's negative log-likelihood per token *of its row*. TRL takes
    the mean over all the chosen tokens of a batch, which is no function of one pair. Its number is
    ``cpo_loss(..., alpha=0).mean() + alpha * (-chosen_logps.sum() / chosen_lengths.sum())``; the two agree
    where all chosen completions are of one length.

    The gradient to ``chosen_logps`` is :math:`-\beta \sigma(-x) - \alpha / T_w` and to ``rejected_logps``
    :math:`\beta \sigma(-x)`, with x the argument of the sigmoid: at most :math:`\beta + \alpha / T_w`.

    Args:
        chosen_logps, rejected_logps: (P,) floating point, nats, summed over the completion's tokens. Policy.
        chosen_lengths: (P,) integers, tokens of the chosen completion; 0 is taken as 1.
        beta: inverse temperature, 1/nats, finite and above 0.
        alpha: weight of the likelihood term, finite, 0 or above.

    Returns:
        (P,) fp32; fp64 inputs stay fp64.

    Raises:
        TypeError, ValueError: as :func:`prefopt_kernels.dpo_loss`.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.cpo import cpo_loss
        >>> logps, lengths = torch.tensor([-8.0]), torch.tensor([4])
        >>> cpo_loss(logps, logps, lengths, beta=0.1)  # ln 2, and 2 nats per token
        tensor([2.6931])
    """
    check_logps("P", chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_lengths(chosen_logps, chosen_lengths=chosen_lengths)
    check_positive("beta", beta)
    check_weight("alpha", alpha)

    chosen, rejected = widened(chosen_logps, rejected_logps)
    loss = -F.logsigmoid(beta * (chosen - rejected))
    return loss - alpha * per_token(chosen, chosen_lengths)
