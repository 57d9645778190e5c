"""Cross-entropy with the signature of Liger's ``LigerFusedLinearCrossEntropyLoss``, on ``linear_logprob``."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefopt_kernels.ops.linear_logprob import linear_logprob

REDUCTIONS = ("mean", "sum", "none")


@dataclass
class CrossEntropyOutput:
    """The loss and optional extra results, with the fields of Liger's class of the same name."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    r"""Cross-entropy of a linear head with the interface of Liger's class; the logits are never materialised.

    .. math:: \ell_t = w_{y_t} (1 - \epsilon) (-\log p_t) + \frac{\epsilon}{V} \sum_v w_v (-\log p_{t,v})
              + \zeta \, \mathrm{lse}_t^2

    Args:
        ce_weight: (V,) floating point class weights w, or None for 1.
        ignore_index: target of a token that is not scored.
        lse_square_scale: zeta. As in Liger, this term has no class weights, and "mean" divides it by the number of
            tokens even with class weights.
        label_smoothing: epsilon, from 0 to 1; not with a softcap, whose mean logit has no closed form.
        reduction: "mean" over the scored tokens (weighted with class weights), "sum" or "none".
        softcap: bounds the logits by tanh, or None.
        return_z_loss: also return the zeta term.
        accum_dtype: accepted, no effect; gradients are summed in fp32.
        use_token_scaling: multiply a token's loss by its detached probability.
        return_token_accuracy: also return the fraction of tokens whose target has the largest logit. Ties count; in
            Liger only the first of the tied tokens counts.
        return_predicted_tokens: not supported.

    Raises:
        ValueError: an option out of range or not supported.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.liger import LigerFusedLinearCrossEntropyLoss
        >>> hidden, weight = torch.zeros(3, 2), torch.zeros(4, 2)
        >>> LigerFusedLinearCrossEntropyLoss()(weight, hidden, torch.tensor([0, 3, -100])).exp()
        tensor(4.)
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__()
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 to 1")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; expected one of {REDUCTIONS}")
        if softcap is not None and softcap <= 0:
            raise ValueError(f"softcap is {softcap}; expected a number above 0, or None")
        if softcap is not None and label_smoothing > 0:
            raise ValueError(
                f"label_smoothing is {label_smoothing} with softcap {softcap}; expected one of the two: the mean of "
                "capped logits needs every logit"
            )
        if return_predicted_tokens:
            raise ValueError(
                "return_predicted_tokens is True; expected False: the fused op does not compute the most likely "
                "token, only whether it is the target (return_token_accuracy)"
            )
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The loss, or :class:`CrossEntropyOutput` with ``return_z_loss`` or ``return_token_accuracy``.

        Args:
            lin_weight: (V, H), the head.
            _input: (T, H), hidden states that predict the targets.
            target: (T,) int64.
            bias: (V,) or None.

        Returns:
            0-dim fp32, nats; (T,) for reduction "none", 0 for tokens that are not scored.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape.
        """
        counts = target != self.ignore_index
        tokens = linear_logprob(
            _input,
            lin_weight,
            torch.where(counts, target, -1),
            bias,
            softcap=self.softcap,
            outputs=("is_top1",) if self.return_token_accuracy else (),
        )
        class_weight = self._class_weight(lin_weight)
        losses = -tokens.logp
        if class_weight is not None:
            row_weight = torch.where(counts, class_weight[torch.where(counts, target, 0)], 0.0)
            losses = row_weight * losses
        if self.label_smoothing > 0:
            smooth = self._smooth(_input, lin_weight, bias, tokens.lse, class_weight)
            losses = (1 - self.label_smoothing) * losses
            losses = losses + torch.where(counts, self.label_smoothing * smooth, 0.0)
        z_losses = self.lse_square_scale * tokens.lse.square()  # 0 where not scored
        if self.use_token_scaling:
            scale = tokens.logp.detach().exp()
            losses, z_losses = scale * losses, scale * z_losses

        number = counts.sum().clamp(min=1)
        weights = number
        if class_weight is not None:
            weights = row_weight.sum()
            weights = torch.where(weights > 0, weights, 1.0)
        z_loss = self._reduced(z_losses, number)
        loss = self._reduced(losses, weights) + z_loss
        if not (self.return_z_loss or self.return_token_accuracy):
            return loss
        accuracy = None
        if self.return_token_accuracy:
            assert tokens.is_top1 is not None
            hits = tokens.is_top1.float()
            accuracy = hits if self.reduction == "none" else hits.sum() / number
        return CrossEntropyOutput(
            loss=loss,
            z_loss=z_loss.detach() if self.return_z_loss else None,
            token_accuracy=accuracy,
        )

    def _class_weight(self, weight: Tensor) -> Tensor | None:
        if self.ce_weight is None:
            return None
        V = weight.shape[0]
        if self.ce_weight.shape != (V,) or not self.ce_weight.is_floating_point():
            raise ValueError(
                f"ce_weight is {self.ce_weight.dtype} of shape {tuple(self.ce_weight.shape)}; expected floating point "
                f"({V},), one for each token id"
            )
        return self.ce_weight.to(weight.device, torch.float32)

    def _smooth(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lse: Tensor,
        class_weight: Tensor | None,
    ) -> Tensor:
        """(T,) weighted mean of -log p over the vocabulary: lse minus the mean logit, which is linear in the head."""
        if class_weight is None:
            row = weight.mean(0, dtype=torch.float32)
            offset = 0.0 if bias is None else bias.mean(dtype=torch.float32)
            return lse - ((hidden.float() * row).sum(-1) + offset)
        V = weight.shape[0]
        row = (class_weight[:, None] * weight).sum(0) / V  # a temporary fp32 copy of the head
        offset = 0.0 if bias is None else (class_weight * bias).sum() / V
        return class_weight.mean() * lse - ((hidden.float() * row).sum(-1) + offset)

    def _reduced(self, losses: Tensor, divisor: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total / divisor if self.reduction == "mean" else total
