"""DPO with the signature of Liger's ``LigerFusedLinearDPOLoss`` and all of its loss types.

Types that ``prefopt_kernels.losses`` has are computed there; the formulas of the others are here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt_kernels.integrations.liger.pairs import PairLoss, Pairs
from prefopt_kernels.integrations.liger.scores import check_padded, reference_logps
from prefopt_kernels.losses import apo_zero_loss, bco_loss, dpo_loss, ipo_loss


def _unpaired(loss: Callable[..., Tensor], pairs: Pairs, **options: float) -> Tensor:
    """An unpaired loss of the chosen row as desirable plus that of the rejected row as undesirable."""
    desirable = torch.ones_like(pairs.chosen, dtype=torch.bool)
    chosen = loss(pairs.chosen, pairs.ref_chosen, desirable, **options)
    return chosen + loss(pairs.rejected, pairs.ref_rejected, ~desirable, **options)


def _margin(pairs: Pairs, options: "LigerFusedLinearDPOLoss") -> Tensor:
    """(P,) beta times the difference of the log-ratios."""
    return options.beta * (pairs.chosen_ratio - pairs.rejected_ratio)


def _hinge(pairs: Pairs, options: "LigerFusedLinearDPOLoss") -> Tensor:
    """arXiv:2305.10425 (SLiC-HF), with log-ratios in place of log-probabilities."""
    return torch.relu(1 - _margin(pairs, options))


def _exo_pair(pairs: Pairs, options: "LigerFusedLinearDPOLoss") -> Tensor:
    """arXiv:2402.00856, eq. 16: the divergence of (sigma(m), sigma(-m)) from (1 - eps, eps)."""
    margin = _margin(pairs, options)
    target = torch.tensor([options.label_smoothing], dtype=margin.dtype, device=margin.device)
    log_p, log_q = F.logsigmoid(margin), F.logsigmoid(-margin)
    return log_p.exp() * (log_p - torch.log1p(-target)) + log_q.exp() * (log_q - target.log())


def _nca_pair(pairs: Pairs, options: "LigerFusedLinearDPOLoss") -> Tensor:
    """arXiv:2402.05369, section 4, for pairs."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def _sppo_hard(pairs: Pairs, options: "LigerFusedLinearDPOLoss") -> Tensor:
    """arXiv:2405.00675, eq. 4.7, with probability 1 for the winner."""
    target = 0.5 / options.beta
    return (pairs.chosen_ratio - target).square() + (pairs.rejected_ratio + target).square()


def _apo_down(pairs: Pairs, options: "LigerFusedLinearDPOLoss") -> Tensor:
    """arXiv:2408.06266, eq. 8."""
    chosen = options.beta * pairs.chosen_ratio
    return torch.sigmoid(chosen) + torch.sigmoid(-_margin(pairs, options))


def _discopop(pairs: Pairs, options: "LigerFusedLinearDPOLoss") -> Tensor:
    """arXiv:2406.08414, eq. 5: logistic and exponential loss, mixed by the margin."""
    margin = _margin(pairs, options)
    mix = torch.sigmoid(margin / options.discopop_tau)
    return -F.logsigmoid(margin) * (1 - mix) + torch.exp(-margin) * mix


LOSS_TYPES: dict[str, Callable[[Pairs, "LigerFusedLinearDPOLoss"], Tensor]] = {
    "sigmoid": lambda pairs, o: dpo_loss(*pairs[:4], beta=o.beta),
    "hinge": _hinge,
    "ipo": lambda pairs, o: ipo_loss(*pairs, beta=o.beta),
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": lambda pairs, o: dpo_loss(*pairs[:4], beta=o.beta, label_smoothing=o.label_smoothing, robust=True),
    "bco_pair": lambda pairs, o: _unpaired(bco_loss, pairs, beta=o.beta, shift=0.0),
    "sppo_hard": _sppo_hard,
    "apo_zero": lambda pairs, o: _unpaired(apo_zero_loss, pairs, beta=o.beta),
    "apo_down": _apo_down,
    "discopop": _discopop,
}


@dataclass(eq=False, repr=False)
class LigerFusedLinearDPOLoss(PairLoss):
    r"""DPO and its variants with the interface of Liger's class.

    .. math:: L = \tfrac{1}{P} \sum_i \ell(\Delta_i) + \alpha \, \mathrm{NLL},
              \qquad \ell(\Delta) = -\log \sigma(\beta \Delta)

    with :math:`\Delta` the chosen log-ratio less the rejected one (arXiv:2305.18290, eq. 7), and NLL the mean over the
    tokens of the chosen completions.

    Args:
        ignore_index: target of a position that is not scored.
        beta: inverse temperature, 1/nats.
        alpha: weight of the NLL.
        compute_nll_loss: add the NLL.
        compiled, chunk_size: accepted, no effect.
        use_ref_model: subtract reference log-probabilities.
        average_log_prob: divide a sequence's sum by its number of scored tokens.
        loss_type: Liger's "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
            "apo_down" or "discopop"; or "ipo", which always divides by the number of tokens.
        label_smoothing: for "robust" and "exo_pair"; ignored by the others, as in Liger.
        discopop_tau: for "discopop".

    Raises:
        ValueError: an option out of range.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.liger import LigerFusedLinearDPOLoss
        >>> hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(8, 4)
        >>> target = torch.tensor([[1, 2, 3], [4, 5, 6]])  # a pair
        >>> loss, _ = LigerFusedLinearDPOLoss(use_ref_model=False)(weight, hidden, target)
        >>> loss  # ln 2: both are equally likely
        tensor(0.6931, grad_fn=<AddBackward0>)
    """

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    compute_nll_loss: bool = False
    compiled: bool = True
    use_ref_model: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type is {self.loss_type!r}; expected one of {tuple(LOSS_TYPES)}")
        if self.loss_type == "exo_pair" and not 0.0 < self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; expected above 0 and below 1 for exo_pair")
        if self.loss_type == "robust" and not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; expected from 0 to below 0.5 for robust")

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mean loss and the values that Liger logs.

        Args:
            lin_weight: (V, H), the head.
            _input: (2 P, L, H) hidden states that predict the targets, chosen first.
            target: (2 P, L) int64.
            bias: (V,) or None.
            ref_input, ref_weight, ref_bias: the same for the reference model; scored without gradient.

        Returns:
            loss, 0-dim fp32; and, without gradient, ``(chosen_logps (P,), rejected_logps (P,), chosen_logits_mean,
            rejected_logits_mean, nll_loss, chosen_rewards (P,), rejected_rewards (P,))``. The logits are averaged over
            the vocabulary and all positions, padding included, as in Liger.

        Raises:
            TypeError, ValueError: an argument is missing or has the wrong type or shape.
        """
        check_padded(_input, target)
        ref_logps = reference_logps(
            self.use_ref_model,
            ref_input,
            ref_weight,
            target,
            ref_bias,
            ignore_index=self.ignore_index,
            average=self.average_log_prob,
        )
        pairs, nll, logged = self._score_pairs(lin_weight, _input, target, bias, ref_logps=ref_logps)
        if self.average_log_prob:  # the log-probabilities are means already
            ones = torch.ones_like(pairs.chosen_lengths)
            pairs = pairs._replace(chosen_lengths=ones, rejected_lengths=ones)
        return LOSS_TYPES[self.loss_type](pairs, self).mean() + nll, logged
