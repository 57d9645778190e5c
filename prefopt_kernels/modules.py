"""Head, op, loss and reduction in one ``nn.Module``: what a training loop calls.

A module owns no parameters and no state. Tokens come packed: the hidden states of all sequences one after
the other, and ``cu_seqlens`` (B + 1,) with the row at which each begins, so that no padding is scored.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefopt_kernels._packed import check_packing, check_vector, sequence_logps
from prefopt_kernels.chunked import PrecomputedGradients, chunked_head
from prefopt_kernels.losses import apo_zero_loss, kto_loss
from prefopt_kernels.losses._checks import check_positive, check_weight
from prefopt_kernels.ops.linear_logprob import TokenLogprobs
from prefopt_kernels.ops.linear_logprob.checks import check_call, check_targets
from prefopt_kernels.ops.linear_logprob.transform import Transform
from prefopt_kernels.parallel.dtensor import ResolvedHead, plain_hidden, resolve_head

METHODS = ("kto", "apo_zero")
REDUCTIONS = ("mean", "sum", "none")
SCHEMES = ("auto", "op", "chunked")
CHUNKS_PAY_FROM_H = 4096


@dataclass(frozen=True)
class KTOMetrics:
    """What a step can log; tensors on the step's device, detached, so that logging decides when to wait.

    The three sums over a sequence's tokens are None unless ``outputs`` asked for them.
    """

    losses: Tensor  # (B,) fp32, before the reduction
    logps: Tensor  # (B,) fp32, nats, policy
    ref_logps: Tensor  # (B,) fp32, nats, reference model
    log_ratios: Tensor  # (B,) fp32, logps - ref_logps
    rewards: Tensor  # (B,) fp32, beta * log_ratios
    labels: Tensor  # (B,) bool
    reference_point: Tensor  # 0-dim fp32, nats, the z0 of this step
    token_count: Tensor  # 0-dim int64, tokens that count
    entropy_sum: Tensor | None = None  # (B,) fp32, nats
    mean_logit_sum: Tensor | None = None  # (B,) fp32
    is_top1_sum: Tensor | None = None  # (B,) fp32, tokens whose target no logit exceeds


class FusedLinearKTOLoss(nn.Module):
    r"""KTO or APO-zero straight from hidden states and the head, without materialising the logits.

    Equivalent to ``log_softmax(hidden @ weight.T)`` at the targets, summed over each sequence, less the
    same under the reference model, through :func:`prefopt_kernels.kto_loss` and the reduction.

    Args:
        beta: inverse temperature, 1/nats, finite and above 0.
        method: "kto" or "apo_zero".
        desirable_weight, undesirable_weight: finite, 0 or above.
        logit_scale, softcap, temperature, backend: as :func:`prefopt_kernels.linear_logprob`, for policy
            and reference model alike.
        outputs: names out of "entropy", "mean_logit", "is_top1", summed over each sequence of the policy
            into the metrics.
        reduction: "mean" or "sum" over the B rows, or "none" for (B,).
        scheme: how a step with a trained head is computed. "op" takes four products with the head, two of
            them the same logits, and works for everything. "chunked" takes three: z0 is known before the
            step and a row's loss depends on that row alone, so its gradient follows while its logits are
            still there, a chunk of whole sequences at a time. It needs the reduction "mean" or "sum" (for
            "none" nobody knows yet what each row's loss is multiplied with) and fp32 or bf16 (fp16 would
            lose gradients before the loss scale arrives), cannot be traced by ``torch.compile``, waits
            for the device once, and sums the head's gradient in fp32. "auto" is "chunked" on CUDA for H of
            4,096 and more, where the saved product outweighs logits in memory, and "op" elsewhere; what
            "chunked" cannot do it leaves to "op", with a warning. A step without a gradient for the head
            (frozen, or an evaluation) is the op's in any case: there is no product to save.

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
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; expected one of {METHODS}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; expected one of {REDUCTIONS}")
        if scheme not in SCHEMES:
            raise ValueError(f"scheme is {scheme!r}; expected one of {SCHEMES}")
        check_positive("beta", beta)
        check_weight("desirable_weight", desirable_weight)
        check_weight("undesirable_weight", undesirable_weight)
        self.beta = beta
        self.method = method
        self.weights = {
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
        }
        self.head = {
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
            weight: (V, H), dtype of ``hidden``. Policy's head; no gradient work where it is frozen. A DTensor is scored
                where its rows are or brought together, as :func:`prefopt_kernels.parallel.dtensor.resolve_head` says.
            targets: (T,) int64 | int32, below V; negative where a token does not count.
            cu_seqlens: (B + 1,) int32 | int64, as :func:`sequence_logps`.
            labels: (B,) bool. True is desirable.
            bias: (V,), dtype of ``hidden``, or None.
            ref_logps: (B,) nats, from an earlier pass. Exactly one of this and ``ref_hidden``.
            ref_hidden: (T, H') hidden states of the reference model for the same targets; scored here
                without gradient.
            ref_weight: (V, H') head of the reference model. Left out, it shares the policy's head and
                bias, which must then be frozen.
            ref_bias: (V,) bias of ``ref_weight``, or None.
            reference_point: 0-dim, nats, already clamped. "kto" takes exactly one of this and
                ``kl_log_ratio``; "apo_zero" takes neither.
            kl_log_ratio: (n,) nats, log-ratios of mismatched completions of this process; z0 is their
                mean, clamped at 0, without gradient. n = 0 gives 0.

        Returns:
            The loss, 0-dim fp32 (or (B,) for reduction "none"), and :class:`KTOMetrics`.

        Raises:
            TypeError, ValueError: an argument is missing, superfluous or of the wrong type, dtype, shape
            or device; found before any product is computed.
        """
        check_packing(targets, cu_seqlens, name="targets")
        B = cu_seqlens.shape[0] - 1
        check_vector("labels", labels, B)
        if labels.dtype != torch.bool:
            raise TypeError(f"labels has dtype {labels.dtype}; expected torch.bool")
        z0 = self._reference_point(reference_point, kl_log_ratio, hidden)
        _check_reference(weight, bias, targets, B, ref_logps, ref_hidden, ref_weight, ref_bias)

        if ref_logps is None:
            if ref_weight is None:
                ref_weight, ref_bias = weight, bias
            with torch.no_grad():
                ref_hidden = plain_hidden(ref_hidden)
                ref_head = resolve_head(ref_weight, ref_bias, dtype=ref_hidden.dtype)
                ref = ref_head.logprob(ref_hidden, targets, **self.head)
                ref_logps = sequence_logps(ref.logp, cu_seqlens)
        ref_logps = ref_logps.detach().float()

        def loss_of(logps: Tensor, rows: slice = slice(None)) -> Tensor:
            """(b,) losses of some of the rows: the function of one row at a time that "chunked" builds on."""
            named = {"ref_logps": ref_logps[rows], "labels": labels[rows], "beta": self.beta}
            if self.method == "kto":
                return kto_loss(logps, **named, reference_point=z0, **self.weights)
            return apo_zero_loss(logps, **named, **self.weights)

        hidden = plain_hidden(hidden)
        head = resolve_head(weight, bias, dtype=hidden.dtype)
        operands, grads = (hidden, head.weight, head.bias), None
        if self._takes_chunks(hidden, head):
            operands = _autocast(*operands)
            tokens, grads = self._chunked(*operands, targets, cu_seqlens, loss_of)
        else:
            tokens = head.logprob(hidden, targets, outputs=self.outputs, **self.head)
        logps = sequence_logps(tokens.logp, cu_seqlens)  # (B,)
        losses = loss_of(logps)
        log_ratios = logps.detach() - ref_logps
        sums = {
            f"{name}_sum": sequence_logps(getattr(tokens, name).detach().float(), cu_seqlens) for name in self.outputs
        }
        metrics = KTOMetrics(
            losses=losses.detach(),
            logps=logps.detach(),
            ref_logps=ref_logps,
            log_ratios=log_ratios,
            rewards=self.beta * log_ratios,
            labels=labels,
            reference_point=z0,
            token_count=(targets >= 0).sum(),
            **sums,
        )
        reduced = losses if self.reduction == "none" else getattr(losses, self.reduction)()
        if grads is not None:
            reduced = PrecomputedGradients.apply(reduced, grads, *operands)
        return reduced, metrics

    def _takes_chunks(self, hidden: Tensor, head: ResolvedHead) -> bool:
        """Whether this step is computed a chunk of sequences at a time."""
        trained = any(each is not None and each.requires_grad for each in (head.weight, head.bias))
        if self.scheme == "op" or not trained or not torch.is_grad_enabled():
            return False
        if self.scheme == "auto" and not _chunks_pay(hidden, self.head["backend"]):
            return False  # before the warning below, which would break a traced graph
        reason = self._why_not_chunked(hidden, head)
        if reason is not None:
            if self.scheme == "chunked":
                raise ValueError(f"scheme 'chunked' cannot run this call: {reason}")
            message = f"the trained head costs four products instead of three: {reason}"
            warnings.warn(message, stacklevel=4)
        return reason is None

    def _why_not_chunked(self, hidden: Tensor, head: ResolvedHead) -> str | None:
        if head.group is not None:
            return "the head's rows are spread over processes, and a chunk would wait for all of them"
        if torch.compiler.is_compiling():
            return "torch.compile traces the call, and the ends of the sequences must be read"
        if self.reduction == "none":
            return "the reduction is 'none', so what the losses are multiplied with is not known yet"
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return "fp16 loses gradients before a loss scale" if dtype == torch.float16 else None

    def _chunked(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        cu_seqlens: Tensor,
        loss_of: Callable[[Tensor, slice], Tensor],
    ) -> tuple[TokenLogprobs, tuple[Tensor | None, ...]]:
        """Scores of the tokens without a graph, and the gradients of the reduced loss in the operands."""
        settings = Transform(*(self.head[name] for name in ("logit_scale", "softcap", "temperature")))
        check_call(hidden, weight, targets, bias, *settings, self.outputs)
        if targets.device.type == "cpu":
            check_targets(targets, weight.shape[0])
        share = 1 / (cu_seqlens.shape[0] - 1) if self.reduction == "mean" else 1.0

        def chunk_loss(logp: Tensor, bounds: Tensor, rows: slice) -> Tensor:
            return share * loss_of(sequence_logps(logp, bounds), rows)

        return chunked_head(hidden, weight, bias, targets, cu_seqlens, chunk_loss, settings, self.outputs)

    def _reference_point(self, reference_point: Tensor | None, kl_log_ratio: Tensor | None, hidden: Tensor) -> Tensor:
        """The step's z0: the given one, the clamped mean, or APO-zero's 0."""
        given = [
            name
            for name, value in (
                ("reference_point", reference_point),
                ("kl_log_ratio", kl_log_ratio),
            )
            if value is not None
        ]
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
            got = (
                f"has shape {tuple(reference_point.shape)}"
                if isinstance(reference_point, Tensor)
                else f"is a {type(reference_point).__name__}"
            )
            raise ValueError(f"reference_point {got}; expected a 0-dim tensor in nats")
        return reference_point.detach().float()


def _chunks_pay(hidden: Tensor, backend: str) -> bool:
    """Whether three products with logits in memory beat the op's four without.

    In plain torch a logit moves about 30 bytes on its way from product to gradient; what is saved is 2 H
    operations. A GPU that does 250 operations in the time of a byte is even at H = 4,000 (computed, not
    measured). On the CPU the op's kernels win, in fp32 and, by more, in bf16. A backend that was asked for
    by name is used, and a compiler traces the op.
    """
    named = backend != "auto" or os.environ.get("PREFOPT_BACKEND", "auto") != "auto"
    if named or torch.compiler.is_compiling():
        return False
    return hidden.is_cuda and hidden.shape[-1] >= CHUNKS_PAY_FROM_H


def _autocast(*operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands as ``torch.autocast`` gives them to a linear layer."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if operand is None else operand.to(dtype) for operand in operands)


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
    """Raise unless exactly one complete description of the reference model is there."""
    if (ref_logps is None) == (ref_hidden is None):
        got = "neither" if ref_logps is None else "both"
        raise ValueError(f"{got} given; expected exactly one of ref_logps and ref_hidden")
    if ref_logps is not None:
        check_vector("ref_logps", ref_logps, B)
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{name} is given with ref_logps; expected it with ref_hidden")
        return
    if ref_weight is None:
        if ref_bias is not None:
            raise ValueError("ref_bias is given without ref_weight; expected both or neither")
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            raise ValueError(
                "ref_weight is None while the policy's head is trained; expected the reference "
                "model's own head, because the shared one would move with the policy"
            )
        ref_weight = weight
    for name, value, expected in (
        ("ref_hidden", ref_hidden, (targets.shape[0], ref_weight.shape[-1])),
        ("ref_weight", ref_weight, (weight.shape[0], ref_weight.shape[-1])),
    ):
        if value.shape != expected:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {expected}")
