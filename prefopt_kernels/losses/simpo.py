"""SimPO, Meng et al. 2024 (arXiv:2405.14734), eq. 6."""

import torch.nn.functional as F
from torch import Tensor

from prefopt_kernels._checks import (
    check_lengths,
    check_logps,
    check_positive,
    check_weight,
)
from prefopt_kernels.losses._rows import per_token, widened


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float,
) -> Tensor:
    r"""SimPO's loss, one value per pair; the caller reduces. No reference model.

    .. math:: \ell = -\log \sigma(x), \qquad
              x = \beta \, (\log\pi_w / T_w - \log\pi_l / T_l) - \gamma

    The gradient to ``chosen_logps`` is :math:`-(\beta / T_w) \, \sigma(-x)` and to ``rejected_logps``
    :math:`(\beta / T_l) \, \sigma(-x)`: at most :math:`\beta / T`. Nothing anchors the policy; the paper
    uses beta from 2 to 10 and gamma from .3 to .5 times beta (some of them higher).

    Args:
        chosen_logps, rejected_logps: (P,) floating point, nats, summed over the completion's tokens. Policy.
        chosen_lengths, rejected_lengths: (P,) integers, tokens of the completions; 0 is taken as 1.
        beta: inverse temperature, finite and above 0.
        gamma: target margin in reward units (beta times nats per token), finite, 0 or above.

    Returns:
        (P,) fp32, 0 or above; fp64 inputs stay fp64.

    Raises:
        TypeError, ValueError: as :func:`prefopt_kernels.dpo_loss`.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.simpo import simpo_loss
        >>> lengths = torch.tensor([4])
        >>> simpo_loss(torch.tensor([-4.0]), torch.tensor([-8.0]), lengths, lengths, beta=2.0, gamma=2.0)
        tensor([0.6931])
    """
    check_logps("P", chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_lengths(chosen_logps, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    check_positive("beta", beta)
    check_weight("gamma", gamma)

    chosen, rejected = widened(chosen_logps, rejected_logps)
    margin = per_token(chosen, chosen_lengths) - per_token(rejected, rejected_lengths)  # (P,)
    return -F.logsigmoid(beta * margin - gamma)
