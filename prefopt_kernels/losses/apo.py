"""APO-zero for unpaired rows, D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7."""

from torch import Tensor

from prefopt_kernels.losses.kto import kto_loss


def apo_zero_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""KTO anchored at the reference model itself: :func:`kto_loss` with ``reference_point`` 0.

    .. math:: \ell_i = \lambda_i \, \sigma(-s_i \, \beta \, (\log\pi_i - \log\pi^{\mathrm{ref}}_i))

    No mismatched completions are scored, so a step needs no second pass over the model.

    Args:
        logps, ref_logps: (B,) floating point, nats, summed over the completion's tokens.
        labels: (B,) bool. True is desirable.
        beta: inverse temperature, 1/nats, finite and above 0.
        desirable_weight, undesirable_weight: finite, 0 or above. They multiply the row's loss.

    Returns:
        (B,) fp32, between 0 and the row's weight; fp64 inputs stay fp64.

    Raises:
        TypeError, ValueError: as :func:`kto_loss`.

    Example:
        >>> import torch
        >>> from prefopt_kernels.losses.apo import apo_zero_loss
        >>> logps, ref_logps = torch.tensor([-10.0, -10.0]), torch.tensor([-20.0, -20.0])
        >>> apo_zero_loss(logps, ref_logps, torch.tensor([True, False]), beta=0.1)
        tensor([0.2689, 0.7311])
    """
    return kto_loss(
        logps,
        ref_logps,
        labels,
        beta=beta,
        reference_point=0.0,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
