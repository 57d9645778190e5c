"""Per-token log-probabilities under a linear head, without materialising the logits.

Start here. One public function, one custom op with one fake and one autograd rule, and the choice of backend. A backend is a
module with ``why_not``, ``forward`` and ``backward``; backend_reference.py is the definition.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefopt_kernels.ops.linear_logprob import backend_cpu, backend_reference
from prefopt_kernels.ops.linear_logprob.checks import OUTPUTS, check_call, check_targets
from prefopt_kernels.ops.linear_logprob.transform import Transform

BACKENDS = {
    "cpu": backend_cpu,
    "reference": backend_reference,
}  # in the order in which "auto" tries them
ABSENT = {
    name: f"this version has no {name} kernel for linear_logprob" for name in ("triton", "cuda")
}


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
    backend: str = "auto",
) -> TokenLogprobs:
    r"""Log-probability of every target token under the head ``weight``.

    .. math:: \log p_t = z_{t,y_t} - \log \sum_v e^{z_{t,v}}, \qquad
              z = \frac{c}{\tau} \tanh\frac{s\,(W h + b)}{c} \quad\text{(no softcap: } z = s\,(W h + b) / \tau\text{)}

    Logits and sums are fp32 whatever the inputs' dtype. Differentiable once in ``hidden``, ``weight`` and ``bias``, through
    ``logp``, ``lse`` and ``entropy``. With a frozen head the forward also computes the unit gradient d logp / d hidden, when
    and only when ``hidden`` requires a gradient, and the backward is one elementwise product. Under ``torch.autocast`` the
    operands are cast to the autocast dtype, as for a linear layer.

    Args:
        hidden: (T, H) fp32 | bf16 | fp16. Hidden states that predict the targets (already shifted).
        weight: (V, H), dtype of ``hidden``. The lm_head.
        targets: (T,) int64 | int32, below V; a negative id is a row that does not count and costs nothing.
        bias: (V,), dtype of ``hidden``, or None.
        logit_scale: s, multiplies the raw logits.
        softcap: c, bounds the logits by tanh (Gemma 2), or None.
        temperature: tau, divides the logits last.
        outputs: names out of "entropy" (nats), "mean_logit" (mean of z over V), "is_top1" (no logit is above the target's).
        backend: "auto" or one of "reference", "cpu", "triton", "cuda". A named backend that cannot run raises with the reason.
            The environment variable PREFOPT_BACKEND takes the place of "auto".

    Returns:
        TokenLogprobs; ``logp`` and ``lse`` (T,) fp32 in nats, exactly 0 where ``targets < 0``, as is every other output.
        ``mean_logit`` and ``is_top1`` carry no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; named in the message.
        RuntimeError: the named backend cannot run here; or a second derivative is asked for.

    Example:
        >>> import torch
        >>> from prefopt_kernels import linear_logprob
        >>> hidden, weight = torch.eye(2), torch.zeros(4, 2)  # T=2, H=2, V=4: uniform
        >>> linear_logprob(hidden, weight, torch.tensor([3, -100])).logp.exp()
        tensor([0.2500, 1.0000])
    """
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = (_autocast(operand, dtype) for operand in (hidden, weight, bias))
    check_call(hidden, weight, targets, bias, logit_scale, softcap, temperature, outputs)
    frozen_head = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    want_unit = torch.is_grad_enabled() and hidden.requires_grad and frozen_head
    logp, lse, entropy, mean_logit, is_top1, _unit = _linear_logprob(
        hidden,
        weight,
        targets,
        bias,
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        *(name in outputs for name in OUTPUTS),
        want_unit,
        select_backend(hidden, weight, backend),
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
    return {name: module.why_not(hidden, weight) for name, module in BACKENDS.items()} | ABSENT


def select_backend(hidden: Tensor, weight: Tensor, backend: str = "auto") -> str:
    """The backend that runs this call: the named one, or for "auto" the first that can."""
    if backend == "auto":
        backend = os.environ.get("PREFOPT_BACKEND", "auto")
    if backend == "auto":
        return next(
            name for name, module in BACKENDS.items() if module.why_not(hidden, weight) is None
        )
    if backend not in BACKENDS and backend not in ABSENT:
        raise ValueError(f"backend is {backend!r}; expected one of {['auto', *BACKENDS, *ABSENT]}")
    reason = ABSENT[backend] if backend in ABSENT else BACKENDS[backend].why_not(hidden, weight)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run this call: {reason}")
    return backend


def _autocast(operand: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return (
        operand.to(dtype)
        if isinstance(operand, Tensor) and operand.is_floating_point()
        else operand
    )


@torch.library.custom_op("prefopt_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    want_entropy: bool,
    want_mean_logit: bool,
    want_is_top1: bool,
    want_unit: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if targets.device.type == "cpu":
        check_targets(targets, weight.shape[0])
    want = {"entropy": want_entropy, "mean_logit": want_mean_logit, "is_top1": want_is_top1}
    transform = Transform(logit_scale, softcap, temperature)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the fp32 logits
        out = BACKENDS[backend].forward(hidden, weight, targets, bias, transform, want, want_unit)
    none = hidden.new_empty(0, dtype=torch.float32)
    return (
        out["logp"],
        out["lse"],
        out["entropy"] if want_entropy else none,
        out["mean_logit"] if want_mean_logit else none.clone(),
        out["is_top1"] if want_is_top1 else none.bool(),
        out["unit"] if want_unit else none.to(hidden.dtype, copy=True),
    )


@_linear_logprob.register_fake
def _(
    hidden,
    weight,
    targets,
    bias,
    logit_scale,
    softcap,
    temperature,
    want_entropy,
    want_mean_logit,
    want_is_top1,
    want_unit,
    backend,
):
    T, H = hidden.shape

    def rows(wanted, dtype=torch.float32):
        return hidden.new_empty(T if wanted else 0, dtype=dtype)

    return (
        rows(True),
        rows(True),
        rows(want_entropy),
        rows(want_mean_logit),
        rows(want_is_top1, torch.bool),
        hidden.new_empty(T, H) if want_unit else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    (
        hidden,
        weight,
        targets,
        bias,
        *transform,
        want_entropy,
        _mean,
        _top1,
        want_unit,
        ctx.backend,
    ) = inputs
    _logp, lse, entropy, mean_logit, is_top1, unit = output
    ctx.transform = transform
    ctx.mark_non_differentiable(mean_logit, is_top1, unit, *(() if want_entropy else (entropy,)))
    ctx.set_materialize_grads(False)  # None says which of logp, lse and entropy the caller left out
    entropy, unit = entropy if want_entropy else None, unit if want_unit else None
    ctx.save_for_backward(hidden, weight, targets, bias, lse, entropy, unit)  # O(T H), never (T, V)


def _backward(ctx, dlogp, dlse, dentropy, _dmean_logit, _dis_top1, _dunit):
    *operands, unit = ctx.saved_tensors
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    if (dlogp is None and dlse is None and dentropy is None) or not any(need):
        return (None,) * 12
    dhidden, dweight, dbias = _linear_logprob_backward(
        dlogp, dlse, dentropy, *operands, unit, *ctx.transform, *need, ctx.backend
    )
    grads = {0: dhidden, 1: dweight, 3: dbias}
    return tuple(grads[i] if i in grads and ctx.needs_input_grad[i] else None for i in range(12))


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
    lse: Tensor,
    entropy: Tensor | None,
    unit: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    transform = Transform(logit_scale, softcap, temperature)
    if unit is not None and dlse is None and dentropy is None:
        return (dlogp[:, None] * unit).to(unit.dtype), weight.new_empty(0), weight.new_empty(0)
    need = {"hidden": need_hidden, "weight": need_weight, "bias": need_bias}
    with torch.autocast(
        hidden.device.type, enabled=False
    ):  # on where the backward runs inside the region
        grads = BACKENDS[backend].backward(
            dlogp, dlse, dentropy, hidden, weight, targets, bias, lse, entropy, transform, need
        )
    return tuple(grads[name] if needed else weight.new_empty(0) for name, needed in need.items())


@_linear_logprob_backward.register_fake
def _(
    dlogp,
    dlse,
    dentropy,
    hidden,
    weight,
    targets,
    bias,
    lse,
    entropy,
    unit,
    logit_scale,
    softcap,
    temperature,
    need_hidden,
    need_weight,
    need_bias,
    backend,
):
    T, (V, H) = lse.shape[0], weight.shape
    return (
        weight.new_empty(T, H) if need_hidden else weight.new_empty(0),
        weight.new_empty(V, H) if need_weight else weight.new_empty(0),
        weight.new_empty(V) if need_bias else weight.new_empty(0),
    )


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "linear_logprob has no second derivative: call backward without create_graph=True"
    )


_linear_logprob_backward.register_autograd(_no_double_backward)
