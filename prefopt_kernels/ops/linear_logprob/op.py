"""Per-token log-probabilities under a linear head, without materialising the logits.

Start here. One public function, one custom op with one fake and one autograd rule, and the choice of backend. A backend
is a module with ``why_not``, ``forward`` and ``backward``; reference.py is the definition.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from prefopt_kernels._backends import select_backend
from prefopt_kernels.ops.linear_logprob import cpu, reference
from prefopt_kernels.ops.linear_logprob.checks import (
    OUTPUTS,
    check_call,
    check_filters,
    check_lora,
    check_targets,
)
from prefopt_kernels.ops.linear_logprob.operands import FILTER_TILE, Operands, Saved, Upstream
from prefopt_kernels.ops.linear_logprob.transform import Transform
from prefopt_kernels.ops.linear_logprob.triton_kernels import backend as backend_triton

BACKENDS = {
    "cpu": cpu,
    "triton": backend_triton,
    "reference": reference,
}  # in the order in which "auto" tries them


class TokenLogprobs(NamedTuple):
    """What linear_logprob returns; every tensor is (T,), and a row whose target is negative is 0 (or False) in all."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    lora: tuple[Tensor, Tensor, float] | None = None,
    grad_filter: float = 0.0,
    head_grad_filter: float = 0.0,
    backend: str = "auto",
    keep_unit: bool = True,
) -> TokenLogprobs:
    r"""Log-probability of every target token under the head ``weight``.

    .. math:: \log p_t = z_{t,y_t} - \log \sum_v e^{z_{t,v}}, \qquad
              z = \frac{c}{\tau} \tanh\frac{s\,(W h + b)}{c} \quad\text{(no softcap: } z = s\,(W h + b) / \tau\text{)}

    Logits and sums are fp32 whatever the inputs' dtype. Differentiable once in ``hidden``, ``weight`` and ``bias``,
    through ``logp``, ``lse`` and ``entropy``. With a frozen head the forward also computes the unit gradient d logp / d
    hidden, when and only when ``hidden`` requires a gradient, and the backward is one elementwise product. Under
    ``torch.autocast`` the operands are cast to the autocast dtype, as for a linear layer.

    With ``lora = (A, B, r)`` the raw logits are ``W h + r B (A h) + b``: the product of a low-rank adapter on the head,
    with gradients to A, B and ``hidden``; A h is summed in fp32 and W is neither changed nor copied.

    ``grad_filter = e`` lets a backend leave out of d logp / d hidden the tiles of (tokens, vocabulary) in which every
    probability is below e (the target's own term always stays). What is lost of a row is at most the probability q of
    the tokens left out, so :math:`\|\Delta\,dh_t\| \le |g_t|\,\frac{|s|}{\tau}\,q_t \max_v \|W_v\|` with :math:`q_t \le
    \min(1, e V)`, where g_t is the gradient that reaches logp_t (and lse_t). Never applied through entropy.

    Args:
        hidden: (T, H) fp32 | bf16 | fp16. Hidden states that predict the targets (already shifted).
        weight: (V, H), dtype of ``hidden``. The lm_head.
        targets: (T,) int64 | int32, below V; a negative id is a row that does not count and costs nothing.
        bias: (V,), dtype of ``hidden``, or None.
        logit_scale: s, multiplies the raw logits.
        softcap: c, bounds the logits by tanh (Gemma 2), or None.
        temperature: tau, divides the logits last.
        outputs: names out of "entropy" (nats), "mean_logit" (mean of z over V), "is_top1" (no logit is above the
            target's).
        lora: (A, B, r): A (R, H), B (V, R), each of ``hidden``'s dtype or fp32, and the factor r (PEFT's alpha / R); or
            None.
        grad_filter: e for the gradient of ``hidden``, a probability; 0 is exact. Only the triton backend skips; the
            others compute everything, which keeps the bound.
        head_grad_filter: the same for the gradients of ``weight``, ``bias`` and ``lora``'s B; tiles below both are not
            even recomputed. Its error is bounded by e times the sum of the absolute upstream gradients per vocabulary
            row.
        backend: "auto" or one of "reference", "cpu", "triton". A named backend that cannot run raises with the reason.
            The environment variable PREFOPT_BACKEND replaces "auto".
        keep_unit: whether a frozen head's forward computes the unit gradient. It serves a backward through ``logp``
            alone: set it to False where the loss goes through ``lse`` or ``entropy``.

    Returns:
        TokenLogprobs; ``logp`` and ``lse`` (T,) fp32 in nats, exactly 0 where ``targets < 0``, as is every other
        output. ``mean_logit`` and ``is_top1`` carry no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; named in the message.
        RuntimeError: the named backend cannot run here; or a second derivative is asked for.
        NotImplementedError: an operand carries a forward-mode tangent, as in ``torch.func.jvp``.

    Example:
        >>> import torch
        >>> from prefopt_kernels import linear_logprob
        >>> hidden, weight = torch.eye(2), torch.zeros(4, 2)  # T=2, H=2, V=4: uniform
        >>> linear_logprob(hidden, weight, torch.tensor([3, -100])).logp.exp()
        tensor([0.2500, 1.0000])
    """
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    # meta has no autocast; torch.amp.is_autocast_available would say so, but torch 2.11 cannot trace it
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = to_autocast(hidden, dtype), to_autocast(weight, dtype), to_autocast(bias, dtype)
    check_call(hidden, weight, targets, bias, logit_scale, softcap, temperature, outputs)
    check_filters(grad_filter, head_grad_filter)
    A, B, lora_scale = check_lora(lora, hidden, weight)
    low_hidden = low_of(hidden, A, lora_scale)
    operands = Operands(hidden, weight, targets, bias, low_hidden, B)
    trainable_head = any(operand is not None and operand.requires_grad for operand in (weight, bias, low_hidden, B))
    backend = select_backend(BACKENDS, backend, hidden, weight)
    want = ["logp", "lse", *(name for name in OUTPUTS if name in outputs)]
    if torch.is_grad_enabled():
        if keep_unit and hidden.requires_grad and not trainable_head:
            want.append("unit")
        if trainable_head and head_grad_filter > 0 and BACKENDS[backend].FILTERS_HEAD:
            want.append("tile_max")
    numbers = Numbers(logit_scale, 0.0 if softcap is None else softcap, temperature, grad_filter, head_grad_filter)
    found = _linear_logprob(*operands, [float(number) for number in numbers], " ".join(want), backend)
    logp, lse, entropy, mean_logit, is_top1, _unit, _tile_max = found
    optional = {"entropy": entropy, "mean_logit": mean_logit, "is_top1": is_top1}
    return TokenLogprobs(logp, lse, **{name: optional[name] for name in OUTPUTS if name in outputs})


def explain(hidden: Tensor, weight: Tensor) -> dict[str, str | None]:
    """Why each backend would refuse a call of linear_logprob or linear_kl with these operands; None where it would run.

    Example:
        >>> import torch
        >>> from prefopt_kernels import explain
        >>> explain(torch.eye(2), torch.zeros(4, 2))["reference"] is None
        True
    """
    return {name: module.why_not(hidden, weight) for name, module in BACKENDS.items()}


Operand = TypeVar("Operand", Tensor, Tensor | None)


def to_autocast(operand: Operand, dtype: torch.dtype) -> Operand:
    """What autocast makes of an operand of a linear layer."""
    return operand.to(dtype) if isinstance(operand, Tensor) and operand.is_floating_point() else operand


def low_of(hidden: Tensor, A: Tensor | None, scale: float) -> Tensor | None:
    """(T, R) fp32 ``scale A h``, differentiated by autograd; None without an adapter."""
    if A is None:
        return None
    with torch.autocast(hidden.device.type, enabled=False):
        return scale * (hidden.float() @ A.float().T)


RESULTS = ("logp", "lse", *OUTPUTS, "unit", "tile_max")  # of the custom op, in order; the first two are always wanted


class Numbers(NamedTuple):
    """The numbers of a call, which the custom ops take as one list."""

    scale: float
    softcap: float  # 0 for none
    temperature: float
    grad_filter: float
    head_grad_filter: float

    @property
    def transform(self) -> Transform:
        return Transform(self.scale, self.softcap or None, self.temperature)


@torch.library.custom_op("prefopt_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    numbers: list[float],  # Numbers
    want: str,  # names out of RESULTS, separated by spaces
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if targets.device.type == "cpu":
        check_targets(targets, weight.shape[0])
    operands = Operands(hidden, weight, targets, bias, low_hidden, low_weight)
    given, wanted = Numbers(*numbers), frozenset(want.split())
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the fp32 logits
        out = BACKENDS[backend].forward(operands, given.transform, wanted, given.grad_filter)
    results = tuple(out[name] if name in wanted else empty_result(name, hidden) for name in RESULTS)
    return cast(tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], results)


def empty_result(name: str, hidden: Tensor) -> Tensor:
    """An unwanted result. Custom ops cannot return None or aliases, so these are distinct empty tensors."""
    return hidden.new_empty(0, dtype=result_dtype(name, hidden))


def result_dtype(name: str, hidden: Tensor) -> torch.dtype:
    return {"is_top1": torch.bool, "unit": hidden.dtype}.get(name, torch.float32)


@_linear_logprob.register_fake
def _(hidden, weight, targets, bias, low_hidden, low_weight, numbers, want, backend):
    T, H = hidden.shape
    wanted = want.split()
    shapes = {"unit": (T, H), "tile_max": (-(-weight.shape[0] // FILTER_TILE), T)}
    return tuple(
        hidden.new_empty(shapes.get(name, (T,)), dtype=result_dtype(name, hidden))
        if name in wanted
        else empty_result(name, hidden)
        for name in RESULTS
    )


def _setup_context(ctx, inputs, output):
    *operands, numbers, want, backend = inputs
    results, wanted = dict(zip(RESULTS, output, strict=True)), want.split()
    ctx.numbers, ctx.backend = numbers, backend
    differentiable = {"logp", "lse", "entropy"} & set(wanted)
    ctx.mark_non_differentiable(*(result for name, result in results.items() if name not in differentiable))
    ctx.set_materialize_grads(False)  # None says which of logp, lse and entropy the caller left out
    kept = (results[name] if name in wanted else None for name in ("lse", "entropy", "unit", "tile_max"))
    ctx.save_for_backward(*operands, *kept)  # O(T H), never (T, V)


DIFFERENTIABLE = ("hidden", "weight", "bias", "low_hidden", "low_weight")  # those of the operands that take a gradient


def _backward(ctx, dlogp, dlse, dentropy, *_not_differentiable):
    need = [
        name
        for name, needed in zip(Operands._fields, ctx.needs_input_grad, strict=False)
        if needed and name in DIFFERENTIABLE
    ]
    grads: dict[str, Tensor] = {}
    if need and not (dlogp is None and dlse is None and dentropy is None):
        saved = ctx.saved_tensors
        made = _linear_logprob_backward(dlogp, dlse, dentropy, *saved, ctx.numbers, " ".join(need), ctx.backend)
        grads = {name: grad for name, grad in zip(DIFFERENTIABLE, made, strict=True) if name in need}
    return (*(grads.get(name) for name in Operands._fields), None, None, None)  # none for numbers, want, backend


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("prefopt_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    unit: Tensor | None,
    tile_max: Tensor | None,
    numbers: list[float],  # Numbers
    need: str,  # names out of DIFFERENTIABLE, separated by spaces
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given, needed = Numbers(*numbers), frozenset(need.split())
    if unit is not None and dlogp is not None and dlse is None and dentropy is None:
        grads = {"hidden": (dlogp[:, None] * unit).to(unit.dtype)}
    else:
        saved = Saved(lse, entropy, tile_max, given.grad_filter, given.head_grad_filter)
        operands = Operands(hidden, weight, targets, bias, low_hidden, low_weight)
        upstream = Upstream(dlogp, dlse, dentropy)
        # autocast is still enabled if backward runs inside the context
        with torch.autocast(hidden.device.type, enabled=False):
            grads = BACKENDS[backend].backward(operands, upstream, saved, given.transform, needed)
    results = tuple(grads[name] if name in needed else weight.new_empty(0) for name in DIFFERENTIABLE)
    return cast(tuple[Tensor, Tensor, Tensor, Tensor, Tensor], results)


@_linear_logprob_backward.register_fake
def _(
    dlogp, dlse, dentropy, hidden, weight, targets, bias, low_hidden, low_weight,
    lse, entropy, unit, tile_max, numbers, need, backend,
):  # fmt: skip
    operands = Operands(hidden, weight, targets, bias, low_hidden, low_weight)._asdict()
    return tuple(
        operands[name].new_empty(operands[name].shape) if name in need.split() else weight.new_empty(0)
        for name in DIFFERENTIABLE
    )


def _no_double_backward(ctx, *grads):
    raise RuntimeError("linear_logprob has no second derivative: call backward without create_graph=True")


_linear_logprob_backward.register_autograd(_no_double_backward)
