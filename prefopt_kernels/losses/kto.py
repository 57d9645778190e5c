"""KTO, Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8, in the form with a reference point z0."""

import torch
from torch import Tensor

from prefopt_kernels._checks import check_baseline, check_positive, check_rows, check_weight
from prefopt_kernels.losses._rows import constant, signed, widened


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    beta: float,
    reference_point: Tensor | float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""KTO's loss, one value per row; the caller reduces.

    .. math:: \ell_i = \lambda_i \, \sigma(-u_i), \qquad
              u_i = s_i \, \beta \, (\log\pi_i - \log\pi^{\mathrm{ref}}_i - z_0)

    with :math:`s = +1` and ``desirable_weight`` for a desirable row, :math:`s = -1` and
    ``undesirable_weight`` for another. The gradient to ``logps`` is
    :math:`-s \lambda \beta \, \sigma(u) \sigma(-u)`: at most :math:`\lambda \beta / 4`, and zero on both
    far sides, so a row that is very wrong is ignored just as one that is very right.

    Args:
        logps: (B,) floating point, nats, summed over the completion's tokens. Policy.
        ref_logps: (B,) the same under the frozen reference model.
        labels: (B,) bool. True is desirable.
        beta: inverse temperature, 1/nats, finite and above 0.
        reference_point: z0 in nats, a number, a 0-dim tensor or (B,). Already clamped at 0 by its
            estimator (:mod:`prefopt_kernels.reference_point`); a constant to the gradient.
        desirable_weight, undesirable_weight: finite, 0 or above. They multiply the row's loss.

    Returns:
        (B,) fp32, between 0 and the row's weight; half the weight where policy and reference model
        agree and z0 is 0. Half-precision inputs are widened before the subtraction; fp64 stays fp64.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or range is wrong. Tensor values are
        not read, so nothing waits for a device; a NaN in a row stays a NaN in that row.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.kto import kto_loss
        >>> logps, labels = torch.tensor([-5.0, -5.0]), torch.tensor([True, False])
        >>> kto_loss(logps, logps, labels, beta=0.1, reference_point=0.0, desirable_weight=2.0)
        tensor([1.0000, 0.5000])
    """
    check_rows(logps, ref_logps, labels)
    check_positive("beta", beta)
    check_baseline("reference_point", reference_point, logps)
    check_weight("desirable_weight", desirable_weight)
    check_weight("undesirable_weight", undesirable_weight)

    logps, ref_logps = widened(logps, ref_logps)
    u = kto_margin(logps - ref_logps, labels, beta, constant(reference_point, logps))
    # sigmoid(-u), not 1 - sigmoid(u): the second is exactly 0 from u = 17 on in fp32.
    loss = torch.sigmoid(-u)
    return torch.where(labels, desirable_weight * loss, undesirable_weight * loss)


def kto_margin(log_ratios: Tensor, labels: Tensor, beta: float, reference_point: Tensor | float) -> Tensor:
    """(B,) u: how far a row is on its right side of the reference point, in reward units."""
    return signed(labels, beta * (log_ratios - reference_point))
