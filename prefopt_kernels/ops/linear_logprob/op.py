"""Per-token log-probabilities under a linear head, without materialising the logits.

Start here. One public function, one custom op with one fake and one autograd rule, and the choice of backend. A backend is a
module with ``why_not``, ``forward`` and ``backward``; reference.py is the definition.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
) -> TokenLogprobs:
    r"""Log-probability of every target token under the head ``weight``.

    .. math:: \log p_t = z_{t,y_t} - \log \sum_v e^{z_{t,v}}, \qquad
              z = \frac{c}{\tau} \tanh\frac{s\,(W h + b)}{c} \quad\text{(no softcap: } z = s\,(W h + b) / \tau\text{)}

    Logits and sums are fp32 whatever the inputs' dtype. Differentiable once in ``hidden``, ``weight`` and ``bias``, through
    ``logp``, ``lse`` and ``entropy``. With a frozen head the forward also computes the unit gradient d logp / d hidden, when
    and only when ``hidden`` requires a gradient, and the backward is one elementwise product. Under ``torch.autocast`` the
    operands are cast to the autocast dtype, as for a linear layer.

    With ``lora = (A, B, r)`` the raw logits are ``W h + r B (A h) + b``: the product of a low-rank adapter on the head, with
    gradients to A, B and ``hidden``; A h is summed in fp32 and W is neither changed nor copied.

    ``grad_filter = e`` lets a backend leave out of d logp / d hidden the tiles of (tokens, vocabulary) in which every
    probability is below e (the target's own term always stays). What is lost of a row is at most the probability q of the
    tokens left out, so :math:`\|\Delta\,dh_t\| \le |g_t|\,\frac{|s|}{\tau}\,q_t \max_v \|W_v\|` with
    :math:`q_t \le \min(1, e V)`, where g_t is the gradient that reaches logp_t (and lse_t). Never applied through entropy.

    Args:
        hidden: (T, H) fp32 | bf16 | fp16. Hidden states that predict the targets (already shifted).
        weight: (V, H), dtype of ``hidden``. The lm_head.
        targets: (T,) int64 | int32, below V; a negative id is a row that does not count and costs nothing.
        bias: (V,), dtype of ``hidden``, or None.
        logit_scale: s, multiplies the raw logits.
        softcap: c, bounds the logits by tanh (Gemma 2), or None.
        temperature: tau, divides the logits last.
        outputs: names out of "entropy" (nats), "mean_logit" (mean of z over V), "is_top1" (no logit is above the target's).
        lora: (A, B, r): A (R, H), B (V, R), each of ``hidden``'s dtype or fp32, and the factor r (PEFT's alpha / R); or None.
        grad_filter: e for the gradient of ``hidden``, a probability; 0 is exact. Only the triton backend skips; the others
            compute everything, which keeps the bound.
        head_grad_filter: the same for the gradients of ``weight``, ``bias`` and ``lora``'s B; tiles below both are not even
            recomputed. Its error is bounded by e times the sum of the absolute upstream gradients per vocabulary row.
        backend: "auto", "reference", "cpu" or "triton". A named backend that cannot run raises with the reason.
            The environment variable PREFOPT_BACKEND takes the place of "auto".

    Returns:
        TokenLogprobs; ``logp`` and ``lse`` (T,) fp32 in nats, exactly 0 where ``targets < 0``, as is every other output.
        ``mean_logit`` and ``is_top1`` carry no gradient.

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
    return score(
        hidden,
        weight,
        targets,
        bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        outputs=outputs,
        lora=lora,
        grad_filter=grad_filter,
        head_grad_filter=head_grad_filter,
        backend=backend,
        keep_unit=True,
    )


def score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: Sequence[str],
    lora: tuple[Tensor, Tensor, float] | None,
    grad_filter: float,
    head_grad_filter: float,
    backend: str,
    keep_unit: bool,
) -> TokenLogprobs:
    """``linear_logprob``; without ``keep_unit`` a frozen head's forward leaves out the unit gradient.

    That gradient serves a backward through ``logp`` alone; who goes on from ``lse`` would pay for it in vain.
    """
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    # meta has no autocast; torch.amp.is_autocast_available would say so, but torch 2.11 cannot trace it
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = (_autocast(operand, dtype) for operand in (hidden, weight, bias))
    check_call(hidden, weight, targets, bias, logit_scale, softcap, temperature, outputs)
    check_filters(grad_filter, head_grad_filter)
    A, B, lora_scale = check_lora(lora, hidden, weight)
    low_hidden = None
    if lora is not None:
        with torch.autocast(device, enabled=False):
            low_hidden = lora_scale * (hidden.float() @ A.float().T)  # (T, R), autograd's to differentiate
    operands = Operands(hidden, weight, targets, bias, low_hidden, B)
    heads = (weight, bias, low_hidden, B)
    frozen_head = not any(operand is not None and operand.requires_grad for operand in heads)
    backend = select_backend(hidden, weight, backend)
    logp, lse, entropy, mean_logit, is_top1, _unit, _tile_max = _linear_logprob(
        *operands,
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        *(name in outputs for name in OUTPUTS),
        keep_unit and torch.is_grad_enabled() and frozen_head and hidden.requires_grad,
        torch.is_grad_enabled() and not frozen_head and filters_head(backend, head_grad_filter),
        float(grad_filter),
        float(head_grad_filter),
        backend,
    )
    optional = {"entropy": entropy, "mean_logit": mean_logit, "is_top1": is_top1}
    return TokenLogprobs(logp, lse, **{name: optional[name] for name in OUTPUTS if name in outputs})


def explain(hidden: Tensor, weight: Tensor) -> dict[str, str | None]:
    """Why each backend would refuse a call with these operands; None where it would run.

    Example:
        >>> import torch
        >>> from prefopt_kernels import explain
        >>> explain(torch.eye(2), torch.zeros(4, 2))["reference"] is None
        True
    """
    return {name: module.why_not(hidden, weight) for name, module in BACKENDS.items()}


def select_backend(hidden: Tensor, weight: Tensor, backend: str = "auto") -> str:
    """The backend that runs this call: the named one, or for "auto" the first that can."""
    if backend == "auto":
        backend = os.environ.get("PREFOPT_BACKEND", "auto")
    if backend == "auto":
        return next(name for name, module in BACKENDS.items() if module.why_not(hidden, weight) is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {['auto', *BACKENDS]}")
    reason = BACKENDS[backend].why_not(hidden, weight)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run this call: {reason}")
    return backend


def filters_head(backend: str, head_grad_filter: float) -> bool:
    """Whether the forward must keep the largest logit of every tile for the backward."""
    return backend == "triton" and head_grad_filter > 0


def _autocast(operand: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return operand.to(dtype) if isinstance(operand, Tensor) and operand.is_floating_point() else operand


@torch.library.custom_op("prefopt_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    want_entropy: bool,
    want_mean_logit: bool,
    want_is_top1: bool,
    want_unit: bool,
    want_tile_max: bool,
    grad_filter: float,
    head_grad_filter: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if targets.device.type == "cpu":
        check_targets(targets, weight.shape[0])
    wanted = {
        "logp": True,
        "lse": True,
        "entropy": want_entropy,
        "mean_logit": want_mean_logit,
        "is_top1": want_is_top1,
        "unit": want_unit,
        "tile_max": want_tile_max,
    }
    want = frozenset(name for name, is_wanted in wanted.items() if is_wanted)
    operands = Operands(hidden, weight, targets, bias, low_hidden, low_weight)
    transform = Transform(logit_scale, softcap, temperature)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the fp32 logits
        out = BACKENDS[backend].forward(operands, transform, want, grad_filter)
    return tuple(out[name] if name in want else _unwanted(name, hidden) for name in wanted)


def _unwanted(name: str, hidden: Tensor) -> Tensor:
    """An output must be a tensor of its own even where nobody asked for it."""
    dtype = {"is_top1": torch.bool, "unit": hidden.dtype}.get(name, torch.float32)
    return hidden.new_empty(0, dtype=dtype)


@_linear_logprob.register_fake
def _(hidden, weight, targets, bias, low_hidden, low_weight, scale, cap, temperature, *flags):
    *wants, want_unit, want_tile_max, _grad_filter, _head_grad_filter, _backend = flags
    T, H = hidden.shape
    row = hidden.new_empty(T, dtype=torch.float32)
    optional = [
        torch.empty_like(row, dtype=torch.bool if name == "is_top1" else row.dtype)
        if wanted
        else _unwanted(name, hidden)
        for name, wanted in zip(OUTPUTS, wants, strict=True)
    ]
    unit = hidden.new_empty(T, H) if want_unit else _unwanted("unit", hidden)
    tiles = -(-weight.shape[0] // FILTER_TILE)
    tile_max = hidden.new_empty(tiles, T, dtype=torch.float32) if want_tile_max else None
    return (
        row,
        torch.empty_like(row),
        *optional,
        unit,
        _unwanted("tile_max", hidden) if tile_max is None else tile_max,
    )


def _setup_context(ctx, inputs, output):
    operands, transform, flags = inputs[:6], inputs[6:9], inputs[9:]
    want_entropy, _mean, _top1, want_unit, want_tile_max, *filters, backend = flags
    _logp, lse, entropy, mean_logit, is_top1, unit, tile_max = output
    ctx.numbers = (*transform, *filters)
    ctx.backend = backend
    without = () if want_entropy else (entropy,)
    ctx.mark_non_differentiable(mean_logit, is_top1, unit, tile_max, *without)
    ctx.set_materialize_grads(False)  # None says which of logp, lse and entropy the caller left out
    ctx.save_for_backward(  # O(T H), never (T, V)
        *operands,
        lse,
        entropy if want_entropy else None,
        unit if want_unit else None,
        tile_max if want_tile_max else None,
    )


_INPUTS = 17  # of the custom op
_DIFFERENTIABLE = {"hidden": 0, "weight": 1, "bias": 3, "low_hidden": 4, "low_weight": 5}


def _backward(ctx, dlogp, dlse, dentropy, *_not_differentiable):
    grads = [None] * _INPUTS
    need = [ctx.needs_input_grad[place] for place in _DIFFERENTIABLE.values()]
    if (dlogp is None and dlse is None and dentropy is None) or not any(need):
        return tuple(grads)
    made = _linear_logprob_backward(dlogp, dlse, dentropy, *ctx.saved_tensors, *ctx.numbers, *need, ctx.backend)
    for place, needed, grad in zip(_DIFFERENTIABLE.values(), need, made, strict=True):
        grads[place] = grad if needed else None
    return tuple(grads)


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
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    grad_filter: float,
    head_grad_filter: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_low_hidden: bool,
    need_low_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    flags = (need_hidden, need_weight, need_bias, need_low_hidden, need_low_weight)
    need = frozenset(name for name, needed in zip(_DIFFERENTIABLE, flags, strict=True) if needed)
    if unit is not None and dlse is None and dentropy is None:
        grads = {"hidden": (dlogp[:, None] * unit).to(unit.dtype)}
    else:
        saved = Saved(lse, entropy, tile_max, grad_filter, head_grad_filter)
        # on where the backward runs inside the region
        with torch.autocast(hidden.device.type, enabled=False):
            grads = BACKENDS[backend].backward(
                Operands(hidden, weight, targets, bias, low_hidden, low_weight),
                Upstream(dlogp, dlse, dentropy),
                saved,
                Transform(logit_scale, softcap, temperature),
                need,
            )
    return tuple(grads[name] if name in need else weight.new_empty(0) for name in _DIFFERENTIABLE)


@_linear_logprob_backward.register_fake
def _(dlogp, dlse, dentropy, hidden, weight, targets, bias, low_hidden, low_weight, lse, *rest):
    need = dict(zip(_DIFFERENTIABLE, rest[-6:-1], strict=True))
    operands = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "low_hidden": low_hidden,
        "low_weight": low_weight,
    }
    return tuple(
        operands[name].new_empty(operands[name].shape) if needed else weight.new_empty(0)
        for name, needed in need.items()
    )


def _no_double_backward(ctx, *grads):
    raise RuntimeError("linear_logprob has no second derivative: call backward without create_graph=True")


_linear_logprob_backward.register_autograd(_no_double_backward)
