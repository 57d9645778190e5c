"""BCO, Jung et al. 2024 (arXiv:2404.04656): binary cross-entropy of the shifted reward."""

import torch.nn.functional as F
from torch import Tensor

from prefopt_kernels._checks import check_baseline, check_positive, check_rows
from prefopt_kernels.losses._rows import constant, signed, widened


def bco_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    beta: float,
    shift: Tensor | float,
) -> Tensor:
    r"""BCO's loss, one value per row; the caller reduces.

    .. math:: \ell_i = -\log \sigma(u_i), \qquad
              u_i = s_i \, (\beta \, (\log\pi_i - \log\pi^{\mathrm{ref}}_i) - \delta)

    with :math:`s = +1` for a desirable row and :math:`-1` for another. The gradient to ``logps`` is
    :math:`-s \beta \, \sigma(-u)`: at most :math:`\beta`, and never zero for a row that is wrong, where
    KTO's fades. It is KTO's gradient at the same u, divided by :math:`\sigma(u)`.

    Args:
        logps: (B,) floating point, nats, summed over the completion's tokens. Policy.
        ref_logps: (B,) the same under the frozen reference model.
        labels: (B,) bool. True is desirable.
        beta: inverse temperature, 1/nats, finite and above 0.
        shift: :math:`\delta` in reward units (:math:`\beta` times nats), a number, a 0-dim tensor or
            (B,); a constant to the gradient. Estimators: :mod:`prefopt_kernels.reference_point`.

    Returns:
        (B,) fp32, 0 or above; ln 2 where the reward equals the shift. fp64 inputs stay fp64. For
        density-ratio weights (the paper's UDM) multiply the rows.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or range is wrong. Tensor values are
        not read; a NaN in a row stays a NaN in that row.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.bco import bco_loss
        >>> logps, labels = torch.tensor([-5.0, -5.0]), torch.tensor([True, False])
        >>> bco_loss(logps, logps - 20, labels, beta=0.1, shift=2.0)  # both rewards are 2
        tensor([0.6931, 0.6931])
    """
    check_rows(logps, ref_logps, labels)
    check_positive("beta", beta)
    check_baseline("shift", shift, logps, unit="reward, beta * nats")

    logps, ref_logps = widened(logps, ref_logps)
    rewards = beta * (logps - ref_logps)  # (B,)
    return -F.logsigmoid(signed(labels, rewards - constant(shift, logps)))
