"""The fused KTO loss as an ``nn.Module``: head, op, loss and reduction in one call.

A module has no parameters and no state. Sequences are packed: the hidden states of all sequences one after the other,
and ``cu_seqlens`` (B + 1,) with the first row of each, so that no padding is scored.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefopt_kernels._checks import check_choice, check_positive, check_vector, check_weight
from prefopt_kernels._packed import check_packing, sequence_logps
from prefopt_kernels.chunked import PrecomputedGradients, chunked_head
from prefopt_kernels.losses import apo_zero_loss, kto_loss
from prefopt_kernels.ops.linear_logprob import TokenLogprobs
from prefopt_kernels.ops.linear_logprob.checks import check_call, check_targets
from prefopt_kernels.ops.linear_logprob.transform import Transform
from prefopt_kernels.ops.sequence_loss import SequenceLoss, sequence_loss
from prefopt_kernels.parallel.dtensor import ResolvedHead, plain_hidden, resolve_head

METHODS = ("kto", "apo_zero")
REDUCTIONS = ("mean", "sum", "none")
SCHEMES = ("auto", "op", "chunked")
CHUNKED_FROM_H = 4096


@dataclass(frozen=True)
class KTOMetrics:
    """Metrics of a step: detached tensors on the step's device, so that only reading them synchronises.

    The three sums over a sequence's tokens are None unless requested by ``outputs``.
    """

    losses: Tensor  # (B,) fp32, before the reduction
    logps: Tensor  # (B,) fp32, nats, policy
    ref_logps: Tensor  # (B,) fp32, nats, reference model
    log_ratios: Tensor  # (B,) fp32, logps - ref_logps
    rewards: Tensor  # (B,) fp32, beta * log_ratios
    labels: Tensor  # (B,) bool
    reference_point: Tensor  # 0-dim fp32, nats, the z0 of this step
    token_count: Tensor  # 0-dim int64, scored tokens
    entropy_sum: Tensor | None = None  # (B,) fp32, nats
    mean_logit_sum: Tensor | None = None  # (B,) fp32
    is_top1_sum: Tensor | None = None  # (B,) fp32, tokens whose target has the largest logit


def unpaired_losses(
    method: str,
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    reference_point: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """(B,) losses of ``method``, one of METHODS; arguments as for :func:`prefopt_kernels.kto_loss`."""
    options = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    if method == "apo_zero":
        return apo_zero_loss(logps, ref_logps, labels, **options)
    return kto_loss(logps, ref_logps, labels, reference_point=reference_point, **options)


class FusedLinearKTOLoss(nn.Module):
    r"""KTO or APO-zero from hidden states and the head, without materialising the logits.

    Equivalent to ``log_softmax(hidden @ weight.T)`` at the targets, summed over each sequence, for policy and reference
    model, followed by :func:`prefopt_kernels.kto_loss` and the reduction.

    Args:
        beta: inverse temperature, 1/nats, finite and above 0.
        method: "kto" or "apo_zero".
        desirable_weight, undesirable_weight: finite, 0 or above.
        logit_scale, softcap, temperature, backend: as for :func:`prefopt_kernels.linear_logprob`, used for both policy
            and reference model.
        outputs: names out of "entropy", "mean_logit", "is_top1"; their sums over each sequence of the policy are added
            to the metrics.
        reduction: "mean" or "sum" over the B rows, or "none" for (B,).
        scheme: how a step with a trained head is computed. "op" computes four products with the head, two of which are
            the same logits, and has no restrictions. "chunked" computes three: z0 is known before the step and each
            row's loss depends on that row alone, so gradients are computed while a chunk's logits are in memory. It
            needs the reduction "mean" or "sum" and fp32 or bf16 (fp16 gradients would underflow before loss scaling),
            cannot be traced by ``torch.compile``, synchronises with the device once, and sums the head's gradient in
            fp32. "auto" is "chunked" on CUDA for H of 4,096 and more, where the saved product outweighs the memory
            traffic of the logits, and "op" elsewhere; it falls back to "op" with a warning where "chunked" is not
            possible. Steps without a gradient for the head always use the op.

    Example:
        >>> import torch
        >>> from prefopt_kernels.modules import FusedLinearKTOLoss
        >>> hidden, weight = torch.zeros(3, 2, requires_grad=True), torch.zeros(4, 2)
        >>> loss, metrics = FusedLinearKTOLoss(beta=0.1)(
        ...     hidden, weight, targets=torch.tensor([3, 0, 1]), cu_seqlens=torch.tensor([0, 2, 3]),
        ...     labels=torch.tensor([True, False]), ref_hidden=torch.zeros(3, 2),
        ...     reference_point=torch.tensor(0.0))
        >>> loss
        tensor(0.5000, grad_fn=<MeanBackward0>)
        >>> metrics.logps.exp() * 16  # two tokens, then one, each with probability 1/4
        tensor([1., 4.])
    """

    def __init__(
        self,
        *,
        beta: float,
        method: str = "kto",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        outputs: tuple[str, ...] = (),
        backend: str = "auto",
        reduction: str = "mean",
        scheme: str = "auto",
    ):
        super().__init__()
        check_choice("method", method, METHODS)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("scheme", scheme, SCHEMES)
        check_positive("beta", beta)
        check_weight("desirable_weight", desirable_weight)
        check_weight("undesirable_weight", undesirable_weight)
        self.beta = beta
        self.method = method
        self.weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        self.head: dict[str, Any] = {
            "logit_scale": logit_scale,
            "softcap": softcap,
            "temperature": temperature,
            "backend": backend,
        }
        self.outputs = tuple(outputs)
        self.reduction = reduction
        self.scheme = scheme

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        reference_point: Tensor | None = None,
        kl_log_ratio: Tensor | None = None,
    ) -> tuple[Tensor, KTOMetrics]:
        """Loss of B packed sequences.

        Args:
            hidden: (T, H) fp32 | bf16 | fp16. Policy's hidden states that predict the targets.
            weight: (V, H), dtype of ``hidden``. Policy's head; a frozen one costs no gradient work. A DTensor is scored
                in shards or all-gathered, see :func:`prefopt_kernels.parallel.dtensor.resolve_head`.
            targets: (T,) int64 | int32, below V; negative for tokens that are not scored.
            cu_seqlens: (B + 1,) int32 | int64, as for :func:`sequence_logps`.
            labels: (B,) bool. True is desirable.
            bias: (V,), dtype of ``hidden``, or None.
            ref_logps: (B,) nats, precomputed. Exactly one of this and ``ref_hidden``.
            ref_hidden: (T, H') hidden states of the reference model for the same targets; scored here without
                gradient.
            ref_weight: (V, H') head of the reference model. By default the policy's head and bias, which must then be
                frozen.
            ref_bias: (V,) bias of ``ref_weight``, or None.
            reference_point: 0-dim, nats, already clamped. "kto" takes exactly one of this and ``kl_log_ratio``;
                "apo_zero" takes neither.
            kl_log_ratio: (n,) nats, log-ratios of mismatched completions of this process; z0 is their mean, clamped at
                0, without gradient. n = 0 gives 0.

        Returns:
            The loss, 0-dim fp32 (or (B,) for reduction "none"), and :class:`KTOMetrics`.

        Raises:
            TypeError, ValueError: an argument is missing, superfluous or has the wrong type, dtype, shape or device;
                raised before any product is computed.
        """
        check_packing(targets, cu_seqlens, name="targets")
        B = cu_seqlens.shape[0] - 1
        check_vector("labels", labels, B, dtypes=(torch.bool,))
        z0 = self._reference_point(reference_point, kl_log_ratio, hidden)
        _check_reference(weight, bias, targets, B, ref_logps, ref_hidden, ref_weight, ref_bias)

        if ref_hidden is not None:
            if ref_weight is None:
                ref_weight, ref_bias = weight, bias
            with torch.no_grad():
                ref_hidden = plain_hidden(ref_hidden)
                ref_head = resolve_head(ref_weight, ref_bias, dtype=ref_hidden.dtype)
                ref_logps = sequence_logps(ref_head.logprob(ref_hidden, targets, **self.head).logp, cu_seqlens)
        assert ref_logps is not None
        reference = ref_logps.detach().float()
        options = {"beta": self.beta, "backend": self.head["backend"], **self.weights}
        if self.method == "kto":
            options["reference_point"] = z0

        def loss_of(logp: Tensor, bounds: Tensor, rows: slice = slice(None)) -> SequenceLoss:
            """The losses of some rows; each depends on its row only, which "chunked" relies on."""
            return sequence_loss(logp, bounds, reference[rows], labels[rows], method=self.method, **options)

        hidden = plain_hidden(hidden)
        head = resolve_head(weight, bias, dtype=hidden.dtype)
        if self._use_chunks(hidden, head):
            operands = _autocast(hidden, head.weight, head.bias)
            tokens, grads = self._chunked(*operands, targets, cu_seqlens, loss_of)
        else:
            tokens, grads = head.logprob(hidden, targets, outputs=self.outputs, **self.head), None
        rows = loss_of(tokens.logp, cu_seqlens)
        metrics = KTOMetrics(
            losses=rows.losses.detach(),
            logps=rows.logps.detach(),
            ref_logps=reference,
            log_ratios=rows.log_ratios,
            rewards=rows.rewards,
            labels=labels,
            reference_point=z0,
            token_count=(targets >= 0).sum(),
            **{
                f"{name}_sum": sequence_logps(getattr(tokens, name).detach().float(), cu_seqlens)
                for name in self.outputs
            },
        )
        reduced = rows.losses if self.reduction == "none" else getattr(rows.losses, self.reduction)()
        if grads is not None:
            reduced = PrecomputedGradients.apply(reduced, grads, *operands)
        return reduced, metrics

    def _use_chunks(self, hidden: Tensor, head: ResolvedHead) -> bool:
        """Whether this step is computed one chunk of sequences at a time."""
        trained = any(each is not None and each.requires_grad for each in (head.weight, head.bias))
        if self.scheme == "op" or not trained or not torch.is_grad_enabled():
            return False
        if self.scheme == "auto" and not _chunks_pay(hidden, self.head["backend"]):
            return False  # before the warning below, which would break a traced graph
        reason = self._why_not_chunked(hidden, head)
        if reason is not None:
            if self.scheme == "chunked":
                raise ValueError(f"scheme 'chunked' cannot run this call: {reason}")
            warnings.warn(f"the trained head costs four products instead of three: {reason}", stacklevel=4)
        return reason is None

    def _why_not_chunked(self, hidden: Tensor, head: ResolvedHead) -> str | None:
        if head.group is not None:
            return "the head's rows are sharded over ranks, and every chunk would synchronise them"
        if torch.compiler.is_compiling():
            return "torch.compile traces the call, and cu_seqlens must be read on the host"
        if self.reduction == "none":
            return "the reduction is 'none', so the gradients of the losses are not known yet"
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return "fp16 gradients underflow before loss scaling" if dtype == torch.float16 else None

    def _chunked(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        cu_seqlens: Tensor,
        loss_of: Callable[[Tensor, Tensor, slice], SequenceLoss],
    ) -> tuple[TokenLogprobs, tuple[Tensor | None, ...]]:
        """Token scores without a graph, and the gradients of the reduced loss with respect to the operands."""
        transform = Transform(self.head["logit_scale"], self.head["softcap"], self.head["temperature"])
        check_call(hidden, weight, targets, bias, *transform, self.outputs)
        if targets.device.type == "cpu":
            check_targets(targets, weight.shape[0])
        row_weight = 1 / (cu_seqlens.shape[0] - 1) if self.reduction == "mean" else 1.0

        def chunk_loss(logp: Tensor, bounds: Tensor, rows: slice) -> Tensor:
            return row_weight * loss_of(logp, bounds, rows).losses

        return chunked_head(hidden, weight, bias, targets, cu_seqlens, chunk_loss, transform, self.outputs)

    def _reference_point(self, reference_point: Tensor | None, kl_log_ratio: Tensor | None, hidden: Tensor) -> Tensor:
        """z0 of the step: the given one, the clamped mean, or 0 for APO-zero."""
        options = {"reference_point": reference_point, "kl_log_ratio": kl_log_ratio}
        given = [name for name, value in options.items() if value is not None]
        if self.method == "apo_zero":
            if given:
                raise ValueError(f"{given[0]} is given; expected none, apo_zero's is always 0")
            return hidden.new_zeros((), dtype=torch.float32)
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'neither'} given; "
                "expected exactly one of reference_point and kl_log_ratio for method 'kto'"
            )
        if kl_log_ratio is not None:
            check_vector("kl_log_ratio", kl_log_ratio)
            kl_log_ratio = kl_log_ratio.detach().float()
            return (kl_log_ratio.sum() / max(kl_log_ratio.shape[0], 1)).clamp(min=0.0)
        if not isinstance(reference_point, Tensor) or reference_point.ndim != 0:
            shape = getattr(reference_point, "shape", None)
            got = f"is a {type(reference_point).__name__}" if shape is None else f"has shape {tuple(shape)}"
            raise ValueError(f"reference_point {got}; expected a 0-dim tensor in nats")
        return reference_point.detach().float()


def _chunks_pay(hidden: Tensor, backend: str) -> bool:
    """Whether three products with logits in memory are faster than the op's four without.

    In plain torch about 30 bytes are moved per logit, and 2 H operations per logit are saved. A GPU with 250 operations
    per byte of bandwidth breaks even near H = 4,000 (computed, not measured). On the CPU the op's kernels are faster.
    A backend selected by name is used, and a compiler traces the op.
    """
    named = backend != "auto" or os.environ.get("PREFOPT_BACKEND", "auto") != "auto"
    if named or torch.compiler.is_compiling():
        return False
    return hidden.is_cuda and hidden.shape[-1] >= CHUNKED_FROM_H


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the dtype in which ``torch.autocast`` runs a linear layer."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_reference(
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    B: int,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> None:
    """Raise unless exactly one complete description of the reference model is given."""
    if (ref_logps is None) == (ref_hidden is None):
        got = "neither" if ref_logps is None else "both"
        raise ValueError(f"{got} given; expected exactly one of ref_logps and ref_hidden")
    if ref_logps is not None:
        check_vector("ref_logps", ref_logps, B)
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{name} is given with ref_logps; expected it with ref_hidden")
        return
    assert ref_hidden is not None
    if ref_weight is None:
        if ref_bias is not None:
            raise ValueError("ref_bias is given without ref_weight; expected both or neither")
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            raise ValueError(
                "ref_weight is None while the policy's head is trained; expected the reference "
                "model's own head, because a shared one would change with the policy"
            )
        ref_weight = weight
    for name, value, expected in (
        ("ref_hidden", ref_hidden, (targets.shape[0], ref_weight.shape[-1])),
        ("ref_weight", ref_weight, (weight.shape[0], ref_weight.shape[-1])),
    ):
        if value.shape != expected:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {expected}")
