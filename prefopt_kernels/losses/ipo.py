"""IPO, Azar et al. 2023 (arXiv:2310.12036), eq. 17, on log-ratios per token."""

from torch import Tensor

from prefopt_kernels._checks import check_lengths, check_logps, check_positive
from prefopt_kernels.losses._rows import per_token, widened


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""IPO's loss, one value per pair; the caller reduces.

    .. math:: \ell = \Bigl(\Delta - \frac{1}{2\beta}\Bigr)^2, \qquad
              \Delta = \frac{1}{T_w} \log\frac{\pi_w}{\pi^{\mathrm{ref}}_w}
                     - \frac{1}{T_l} \log\frac{\pi_l}{\pi^{\mathrm{ref}}_l}

    The division by the tokens is that of TRL, which cites the paper's authors for it; the paper writes
    sums. The gradient to ``chosen_logps`` is :math:`2 (\Delta - 1/(2\beta)) / T_w`: it has a finite target,
    and no bound.

    Args:
        chosen_logps, rejected_logps: (P,) floating point, nats, summed over the completion's tokens. Policy.
        ref_chosen_logps, ref_rejected_logps: (P,) the same under the frozen reference model.
        chosen_lengths, rejected_lengths: (P,) integers, tokens of the completions; 0 is taken as 1.
        beta: the paper's tau, finite and above 0; the target of :math:`\Delta` is 1 / (2 beta) nats.

    Returns:
        (P,) fp32, 0 or above; fp64 inputs stay fp64.

    Raises:
        TypeError, ValueError: as :func:`prefopt_kernels.dpo_loss`.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.ipo import ipo_loss
        >>> zeros, lengths = torch.zeros(2), torch.tensor([4, 4])
        >>> ipo_loss(torch.tensor([0.0, 8.0]), zeros, zeros, zeros, lengths, lengths, beta=0.5)
        tensor([1., 1.])
    """
    check_logps(
        "P",
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    check_lengths(chosen_logps, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    check_positive("beta", beta)

    chosen, rejected, ref_chosen, ref_rejected = widened(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    delta = per_token(chosen - ref_chosen, chosen_lengths) - per_token(
        rejected - ref_rejected, rejected_lengths
    )  # (P,)
    return (delta - 1 / (2 * beta)) ** 2
