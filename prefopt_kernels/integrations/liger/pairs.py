"""CPO, SimPO and ORPO with the signatures of Liger's classes, and what they share with DPO's (dpo.py).

Rows come as Liger wants them: the P chosen sequences first, then the P rejected ones, padded to one length.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt_kernels.integrations.liger.scores import check_padded, logit_sums, score
from prefopt_kernels.losses import dpo_loss, orpo_loss
from prefopt_kernels.losses._odds import log_odds


class Pairs(NamedTuple):
    """P pairs; log-probabilities in nats, fp32, and 0 where there is no reference."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    chosen_lengths: Tensor  # (P,) int64, 1 or more
    rejected_lengths: Tensor  # (P,)
    ref_chosen: Tensor | None = None  # (P,)
    ref_rejected: Tensor | None = None  # (P,)

    @property
    def references(self) -> tuple[Tensor, Tensor]:
        if self.ref_chosen is None:
            return torch.zeros_like(self.chosen), torch.zeros_like(self.rejected)
        return self.ref_chosen, self.ref_rejected

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.references[0]

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.references[1]

    @property
    def all_logps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.chosen, self.rejected, *self.references


class PairLoss(nn.Module):
    """Score, mix in the negative log-likelihood of the chosen completions, log what Liger logs."""

    average_log_prob = True  # ORPO and SimPO; the others have it as an option
    alpha = 1.0  # ORPO has no such option

    def _scored(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None,
        nll_target: Tensor | None = None,
    ) -> tuple[Pairs, Tensor, tuple[Tensor, ...]]:
        """The pairs; alpha times the NLL; and Liger's first five results: logps, mean logits and NLL."""
        check_padded(_input, target)
        if target.shape[0] % 2 or not target.shape[0]:
            raise ValueError(
                f"target has {target.shape[0]} rows; expected 2 P, the chosen ones and then the rejected ones"
            )
        P = target.shape[0] // 2
        scores = score(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            average=self.average_log_prob,
        )
        pairs = Pairs(*scores.logps.split(P), *(n.clamp(min=1) for n in scores.lengths.split(P)))
        nll = torch.zeros_like(scores.logps[0])
        if self.compute_nll_loss:
            total, number = scores.logp_sums[:P].sum(), scores.lengths[:P].sum()
            if nll_target is not None:
                check_padded(_input, nll_target)
                chosen = score(_input[:P], lin_weight, nll_target[:P], bias, ignore_index=self.ignore_index)
                total, number = chosen.logp_sums.sum(), chosen.lengths.sum()
            nll = -total / number.clamp(min=1)
        logits = logit_sums(_input, lin_weight, bias) / (P * target.shape[1] * lin_weight.shape[0])
        logged = (pairs.chosen, pairs.rejected, *(side.sum() for side in logits.split(P)), nll)
        return pairs, self.alpha * nll, tuple(value.detach() for value in logged)


class LigerFusedLinearCPOLoss(PairLoss):
    r"""CPO, called as Liger's class is.

    .. math:: L = -\tfrac{1}{P} \sum_i \log \sigma\bigl(\beta (l_{w,i} - l_{l,i})\bigr) + \alpha \, \mathrm{NLL}

    arXiv:2401.08417, eq. 3, with the NLL as a mean over the chosen completions' tokens. With ``label_smoothing`` the
    first part is conservative DPO's without a reference.

    Args:
        ignore_index, beta, alpha, compute_nll_loss, compiled, average_log_prob, chunk_size: as
            ``LigerFusedLinearDPOLoss``, with the NLL on.
        label_smoothing: from 0 to below 0.5.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.liger import LigerFusedLinearCPOLoss
        >>> hidden, weight = torch.zeros(2, 3, 4), torch.zeros(8, 4)
        >>> LigerFusedLinearCPOLoss()(weight, hidden, torch.tensor([[1, 2, 3], [4, 5, 6]]))[0]  # ln 2 + ln 8
        tensor(2.7726)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As ``LigerFusedLinearDPOLoss.forward`` without a reference; rewards are beta times log-probabilities."""
        pairs, nll, logged = self._scored(lin_weight, _input, target, bias)
        losses = _without_reference(pairs, self)
        rewards = (self.beta * pairs.chosen.detach(), self.beta * pairs.rejected.detach())
        return losses.mean() + nll, (*logged, *rewards)


class LigerFusedLinearSimPOLoss(PairLoss):
    r"""SimPO, called as Liger's class is.

    .. math:: L = -\tfrac{1}{P} \sum_i \log \sigma\bigl(\beta (m_{w,i} - m_{l,i}) - \gamma\bigr) + \alpha\,\mathrm{NLL}

    with m the mean log-probability of a completion's token (arXiv:2405.14734, eq. 6). As in Liger the NLL, which the
    paper does not have, is on unless ``compute_nll_loss=False``.

    Args:
        ignore_index, beta, alpha, label_smoothing, compute_nll_loss, compiled, chunk_size: as
            :class:`LigerFusedLinearCPOLoss`.
        gamma: the margin to reach.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.liger import LigerFusedLinearSimPOLoss
        >>> hidden, weight = torch.zeros(2, 3, 4), torch.zeros(8, 4)
        >>> targets = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> LigerFusedLinearSimPOLoss(compute_nll_loss=False, gamma=0.0)(weight, hidden, targets)[0]
        tensor(0.6931)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.gamma = gamma
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As :meth:`LigerFusedLinearCPOLoss.forward`, with mean log-probabilities."""
        pairs, nll, logged = self._scored(lin_weight, _input, target, bias)
        losses = _without_reference(pairs, self, margin=self.gamma)
        rewards = (self.beta * pairs.chosen.detach(), self.beta * pairs.rejected.detach())
        return losses.mean() + nll, (*logged, *rewards)


class LigerFusedLinearORPOLoss(PairLoss):
    r"""ORPO, called as Liger's class is.

    .. math:: L = \mathrm{NLL} - \tfrac{\beta}{P} \sum_i \log \sigma(o_{w,i} - o_{l,i}),
              \qquad o = m - \log(1 - e^m)

    with m the mean log-probability of a completion's token (arXiv:2403.07691, eq. 6 and 7). Finite up to probability
    1, where Liger's form divides by zero.

    Args:
        ignore_index, compute_nll_loss, compiled, chunk_size: as :class:`LigerFusedLinearCPOLoss`.
        beta: weight of the odds ratio.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.liger import LigerFusedLinearORPOLoss
        >>> hidden, weight = torch.zeros(2, 3, 4), torch.zeros(8, 4)
        >>> LigerFusedLinearORPOLoss(beta=1.0)(weight, hidden, torch.tensor([[1, 2, 3], [4, 5, 6]]))[0]  # ln 8 + ln 2
        tensor(2.7726)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As :meth:`LigerFusedLinearCPOLoss.forward`; two more numbers are logged.

        Args:
            lin_weight, _input, target, bias: as there.
            nll_target: (2 P, L), targets of the NLL where they are not ``target``; only the chosen half is read, and
                scored by itself.

        Returns:
            The loss, and the seven values followed by the means of the log odds ratio's log-sigmoid and of the log odds
            ratio itself.
        """
        pairs, nll, logged = self._scored(lin_weight, _input, target, bias, nll_target)
        ones = torch.ones_like(pairs.chosen_lengths)  # divided already
        losses = orpo_loss(pairs.chosen, pairs.rejected, ones, ones, odds_weight=self.beta)
        losses = losses + pairs.chosen  # without the row's own likelihood: Liger's is one mean over all tokens
        ratio = log_odds(pairs.chosen.detach()) - log_odds(pairs.rejected.detach())  # (P,)
        rewards = (self.beta * pairs.chosen.detach(), self.beta * pairs.rejected.detach())
        return losses.mean() + nll, (*logged, *rewards, F.logsigmoid(ratio).mean(), ratio.mean())


def _without_reference(pairs: Pairs, options: PairLoss, margin: float = 0.0) -> Tensor:
    """(P,) losses of CPO and SimPO, which are DPO's: a reference moves the margin, and here it does so by itself."""
    zero = torch.zeros_like(pairs.chosen)
    return dpo_loss(
        pairs.chosen,
        pairs.rejected,
        zero + margin / options.beta,
        zero,
        beta=options.beta,
        label_smoothing=options.label_smoothing,
    )
