"""KTO with the signature of Liger's ``LigerFusedLinearKTOLoss``, on ``linear_logprob`` and ``kto_loss``."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations.liger.scores import check_padded, logit_sums, reference_logps, score
from prefopt_kernels.losses import kto_loss


@dataclass(eq=False, repr=False)
class LigerFusedLinearKTOLoss(nn.Module):
    r"""KTO over padded sequences with the interface of Liger's class.

    .. math:: L = \tfrac{1}{B} \sum_i \sigma\bigl(-s_i \, \beta \, (r_i - \mathrm{kl}_i)\bigr)

    with :math:`r` the log-ratio of policy and reference (arXiv:2402.01306, eq. 8).

    Args:
        ignore_index: target of a position that is not scored.
        beta: inverse temperature, 1/nats.
        compiled, chunk_size: accepted, no effect; there are no logits to chunk.
        use_ref_model: subtract reference log-probabilities.
        average_log_prob: divide a sequence's sum by its number of scored tokens.

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

    ignore_index: int = -100
    beta: float = 0.1
    compiled: bool = True
    use_ref_model: bool = False
    average_log_prob: bool = False
    chunk_size: int = 1

    def __post_init__(self) -> None:
        super().__init__()

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
        kl: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mean loss and Liger's six sums.

        Args:
            _input: (B, L, H) hidden states that predict the targets, or (B * L, H).
            lin_weight: (V, H), the head.
            target: (B, L), or (B * L,), int64.
            bias: (V,) or None.
            preference_labels: (B,) bool. True is desirable.
            ref_input, ref_weight, ref_bias: the same for the reference model; scored without gradient.
            kl: the reference point, nats: None for 0, one number, or (B,). Treated as a constant.

        Returns:
            loss, 0-dim fp32; and, without gradient, 0-dim fp32 sums over the desirable and the undesirable rows:
            ``(chosen_logps, rejected_logps, chosen_logits, rejected_logits, chosen_rewards, rejected_rewards)``. The
            logits are summed over the vocabulary and all positions, padding included, as in Liger.

        Raises:
            TypeError, ValueError: an argument is missing or has the wrong type or shape.
        """
        if not isinstance(preference_labels, Tensor) or preference_labels.ndim != 1:
            given = preference_labels
            got = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
            raise ValueError(f"preference_labels is {got}; expected a bool tensor (B,)")
        B = preference_labels.shape[0]
        _input, target = _unflattened(_input, B), _unflattened(target, B)
        ref_input = None if ref_input is None else _unflattened(ref_input, B)
        check_padded(_input, target)
        reference_point = _reference_point(kl, B)

        ignore_index, average = self.ignore_index, self.average_log_prob
        ref_logps = reference_logps(
            self.use_ref_model, ref_input, ref_weight, target, ref_bias, ignore_index=ignore_index, average=average
        )
        logps = score(_input, lin_weight, target, bias, ignore_index=ignore_index, average=average).logps
        losses = kto_loss(logps, ref_logps, preference_labels, beta=self.beta, reference_point=reference_point)
        logged = (
            logps.detach(),
            logit_sums(_input, lin_weight, bias),
            self.beta * (logps.detach() - ref_logps),
        )
        sides = (preference_labels, ~preference_labels)
        return losses.mean(), tuple(torch.where(side, value, 0.0).sum() for value in logged for side in sides)


def _unflattened(value: Tensor, B: int) -> Tensor:
    """(B, L, ...) from (B * L, ...); other shapes are returned unchanged."""
    flat = value.ndim == (2 if value.is_floating_point() else 1)
    return value.unflatten(0, (B, -1)) if flat and B and value.shape[0] % B == 0 else value


def _reference_point(kl: Tensor | float | None, B: int) -> Tensor | float:
    if not isinstance(kl, Tensor):
        return float(kl or 0.0)
    if kl.numel() == 1:
        return kl.detach().reshape(())
    if kl.shape != (B,):
        raise ValueError(f"kl has shape {tuple(kl.shape)}; expected one number or ({B},)")
    return kl.detach()
