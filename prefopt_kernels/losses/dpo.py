"""DPO, Rafailov et al. 2023 (arXiv:2305.18290), eq. 7, with label smoothing and the robust form.

Smoothing: conservative DPO, Mitchell 2023. Robust: Chowdhury et al. 2024 (arXiv:2403.00409).
"""

import torch.nn.functional as F
from torch import Tensor

from prefopt_kernels._checks import check_between, check_logps, check_positive
from prefopt_kernels.losses._rows import widened


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> Tensor:
    r"""DPO's loss, one value per pair; the caller reduces.

    .. math:: \ell = -(1 - \varepsilon) \log \sigma(x) - \varepsilon \log \sigma(-x), \qquad
              x = \beta \, (\log\tfrac{\pi_w}{\pi^{\mathrm{ref}}_w} - \log\tfrac{\pi_l}{\pi^{\mathrm{ref}}_l})

    and, robust, :math:`[-(1 - \varepsilon) \log \sigma(x) + \varepsilon \log \sigma(-x)] / (1 - 2\varepsilon)`,
    whose mean over labels flipped with probability :math:`\varepsilon` is DPO's loss on clean ones.

    The gradient to ``chosen_logps`` is :math:`-\beta [\sigma(-x) - \varepsilon]`, and robust
    :math:`-\beta [(1-\varepsilon) \sigma(-x) + \varepsilon \sigma(x)] / (1 - 2\varepsilon)`; to
    ``rejected_logps`` its opposite. Smoothing has its optimum at
    :math:`x = \log\tfrac{1-\varepsilon}{\varepsilon}`; the robust form has none, and without smoothing
    the gradient only fades. Size: at most :math:`\beta`; robust
    :math:`\beta (1 - \varepsilon) / (1 - 2\varepsilon)`. Only the difference counts: both
    log-probabilities may fall.

    Args:
        chosen_logps, rejected_logps: (P,) floating point, nats, summed over the completion's tokens. Policy.
        ref_chosen_logps, ref_rejected_logps: (P,) the same under the frozen reference model.
        beta: inverse temperature, 1/nats, finite and above 0.
        label_smoothing: probability that a pair's label is wrong, in [0, 0.5).
        robust: the unbiased form instead of the conservative one.

    Returns:
        (P,) fp32, ln 2 where policy and reference model agree; fp64 inputs stay fp64. Robust values may be
        negative.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or range is wrong. Tensor values are not
        read; a NaN in a pair stays a NaN in that pair.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.dpo import dpo_loss
        >>> chosen, rejected = torch.tensor([-10.0, -10.0]), torch.tensor([-10.0, -20.0])
        >>> dpo_loss(chosen, rejected, chosen, torch.tensor([-10.0, -10.0]), beta=0.1)  # x is 0 and 1
        tensor([0.6931, 0.3133])
    """
    check_logps(
        "P",
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    check_positive("beta", beta)
    check_between("label_smoothing", label_smoothing, 0, 0.5, open_high=True)

    chosen, rejected, ref_chosen, ref_rejected = widened(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    x = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))  # (P,)
    loss = -F.logsigmoid(x)
    if label_smoothing == 0:
        return loss
    flipped = -F.logsigmoid(-x)
    if robust:
        return ((1 - label_smoothing) * loss - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * loss + label_smoothing * flipped
