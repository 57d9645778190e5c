"""Per-token log-probabilities of two models and the KL between them, without materialising the logits.

Start here. One public function, one custom op with one fake and one autograd rule, and the choice of backend, as in
linear_logprob, whose operands, checks and kernels it uses. reference.py is the definition.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from prefopt_kernels._backends import select_backend
from prefopt_kernels.ops.linear_kl import cpu, reference
from prefopt_kernels.ops.linear_kl.checks import check_ref, check_transforms, pair
from prefopt_kernels.ops.linear_kl.operands import Saved, Transforms, Upstream
from prefopt_kernels.ops.linear_kl.triton_kernels import backend as triton_backend
from prefopt_kernels.ops.linear_logprob import op as linear_logprob
from prefopt_kernels.ops.linear_logprob.checks import (
    OUTPUTS,
    check_lora,
    check_operands,
    check_outputs,
    check_targets,
)
from prefopt_kernels.ops.linear_logprob.op import DIFFERENTIABLE, empty_result, low_of, result_dtype, to_autocast
from prefopt_kernels.ops.linear_logprob.operands import Operands
from prefopt_kernels.ops.linear_logprob.operands import Saved as LogprobSaved
from prefopt_kernels.ops.linear_logprob.operands import Upstream as LogprobUpstream
from prefopt_kernels.ops.linear_logprob.transform import Transform

BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "triton": triton_backend,
    "reference": reference,
}  # in the order in which "auto" tries them

Lora = tuple[Tensor, Tensor, float]


class TokenKL(NamedTuple):
    """What linear_kl returns; every tensor is (T,), and a row whose target is negative is 0 (or False) in all."""

    logp: Tensor
    ref_logp: Tensor
    lse: Tensor
    ref_lse: Tensor
    kl: Tensor
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    logit_scale: float | tuple[float, float] = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    temperature: float | tuple[float, float] = 1.0,
    outputs: Sequence[str] = (),
    lora: Lora | None = None,
    ref_lora: Lora | None = None,
    backend: str = "auto",
    keep_unit: bool = True,
) -> TokenKL:
    r"""Log-probability of every target token under a policy and a reference model, and the KL between the two.

    .. math:: KL_t = \sum_v p_{t,v} (\log p_{t,v} - \log q_{t,v})
                   = E_p[z - z'] - \log \sum_v e^{z_v} + \log \sum_v e^{z'_v}

    p is the policy's distribution of the next token, with logits z, and q that of the reference model, with logits z';
    both logits as in :func:`linear_logprob`. The KL is exact: over the whole vocabulary, not estimated from samples. It
    is 0 or more up to rounding, and 0 to the last bit where both models have equal operands.

    Differentiable once in ``hidden``, ``weight``, ``bias`` and ``lora`` through ``logp``, ``lse``, ``kl`` and
    ``entropy``; the reference model is constant, also where it shares a head that is trained. With a frozen head the
    forward also computes d logp / d hidden when ``hidden`` requires a gradient; a gradient through ``logp`` alone is
    then one elementwise product. Every other gradient recomputes the logits.

    Args:
        hidden: (T, H) fp32 | bf16 | fp16. Hidden states of the policy that predict the targets (already shifted).
        weight: (V, H), dtype of ``hidden``. The policy's lm_head.
        targets: (T,) int64 | int32, below V; a negative id is a row that does not count and costs nothing.
        ref_hidden: (T, H'), dtype of ``hidden``. Hidden states of the reference model.
        ref_weight: (V, H'), dtype of ``hidden``. Its lm_head; None for the policy's, which is then read once for both.
        bias: (V,), dtype of ``hidden``, or None.
        ref_bias: (V,), dtype of ``hidden``, or None: the policy's bias where ``ref_weight`` is None too, else no bias.
        logit_scale: multiplies the raw logits. This and the next two: one value, or a pair (policy, reference).
        softcap: bounds the logits by tanh, or None.
        temperature: divides the logits last.
        outputs: names out of "entropy" (nats), "mean_logit", "is_top1": of the policy, as in :func:`linear_logprob`.
        lora: (A, B, r) of a low-rank adapter on the policy's head, as in :func:`linear_logprob`, or None.
        ref_lora: the same for the reference model: (R, H'), (V, R) and a factor. None is no adapter.
        backend: "auto" or one of "reference", "cpu", "triton". A named backend that cannot run raises with the reason.
            The environment variable PREFOPT_BACKEND replaces "auto".
        keep_unit: whether a frozen head's forward computes d logp / d hidden. Set it to False where the loss goes
            through ``kl``, ``lse`` or ``entropy``.

    Returns:
        TokenKL; ``logp``, ``ref_logp``, ``lse``, ``ref_lse`` and ``kl`` (T,) fp32 in nats, exactly 0 where ``targets <
        0``, as is every other output. ``ref_logp``, ``ref_lse``, ``mean_logit`` and ``is_top1`` carry no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, or an operand of the
            reference model that requires grad; named in the message.
        RuntimeError: the named backend cannot run here; or a second derivative is asked for.
        NotImplementedError: an operand carries a forward-mode tangent, as in ``torch.func.jvp``.

    Example:
        >>> import torch
        >>> from prefopt_kernels import linear_kl
        >>> head = torch.eye(2)  # V = H = 2
        >>> out = linear_kl(torch.tensor([[0.0, 0.0]]), head, torch.tensor([1]), torch.tensor([[0.0, 1.0]]))
        >>> out.kl  # log(1 + e) - 1 / 2 - log 2
        tensor([0.1201])
    """
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    # meta has no autocast; torch.amp.is_autocast_available would say so, but torch 2.11 cannot trace it
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, ref_hidden = (to_autocast(operand, dtype) for operand in (hidden, weight, ref_hidden))
        bias, ref_weight, ref_bias = (to_autocast(operand, dtype) for operand in (bias, ref_weight, ref_bias))
    scales, softcaps = pair("logit_scale", logit_scale), pair("softcap", softcap)
    temperatures = pair("temperature", temperature)
    check_operands(hidden, weight, targets, bias, op="linear_kl")
    check_ref(hidden, weight, targets, ref_hidden, ref_weight, ref_bias, ref_lora)
    check_transforms(scales, softcaps, temperatures)
    check_outputs(outputs)
    A, B, lora_scale = check_lora(lora, hidden, weight, op="linear_kl")
    ref_head = weight if ref_weight is None else ref_weight
    ref_A, ref_B, ref_lora_scale = check_lora(ref_lora, ref_hidden, ref_head, op="linear_kl", prefix="ref_")
    low_hidden, ref_low_hidden = low_of(hidden, A, lora_scale), low_of(ref_hidden, ref_A, ref_lora_scale)
    backend = select_backend(BACKENDS, backend, hidden, weight)
    want = ["logp", "ref_logp", "lse", "ref_lse", "kl", *(name for name in OUTPUTS if name in outputs)]
    trainable_head = any(operand is not None and operand.requires_grad for operand in (weight, bias, low_hidden, B))
    if keep_unit and torch.is_grad_enabled() and hidden.requires_grad and not trainable_head:
        if BACKENDS[backend].KEEPS_UNIT:
            want.append("unit")
    numbers = [float(number or 0.0) for three in zip(scales, softcaps, temperatures, strict=True) for number in three]
    policy = Operands(hidden, weight, targets, bias, low_hidden, B)
    ref = (ref_hidden, ref_weight, ref_bias, ref_low_hidden, ref_B)
    found = dict(zip(RESULTS, _linear_kl(*policy, *ref, numbers, " ".join(want), backend), strict=True))
    always = (found[name] for name in RESULTS[:5])
    return TokenKL(*always, **{name: found[name] for name in OUTPUTS if name in outputs})


RESULTS = (*TokenKL._fields, "unit")  # of the custom op, in order; the first five are always wanted


def _transforms(numbers: list[float]) -> Transforms:
    """From scale, softcap (0 for none) and temperature of the policy, then those of the reference model."""
    three = (Transform(numbers[i], numbers[i + 1] or None, numbers[i + 2]) for i in (0, 3))
    return Transforms(*three)


def _ref_operands(
    policy: Operands,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
) -> Operands:
    """The reference model's; without a head of its own it has the policy's, as the same tensor."""
    if weight is None:
        weight, bias = policy.weight, policy.bias if bias is None else bias
    return Operands(hidden, weight, policy.targets, bias, low_hidden, low_weight)


@torch.library.custom_op("prefopt_kernels::linear_kl", mutates_args=())
def _linear_kl(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_low_hidden: Tensor | None,
    ref_low_weight: Tensor | None,
    numbers: list[float],
    want: str,  # names out of RESULTS, separated by spaces
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if targets.device.type == "cpu":
        check_targets(targets, weight.shape[0])
    policy = Operands(hidden, weight, targets, bias, low_hidden, low_weight)
    ref = _ref_operands(policy, ref_hidden, ref_weight, ref_bias, ref_low_hidden, ref_low_weight)
    wanted = frozenset(want.split())
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the fp32 logits
        out = BACKENDS[backend].forward(policy, ref, _transforms(numbers), wanted)
    found = [out[name] if name in wanted else empty_result(name, hidden) for name in RESULTS]
    logp, ref_logp, lse, ref_lse, kl, entropy, mean_logit, is_top1, unit = found
    return logp, ref_logp, lse, ref_lse, kl, entropy, mean_logit, is_top1, unit


@_linear_kl.register_fake
def _(hidden, weight, targets, bias, low_hidden, low_weight, *rest):
    want = rest[-2].split()
    shapes = {"unit": tuple(hidden.shape)}
    return tuple(
        hidden.new_empty(shapes.get(name, hidden.shape[:1]), dtype=result_dtype(name, hidden))
        if name in want
        else empty_result(name, hidden)
        for name in RESULTS
    )


def _setup_context(ctx, inputs, output):
    *operands, numbers, want, backend = inputs
    results, wanted = dict(zip(RESULTS, output, strict=True)), want.split()
    ctx.numbers, ctx.backend = numbers, backend
    differentiable = {"logp", "lse", "kl", "entropy"} & set(wanted)
    ctx.mark_non_differentiable(*(result for name, result in results.items() if name not in differentiable))
    ctx.set_materialize_grads(False)  # None says which of the outputs the caller left out
    kept = (results[name] if name in wanted else None for name in ("lse", "ref_lse", "kl", "entropy", "unit"))
    ctx.save_for_backward(*operands, *kept)  # O(T H), never (T, V)


def _backward(ctx, *by):
    upstream = dict(zip(RESULTS, by, strict=True))
    through = [upstream[name] for name in ("logp", "lse", "entropy", "kl")]
    needed = dict(zip(Operands._fields, ctx.needs_input_grad, strict=False))
    need = [name for name in DIFFERENTIABLE if needed[name]]
    grads: dict[str, Tensor] = {}
    if need and any(grad is not None for grad in through):
        made = _linear_kl_backward(*through, *ctx.saved_tensors, ctx.numbers, " ".join(need), ctx.backend)
        grads = {name: grad for name, grad in zip(DIFFERENTIABLE, made, strict=True) if name in need}
    constants = len(ctx.needs_input_grad) - len(Operands._fields)  # the reference model's operands, numbers, ...
    return (*(grads.get(name) for name in Operands._fields), *(None for _ in range(constants)))


_linear_kl.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("prefopt_kernels::linear_kl_backward", mutates_args=())
def _linear_kl_backward(
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    dkl: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_low_hidden: Tensor | None,
    ref_low_weight: Tensor | None,
    lse: Tensor,
    ref_lse: Tensor,
    kl: Tensor,
    entropy: Tensor | None,
    unit: Tensor | None,
    numbers: list[float],
    need: str,  # names out of DIFFERENTIABLE, separated by spaces
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needed, transforms = frozenset(need.split()), _transforms(numbers)
    policy = Operands(hidden, weight, targets, bias, low_hidden, low_weight)
    # autocast is still enabled if backward runs inside the context
    with torch.autocast(hidden.device.type, enabled=False):
        if unit is not None and dlogp is not None and dlse is None and dentropy is None and dkl is None:
            grads = {"hidden": (dlogp[:, None] * unit).to(unit.dtype)}
        elif dkl is None:
            saved = LogprobSaved(lse, entropy, None, 0.0, 0.0)
            upstream = LogprobUpstream(dlogp, dlse, dentropy)
            grads = linear_logprob.BACKENDS[backend].backward(policy, upstream, saved, transforms.policy, needed)
        else:
            ref = _ref_operands(policy, ref_hidden, ref_weight, ref_bias, ref_low_hidden, ref_low_weight)
            through, kept = Upstream(dlogp, dlse, dentropy, dkl), Saved(lse, ref_lse, kl, entropy)
            grads = BACKENDS[backend].backward(policy, ref, through, kept, transforms, needed)
    made = [grads[name] if name in needed else weight.new_empty(0) for name in DIFFERENTIABLE]
    by_hidden, by_weight, by_bias, by_low_hidden, by_low_weight = made
    return by_hidden, by_weight, by_bias, by_low_hidden, by_low_weight


@_linear_kl_backward.register_fake
def _(dlogp, dlse, dentropy, dkl, hidden, weight, targets, bias, low_hidden, low_weight, *rest):
    operands, need = Operands(hidden, weight, targets, bias, low_hidden, low_weight)._asdict(), rest[-2].split()
    return tuple(
        operands[name].new_empty(operands[name].shape) if name in need else weight.new_empty(0)
        for name in DIFFERENTIABLE
    )


def _no_double_backward(ctx, *grads):
    raise RuntimeError("linear_kl has no second derivative: call backward without create_graph=True")


_linear_kl_backward.register_autograd(_no_double_backward)
