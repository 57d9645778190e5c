"""CPO, SimPO and ORPO with the signatures of Liger's classes, and the base class they share with DPO (dpo.py).

Rows are in Liger's order: the P chosen sequences first, then the P rejected ones, padded to one length.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt_kernels.integrations.liger.scores import check_padded, logit_sums, score
from prefopt_kernels.losses import dpo_loss, orpo_loss
from prefopt_kernels.losses._odds import log_odds


class Pairs(NamedTuple):
    """P pairs; log-probabilities in nats, fp32."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    ref_chosen: Tensor  # (P,), 0 without a reference
    ref_rejected: Tensor  # (P,)
    chosen_lengths: Tensor  # (P,) int64, 1 or more
    rejected_lengths: Tensor  # (P,)

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected


class PairLoss(nn.Module):
    """What all losses of pairs compute and log. Subclasses are dataclasses of their options, in Liger's order."""

    ignore_index: int
    beta: float
    compute_nll_loss: bool
    alpha: float = 1.0
    label_smoothing: float = 0.0
    average_log_prob: bool = True

    def __post_init__(self) -> None:
        super().__init__()

    def _score_pairs(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None,
        nll_target: Tensor | None = None,
        ref_logps: Tensor | None = None,
    ) -> tuple[Pairs, Tensor, tuple[Tensor, ...]]:
        """The pairs; alpha times the NLL; and Liger's seven logged values."""
        check_padded(_input, target)
        if target.shape[0] % 2 or not target.shape[0]:
            raise ValueError(
                f"target has {target.shape[0]} rows; expected 2 P, the chosen rows and then the rejected rows"
            )
        P = target.shape[0] // 2
        scores = score(_input, lin_weight, target, bias, ignore_index=self.ignore_index, average=self.average_log_prob)
        if ref_logps is None:
            ref_logps = torch.zeros_like(scores.logps)
        pairs = Pairs(
            *scores.logps.split(P),
            *ref_logps.split(P),
            *(n.clamp(min=1) for n in scores.lengths.split(P)),
        )
        nll = torch.zeros_like(scores.logps[0])
        if self.compute_nll_loss:
            total, number = scores.logp_sums[:P].sum(), scores.lengths[:P].sum()
            if nll_target is not None:
                check_padded(_input, nll_target)
                chosen = score(_input[:P], lin_weight, nll_target[:P], bias, ignore_index=self.ignore_index)
                total, number = chosen.logp_sums.sum(), chosen.lengths.sum()
            nll = -total / number.clamp(min=1)
        logits = logit_sums(_input, lin_weight, bias) / (P * target.shape[1] * lin_weight.shape[0])
        rewards = (self.beta * pairs.chosen_ratio, self.beta * pairs.rejected_ratio)
        logged = (pairs.chosen, pairs.rejected, *(side.sum() for side in logits.split(P)), nll, *rewards)
        return pairs, self.alpha * nll, tuple(value.detach() for value in logged)


class ReferenceFreeLoss(PairLoss):
    """CPO and SimPO: the DPO loss without a reference model, and for SimPO with a target margin."""

    gamma: float = 0.0

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As ``LigerFusedLinearDPOLoss.forward`` without a reference; rewards are beta times log-probabilities."""
        pairs, nll, logged = self._score_pairs(lin_weight, _input, target, bias)
        losses = dpo_loss(
            pairs.chosen,
            pairs.rejected,
            pairs.ref_chosen + self.gamma / self.beta,  # a constant log-ratio shifts the margin
            pairs.ref_rejected,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        return losses.mean() + nll, logged


@dataclass(eq=False, repr=False)
class LigerFusedLinearCPOLoss(ReferenceFreeLoss):
    r"""CPO with the interface of Liger's class.

    .. math:: L = -\tfrac{1}{P} \sum_i \log \sigma\bigl(\beta (l_{w,i} - l_{l,i})\bigr) + \alpha \, \mathrm{NLL}

    arXiv:2401.08417, eq. 3, with the NLL as a mean over the chosen completions' tokens. With ``label_smoothing`` the
    first term is conservative DPO's without a reference.

    Args:
        ignore_index, beta, alpha, compute_nll_loss, compiled, average_log_prob, chunk_size: as for
            ``LigerFusedLinearDPOLoss``; the NLL is on by default.
        label_smoothing: from 0 to below 0.5.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.liger import LigerFusedLinearCPOLoss
        >>> hidden, weight = torch.zeros(2, 3, 4), torch.zeros(8, 4)
        >>> LigerFusedLinearCPOLoss()(weight, hidden, torch.tensor([[1, 2, 3], [4, 5, 6]]))[0]  # ln 2 + ln 8
        tensor(2.7726)
    """

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1


@dataclass(eq=False, repr=False)
class LigerFusedLinearSimPOLoss(ReferenceFreeLoss):
    r"""SimPO with the interface of Liger's class.

    .. math:: L = -\tfrac{1}{P} \sum_i \log \sigma\bigl(\beta (m_{w,i} - m_{l,i}) - \gamma\bigr) + \alpha\,\mathrm{NLL}

    with m the mean log-probability per token of a completion (arXiv:2405.14734, eq. 6). The NLL, which the paper does
    not have, is on by default as in Liger; ``compute_nll_loss=False`` removes it.

    Args:
        ignore_index, beta, alpha, label_smoothing, compute_nll_loss, compiled, chunk_size: as for
            :class:`LigerFusedLinearCPOLoss`.
        gamma: target margin, in units of beta times a mean log-probability.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.liger import LigerFusedLinearSimPOLoss
        >>> hidden, weight = torch.zeros(2, 3, 4), torch.zeros(8, 4)
        >>> targets = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> LigerFusedLinearSimPOLoss(compute_nll_loss=False, gamma=0.0)(weight, hidden, targets)[0]
        tensor(0.6931)
    """

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    gamma: float = 0.5
    chunk_size: int = 1


@dataclass(eq=False, repr=False)
class LigerFusedLinearORPOLoss(PairLoss):
    r"""ORPO with the interface of Liger's class.

    .. math:: L = \mathrm{NLL} - \tfrac{\beta}{P} \sum_i \log \sigma(o_{w,i} - o_{l,i}),
              \qquad o = m - \log(1 - e^m)

    with m the mean log-probability per token of a completion (arXiv:2403.07691, eq. 6 and 7). Finite up to probability
    1, where Liger's form divides by zero.

    Args:
        ignore_index, compute_nll_loss, compiled, chunk_size: as for :class:`LigerFusedLinearCPOLoss`.
        beta: weight of the odds ratio.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.liger import LigerFusedLinearORPOLoss
        >>> hidden, weight = torch.zeros(2, 3, 4), torch.zeros(8, 4)
        >>> LigerFusedLinearORPOLoss(beta=1.0)(weight, hidden, torch.tensor([[1, 2, 3], [4, 5, 6]]))[0]  # ln 8 + ln 2
        tensor(2.7726)
    """

    ignore_index: int = -100
    beta: float = 0.1
    compute_nll_loss: bool = True
    compiled: bool = True
    chunk_size: int = 1

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As :meth:`LigerFusedLinearCPOLoss.forward`, with two more logged values.

        Args:
            lin_weight, _input, target, bias: as there.
            nll_target: (2 P, L), targets of the NLL where they differ from ``target``; only the chosen half is used, in
                a forward pass of its own.

        Returns:
            The loss, and the seven values followed by the means of the log odds ratio's log-sigmoid and of the log odds
            ratio itself.
        """
        pairs, nll, logged = self._score_pairs(lin_weight, _input, target, bias, nll_target)
        ones = torch.ones_like(pairs.chosen_lengths)  # the log-probabilities are means already
        losses = orpo_loss(pairs.chosen, pairs.rejected, ones, ones, odds_weight=self.beta)
        losses = losses + pairs.chosen  # remove the per-row NLL: Liger's NLL is one mean over all tokens
        ratio = log_odds(pairs.chosen.detach()) - log_odds(pairs.rejected.detach())  # (P,)
        return losses.mean() + nll, (*logged, F.logsigmoid(ratio).mean(), ratio.mean())
