"""ORPO, Hong et al. 2024 (arXiv:2403.07691), eq. 6 and 7."""

import torch.nn.functional as F
from torch import Tensor

from prefopt_kernels._checks import check_lengths, check_logps, check_weight
from prefopt_kernels.losses._odds import log_odds
from prefopt_kernels.losses._rows import per_token, widened


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    odds_weight: float,
) -> Tensor:
    r"""ORPO's loss, one value per pair; the caller reduces. No reference model.

    .. math:: \ell = -m_w - \lambda \log \sigma(o_w - o_l), \qquad
              m = \log\pi / T, \quad o = m - \log(1 - e^m)

    The gradient of the second term to ``chosen_logps`` is
    :math:`-\lambda \, \sigma(o_l - o_w) / ((1 - e^{m_w}) \, T_w)`, to ``rejected_logps`` the opposite with
    its own m and T. It grows without bound as a mean token probability goes to 1, so log-odds go on along
    their tangent from m = -1e-4 on: below :math:`10^4 \lambda / T`, and finite at probability 1.

    Args:
        chosen_logps, rejected_logps: (P,) floating point, nats, summed over the completion's tokens. Policy.
        chosen_lengths, rejected_lengths: (P,) integers, tokens of the completions; 0 is taken as 1.
        odds_weight: the paper's lambda (TRL calls it beta), finite, 0 or above.

    Returns:
        (P,) fp32, 0 or above; fp64 inputs stay fp64. The likelihood is that of the row's completion; TRL
        takes the mean over all tokens of the batch's chosen sequences, prompts included.

    Raises:
        TypeError, ValueError: as :func:`prefopt_kernels.dpo_loss`.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.orpo import orpo_loss
        >>> logps, lengths = torch.tensor([-8.0]), torch.tensor([4])
        >>> orpo_loss(logps, logps, lengths, lengths, odds_weight=1.0)  # 2 nats per token, and ln 2
        tensor([2.6931])
    """
    check_logps("P", chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_lengths(chosen_logps, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    check_weight("odds_weight", odds_weight)

    chosen, rejected = widened(chosen_logps, rejected_logps)
    chosen, rejected = per_token(chosen, chosen_lengths), per_token(rejected, rejected_lengths)
    return -chosen - odds_weight * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
