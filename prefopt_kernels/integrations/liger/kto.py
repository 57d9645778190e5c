"""KTO with the signature of Liger's ``LigerFusedLinearKTOLoss``, on ``linear_logprob`` and ``kto_loss``."""

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations.liger.scores import (
    check_padded,
    check_reference,
    logit_sums,
    score,
)
from prefopt_kernels.losses import kto_loss


class LigerFusedLinearKTOLoss(nn.Module):
    r"""KTO over padded sequences, called as Liger's class is.

    .. math:: L = \tfrac{1}{B} \sum_i \sigma\bigl(-s_i \, \beta \, (r_i - \mathrm{kl}_i)\bigr)

    with :math:`r` the log-ratio of policy and reference (arXiv:2402.01306, eq. 8). Liger's documented shapes hold:
    ``kl`` may be one number or (B,), where Liger with its default chunk size counts every row against every entry.

    Args:
        ignore_index: target of a position that does not count.
        beta: inverse temperature, 1/nats.
        compiled, chunk_size: taken and without effect; there are no logits to chunk.
        use_ref_model: whether the log-ratio has a reference.
        average_log_prob: divide a sequence's sum by its tokens.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.liger import LigerFusedLinearKTOLoss
        >>> hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(8, 4)
        >>> loss, (chosen_logps, *_) = LigerFusedLinearKTOLoss()(
        ...     hidden, weight, torch.tensor([[1, 2, -100], [3, 4, 5]]),
        ...     preference_labels=torch.tensor([True, False]), kl=torch.tensor([0.0, 0.0]))
        >>> bool(chosen_logps == -2 * torch.tensor(8.0).log())  # two tokens, each 1/8
        True
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mean loss and Liger's six sums.

        Args:
            _input: (B, L, H) hidden states that predict the targets, or (B * L, H).
            lin_weight: (V, H), the head.
            target: (B, L), or (B * L,), int64.
            bias: (V,) or None.
            preference_labels: (B,) bool. True is desirable.
            ref_input, ref_weight, ref_bias: the same of the reference model; scored without gradient.
            kl: the reference point, nats: None for 0, one number, or (B,). A constant to the gradient.

        Returns:
            loss, 0-dim fp32; and, without gradient, 0-dim fp32 sums over the desirable and the undesirable rows:
            ``(chosen_logps, rejected_logps, chosen_logits, rejected_logits, chosen_rewards, rejected_rewards)``. The
            logits are summed over the vocabulary and all positions, padding too, as Liger does.

        Raises:
            TypeError, ValueError: an argument is missing or of the wrong type or shape.
        """
        if not isinstance(preference_labels, Tensor) or preference_labels.ndim != 1:
            raise ValueError(f"preference_labels is {_shape(preference_labels)}; expected a bool tensor (B,)")
        B = preference_labels.shape[0]
        _input, target = _padded(_input, B), _padded(target, B)
        ref_input = None if ref_input is None else _padded(ref_input, B)
        check_padded(_input, target)
        check_reference(self.use_ref_model, target, ref_input, ref_weight)
        reference_point = _per_row(kl, B)

        how = {"ignore_index": self.ignore_index, "average": self.average_log_prob}
        logps = score(_input, lin_weight, target, bias, **how).logps
        ref_logps = torch.zeros_like(logps)
        if self.use_ref_model:
            with torch.no_grad():
                ref_logps = score(ref_input, ref_weight, target, ref_bias, **how).logps
        losses = kto_loss(logps, ref_logps, preference_labels, beta=self.beta, reference_point=reference_point)
        logged = (
            logps.detach(),
            logit_sums(_input, lin_weight, bias),
            self.beta * (logps.detach() - ref_logps),
        )
        sides = (preference_labels, ~preference_labels)
        return losses.mean(), tuple(torch.where(side, value, 0.0).sum() for value in logged for side in sides)


def _padded(value: Tensor, B: int) -> Tensor:
    """(B, L, ...) of (B * L, ...); what is padded already stays as it is."""
    flat = value.ndim == (2 if value.is_floating_point() else 1)
    return value.unflatten(0, (B, -1)) if flat and B and value.shape[0] % B == 0 else value


def _per_row(kl: Tensor | float | None, B: int) -> Tensor | float:
    if kl is None:
        return 0.0
    if not isinstance(kl, Tensor):
        return float(kl)
    if kl.numel() == 1:
        return kl.detach().reshape(())
    if kl.shape != (B,):
        raise ValueError(f"kl has shape {tuple(kl.shape)}; expected one number or ({B},)")
    return kl.detach()


def _shape(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
