"""Sums of token log-probabilities, the loss of each sequence and its gradient, in one call.

Start here. One public function, one custom op with one fake and one autograd rule, and the choice of backend. A backend
is a module with ``why_not``, ``forward`` and ``backward``; reference.py is the definition, which autograd
differentiates.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt_kernels._backends import select_backend
from prefopt_kernels.ops.sequence_loss import cpu, reference
from prefopt_kernels.ops.sequence_loss.checks import check_call, check_values
from prefopt_kernels.ops.sequence_loss.parameters import TENSORS, Form, Parameters
from prefopt_kernels.ops.sequence_loss.triton_kernels import backend as backend_triton

BACKENDS = {
    "cpu": cpu,
    "triton": backend_triton,
    "reference": reference,
}  # in the order in which "auto" tries them

SUMS = tuple(
    f"{label}/{name}" for label in ("desirable", "undesirable") for name in ("count", "rewards", "logps", "losses")
)  # what SequenceLoss.sums holds, by index


class SequenceLoss(NamedTuple):
    """What sequence_loss returns. The gradient flows through ``losses`` and ``logps``; the rest is to be logged."""

    losses: Tensor  # (B,) fp32
    logps: Tensor  # (B,) fp32, nats
    log_ratios: Tensor  # (B,) fp32, nats: logps - ref_logps
    rewards: Tensor  # (B,) fp32: beta * log_ratios
    sums: Tensor  # (8,) fp64, over the rows of each class, named by SUMS


def sequence_loss(
    logp: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    lengths: Tensor | None = None,
    *,
    method: str = "kto",
    beta: float,
    reference_point: Tensor | float = 0.0,
    shift: Tensor | float = 0.0,
    shift_gate: Tensor | float = 0.0,
    shift_bound: float = 10.0,
    loss_aversion: float = 1.0,
    alpha: float = 1.0,
    kappa: float = 0.1,
    win_weighting: str | None = None,
    decision_weighting: str | None = None,
    decision_clip: tuple[float, float] = (0.5, 2.0),
    decision_mean: Tensor | float | None = None,
    odds_weight: float = 0.0,
    odds_baseline: Tensor | float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    main_bound: float | None = None,
    odds_bound: float | None = None,
    backend: str = "auto",
) -> SequenceLoss:
    r"""Loss of each packed sequence from its token log-probabilities.

    .. math:: \mathrm{logps}_i = \sum_{t = c_i}^{c_{i+1} - 1} \mathrm{logp}_t, \qquad
              \ell_i = L(\mathrm{logps}_i, \mathrm{ref}_i, s_i, n_i)

    where L is the loss that ``method`` names: :func:`prefopt_kernels.kto_loss`, ``apo_zero_loss``, ``bco_loss`` or
    ``enhanced_kto_loss``, whose docstrings have the formulas. Sums over tokens are fp64, rounded once to fp32. The
    forward also computes d loss / d logps in closed form, so that the backward is one multiplication for each token:
    :math:`d\,\mathrm{logp}_t = d\ell_i \, \partial\ell_i / \partial\mathrm{logps}_i + d\,\mathrm{logps}_i`. Nothing
    waits for a device, and the same call gives the same bits.

    Args:
        logp: (T,) fp32, nats per token, 0 where a token does not count.
        cu_seqlens: (B + 1,) int32 | int64, non-decreasing from 0 to T: the row at which each sequence begins, and T.
            Its values are checked on the CPU only, where reading them is free.
        ref_logps: (B,) fp32, nats under the reference model; a constant to the gradient.
        labels: (B,) bool, True is desirable.
        lengths: (B,) int32 | int64, tokens of each sequence that count; None: the differences of ``cu_seqlens``. Read
            by the decision weight and the odds ratio.
        method: "kto", "apo_zero", "bco" or "enhanced_kto". A keyword that the method does not take must keep its
            default.
        reference_point, shift, shift_gate, odds_baseline, decision_mean: as the loss; a number, or a 0-dim tensor on
            the device of ``logp``, a constant to the gradient. Under torch.compile give what changes as a tensor: each
            number is compiled.
        beta, shift_bound, loss_aversion, alpha, kappa, win_weighting, decision_weighting, decision_clip, odds_weight,
            desirable_weight, undesirable_weight, main_bound, odds_bound: as the loss.
        backend: "auto" or one of "reference", "cpu", "triton". A named backend that cannot run raises with the reason.
            The environment variable PREFOPT_BACKEND replaces "auto".

    Returns:
        SequenceLoss. ``losses``, ``logps``, ``log_ratios`` and ``rewards`` are (B,) fp32; ``sums`` is (8,) fp64 on the
        device of ``logp``, named by ``SUMS``: the number of rows of each class and the sums of their rewards, logps and
        losses, to be added over calls and processes. The gradient flows through ``losses`` and ``logps``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; named in the message.
        RuntimeError: the named backend cannot run here; or a second derivative is asked for, which only the reference
            has.
        NotImplementedError: ``logp`` carries a forward-mode tangent, as in ``torch.func.jvp``.

    Example:
        >>> import torch
        >>> from prefopt_kernels.ops.sequence_loss import SUMS, sequence_loss
        >>> logp = torch.tensor([-3.0, -5.0, -8.0])  # two sequences: two tokens, then one
        >>> out = sequence_loss(logp, torch.tensor([0, 2, 3]), torch.tensor([-18.0, -18.0]),
        ...                     torch.tensor([True, False]), beta=0.1)
        >>> out.logps, out.losses  # both log-ratios are 10, so u is 1 and -1
        (tensor([-8., -8.]), tensor([0.2689, 0.7311]))
        >>> dict(zip(SUMS, out.sums.tolist()))["desirable/rewards"]
        1.0
    """
    given: dict[str, Any] = {
        "reference_point": reference_point,
        "shift": shift,
        "shift_gate": shift_gate,
        "shift_bound": shift_bound,
        "loss_aversion": loss_aversion,
        "alpha": alpha,
        "kappa": kappa,
        "win_weighting": win_weighting,
        "decision_weighting": decision_weighting,
        "decision_clip": decision_clip,
        "decision_mean": decision_mean,
        "odds_weight": odds_weight,
        "odds_baseline": odds_baseline,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
        "main_bound": main_bound,
        "odds_bound": odds_bound,
    }
    check_call(logp, cu_seqlens, ref_logps, labels, lengths, method, beta, given)
    numbers = given | {
        "beta": beta,
        "decision_low": decision_clip[0],
        "decision_high": decision_clip[1],
        "decision_mean": 0.0 if decision_mean is None else decision_mean,
        "main_bound": math.inf if main_bound is None else main_bound,
        "odds_bound": math.inf if odds_bound is None else odds_bound,
    }
    name = select_backend(BACKENDS, backend, logp)
    if name == "reference":  # not an operator, inside of which autograd is off
        form = Form(method, win_weighting, decision_weighting)
        parameters = Parameters(*(numbers[name] for name in Parameters._fields))
        rows = (logp, cu_seqlens, ref_logps, labels, lengths)
        return SequenceLoss(*reference.forward(*rows, form, parameters))
    tensors = [numbers[name].detach().float() if isinstance(numbers[name], Tensor) else None for name in TENSORS]
    *results, _slopes = _sequence_loss(
        logp,
        cu_seqlens,
        ref_logps.detach(),
        labels,
        lengths,
        *tensors,
        [0.0 if isinstance(numbers[name], Tensor) else float(numbers[name]) for name in Parameters._fields],
        method,
        win_weighting,
        decision_weighting,
        name,
    )
    return SequenceLoss(*results)


@torch.library.custom_op("prefopt_kernels::sequence_loss", mutates_args=())
def _sequence_loss(
    logp: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    lengths: Tensor | None,
    reference_point: Tensor | None,
    shift: Tensor | None,
    shift_gate: Tensor | None,
    odds_baseline: Tensor | None,
    decision_mean: Tensor | None,
    numbers: list[float],
    method: str,
    win_weighting: str | None,
    decision_weighting: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if logp.device.type == "cpu":
        check_values(cu_seqlens, lengths, logp.shape[0])
    tensors = (reference_point, shift, shift_gate, odds_baseline, decision_mean)
    given: dict[str, Any] = {n: tensor for n, tensor in zip(TENSORS, tensors, strict=True) if tensor is not None}
    parameters = Parameters(*numbers)._replace(**given)
    with torch.autocast(logp.device.type, enabled=False):
        return BACKENDS[backend].forward(
            logp,
            cu_seqlens,
            ref_logps,
            labels,
            lengths,
            Form(method, win_weighting, decision_weighting),
            parameters,
        )


@_sequence_loss.register_fake
def _(logp, cu_seqlens, ref_logps, *_rest):
    rows = [torch.empty_like(ref_logps, memory_format=torch.contiguous_format) for _ in range(5)]
    losses, logps, log_ratios, rewards, slopes = rows
    return losses, logps, log_ratios, rewards, logp.new_empty(8, dtype=torch.float64), slopes


def _setup_context(ctx, inputs, output):
    logp, cu_seqlens = inputs[0], inputs[1]
    _losses, _logps, log_ratios, rewards, sums, slopes = output
    ctx.backend = inputs[-1]
    ctx.mark_non_differentiable(log_ratios, rewards, sums, slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logp, cu_seqlens, slopes)


def _backward(ctx, dlosses, dlogps, *_rest):
    dlogp = None
    if ctx.needs_input_grad[0] and (dlosses is not None or dlogps is not None):
        dlogp = _sequence_loss_backward(dlosses, dlogps, *ctx.saved_tensors, ctx.backend)
    return (dlogp, *[None] * (len(ctx.needs_input_grad) - 1))  # the other inputs are constants


_sequence_loss.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("prefopt_kernels::sequence_loss_backward", mutates_args=())
def _sequence_loss_backward(
    dlosses: Tensor | None,
    dlogps: Tensor | None,
    logp: Tensor,
    cu_seqlens: Tensor,
    slopes: Tensor,
    backend: str,
) -> Tensor:
    # Of logp only the size is read: it is here so that a second derivative finds an operator, which refuses it.
    return BACKENDS[backend].backward(dlosses, dlogps, cu_seqlens, slopes, logp.shape[0])


@_sequence_loss_backward.register_fake
def _(dlosses, dlogps, logp, cu_seqlens, slopes, backend):
    return slopes.new_empty(logp.shape[0])


def _no_double_backward(ctx, *grads):
    raise RuntimeError("sequence_loss has no second derivative: call backward without create_graph=True")


_sequence_loss_backward.register_autograd(_no_double_backward)
