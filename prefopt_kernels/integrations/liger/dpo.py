"""DPO with the signature of Liger's ``LigerFusedLinearDPOLoss``, in all of its forms.

Those that stand in ``prefopt_kernels.losses`` are called; the others have their one formula here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt_kernels.integrations.liger.pairs import PairLoss, Pairs
from prefopt_kernels.integrations.liger.scores import check_padded, check_reference, score
from prefopt_kernels.losses import apo_zero_loss, bco_loss, dpo_loss, ipo_loss


def _sigmoid(pairs: Pairs, options) -> Tensor:
    return dpo_loss(*pairs.all_logps, beta=options.beta)


def _robust(pairs: Pairs, options) -> Tensor:
    smoothing = options.label_smoothing
    return dpo_loss(*pairs.all_logps, beta=options.beta, label_smoothing=smoothing, robust=True)


def _ipo(pairs: Pairs, options) -> Tensor:
    lengths = (pairs.chosen_lengths, pairs.rejected_lengths)
    return ipo_loss(*pairs.all_logps, *lengths, beta=options.beta)


def _unpaired(loss, pairs: Pairs, **hyper) -> Tensor:
    """An unpaired loss of the chosen row as desirable plus that of the rejected row as undesirable."""
    desirable = torch.ones_like(pairs.chosen, dtype=torch.bool)
    ref_chosen, ref_rejected = pairs.references
    of_chosen = loss(pairs.chosen, ref_chosen, desirable, **hyper)
    return of_chosen + loss(pairs.rejected, ref_rejected, ~desirable, **hyper)


def _bco_pair(pairs: Pairs, options) -> Tensor:
    return _unpaired(bco_loss, pairs, beta=options.beta, shift=0.0)


def _apo_zero(pairs: Pairs, options) -> Tensor:
    return _unpaired(apo_zero_loss, pairs, beta=options.beta)


def _margin(pairs: Pairs, options) -> Tensor:
    """(P,) beta times the difference of the log-ratios."""
    return options.beta * (pairs.chosen_ratio - pairs.rejected_ratio)


def _hinge(pairs: Pairs, options) -> Tensor:
    """arXiv:2305.10425 (SLiC-HF), with log-ratios in place of log-probabilities."""
    return torch.relu(1 - _margin(pairs, options))


def _exo_pair(pairs: Pairs, options) -> Tensor:
    """arXiv:2402.00856, eq. 16: the divergence of (sigma(m), sigma(-m)) from (1 - eps, eps)."""
    margin = _margin(pairs, options)
    goal = torch.tensor([options.label_smoothing], dtype=margin.dtype, device=margin.device)
    log_p, log_q = F.logsigmoid(margin), F.logsigmoid(-margin)
    return log_p.exp() * (log_p - torch.log1p(-goal)) + log_q.exp() * (log_q - goal.log())


def _nca_pair(pairs: Pairs, options) -> Tensor:
    """arXiv:2402.05369, section 4, for pairs."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def _sppo_hard(pairs: Pairs, options) -> Tensor:
    """arXiv:2405.00675, eq. 4.7, with probability 1 for the winner."""
    goal = 0.5 / options.beta
    return (pairs.chosen_ratio - goal).square() + (pairs.rejected_ratio + goal).square()


def _apo_down(pairs: Pairs, options) -> Tensor:
    """arXiv:2408.06266, eq. 8."""
    chosen = options.beta * pairs.chosen_ratio
    return torch.sigmoid(chosen) + torch.sigmoid(-_margin(pairs, options))


def _discopop(pairs: Pairs, options) -> Tensor:
    """arXiv:2406.08414, eq. 5: logistic and exponential loss, mixed by the margin."""
    margin = _margin(pairs, options)
    share = torch.sigmoid(margin / options.discopop_tau)
    return -F.logsigmoid(margin) * (1 - share) + torch.exp(-margin) * share


LOSS_TYPES = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}


class LigerFusedLinearDPOLoss(PairLoss):
    r"""DPO and its relatives, called as Liger's class is.

    .. math:: L = \tfrac{1}{P} \sum_i \ell(\Delta_i) + \alpha \, \mathrm{NLL},
              \qquad \ell(\Delta) = -\log \sigma(\beta \Delta)

    with :math:`\Delta` the chosen log-ratio less the rejected one (arXiv:2305.18290, eq. 7), and NLL the mean over the
    tokens of the chosen completions.

    Args:
        ignore_index: target of a position that does not count.
        beta: inverse temperature, 1/nats.
        alpha: of the NLL.
        compute_nll_loss: whether there is one.
        compiled, chunk_size: taken and without effect.
        use_ref_model: whether the log-ratios have a reference.
        average_log_prob: divide a sequence's sum by its tokens.
        loss_type: one of Liger's "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
            "apo_zero", "apo_down", "discopop"; and "ipo", which divides by the tokens in any case.
        label_smoothing: of "robust" and "exo_pair"; the others leave it alone, as in Liger.
        discopop_tau: of "discopop".

    Raises:
        ValueError: an option out of range.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.liger import LigerFusedLinearDPOLoss
        >>> hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(8, 4)
        >>> target = torch.tensor([[1, 2, 3], [4, 5, 6]])  # a pair
        >>> loss, _ = LigerFusedLinearDPOLoss(use_ref_model=False)(weight, hidden, target)
        >>> loss  # ln 2: the two are as likely
        tensor(0.6931, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__()
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type is {loss_type!r}; expected one of {tuple(LOSS_TYPES)}")
        if loss_type == "exo_pair" and not 0.0 < label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}; expected above 0 and below 1 for exo_pair")
        if loss_type == "robust" and not 0.0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {label_smoothing}; expected from 0 to below 0.5 for robust")
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau

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
        """The mean loss and what Liger logs.

        Args:
            lin_weight: (V, H), the head.
            _input: (2 P, L, H) hidden states that predict the targets, chosen first.
            target: (2 P, L) int64.
            bias: (V,) or None.
            ref_input, ref_weight, ref_bias: the same of the reference model; scored without gradient.

        Returns:
            loss, 0-dim fp32; and, without gradient, ``(chosen_logps (P,), rejected_logps (P,), chosen_logits_mean,
            rejected_logits_mean, nll_loss, chosen_rewards (P,), rejected_rewards (P,))``. The logits are averaged over
            the vocabulary and all positions, padding too, as Liger does.

        Raises:
            TypeError, ValueError: an argument is missing or of the wrong type or shape.
        """
        check_padded(_input, target)
        check_reference(self.use_ref_model, target, ref_input, ref_weight)
        pairs, nll, logged = self._scored(lin_weight, _input, target, bias)
        if self.use_ref_model:
            with torch.no_grad():
                how = {"ignore_index": self.ignore_index, "average": self.average_log_prob}
                ref = score(ref_input, ref_weight, target, ref_bias, **how).logps
            ref_chosen, ref_rejected = ref.split(len(pairs.chosen))
            pairs = pairs._replace(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
        if self.average_log_prob:  # divided already
            ones = torch.ones_like(pairs.chosen_lengths)
            pairs = pairs._replace(chosen_lengths=ones, rejected_lengths=ones)
        losses = LOSS_TYPES[self.loss_type](pairs, self)
        ratios = (pairs.chosen_ratio.detach(), pairs.rejected_ratio.detach())
        return losses.mean() + nll, (*logged, *(self.beta * ratio for ratio in ratios))
