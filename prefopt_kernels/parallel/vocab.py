"""Scores under a head whose rows are sharded over ranks, without gathering it.

``vocab_parallel_linear_logprob`` is ``linear_logprob`` for a head whose vocabulary is sharded over a tensor-parallel
group. Each rank runs the op on its own rows; the ranks all-reduce a few numbers per token, and in the backward the
gradient of the hidden states.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from prefopt_kernels.ops._forward_mode import refuse_tangents
from prefopt_kernels.ops.linear_logprob import TokenLogprobs, linear_logprob

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Lora = tuple[Tensor, Tensor, float]


def vocab_parallel_linear_logprob(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    bias_shard: Tensor | None = None,
    *,
    vocab_start: int,
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    lora: Lora | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    r"""``linear_logprob`` under a head whose rows are sharded over the ranks of ``group``.

    .. math:: \mathrm{lse}_t = m_t + \log \sum_r e^{\mathrm{lse}_{t,r} - m_t}, \qquad m_t = \max_r \mathrm{lse}_{t,r},
              \qquad \log p_t = z_{t,y_t} - \mathrm{lse}_t

    All ranks must call it with the same T tokens; this is not verified, because a check would cost a collective.
    Forward: an all-reduce of 4 T bytes (maximum) and one of 24 T (fp64; 8 T more for "entropy", 16 T for "mean_logit").
    Backward: one all-reduce of the gradient of ``hidden``, in its dtype, and one of that of a trained A. Results
    are the same on every rank; each rank has the gradients of its shards. Differentiable as ``linear_logprob``.

    Args:
        hidden: (T, H) fp32 | bf16 | fp16, the same on every rank.
        weight_shard: (V_r, H), dtype of ``hidden``: this rank's rows of the head. V_r may differ by rank and be 0.
        targets: (T,) int64 | int32, the same on every rank, ids of the whole vocabulary; negative for tokens that are
            not scored.
        bias_shard: (V_r,), dtype of ``hidden``, or None.
        vocab_start: id of this rank's first row. The shards of the group cover the vocabulary without overlap.
        group: process group or one-dimensional DeviceMesh that shards the vocabulary; by default all ranks.
        logit_scale, softcap, temperature, backend: as for ``linear_logprob``.
        outputs: names out of "entropy" and "mean_logit".
        lora: (A, B, r) of an adapter on the head: A (R, H), the same on every rank, and this rank's rows of B.

    Returns:
        TokenLogprobs, every tensor (T,) fp32, for the whole vocabulary.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; a target is in no shard or
            in two (checked on the CPU; elsewhere such a row is NaN).
        RuntimeError: no process group is initialised; or as ``linear_logprob``.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from prefopt_kernels import vocab_parallel_linear_logprob
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> hidden, weight = torch.eye(2), torch.zeros(4, 2)  # T=2, H=2, V=4: uniform
        >>> vocab_parallel_linear_logprob(hidden, weight, torch.tensor([3, -100]), vocab_start=0).logp.exp()
        tensor([0.2500, 1.0000])
        >>> dist.destroy_process_group()

    Source: the parallel cross-entropy of Shoeybi et al. 2019 (arXiv:1909.08053), section 3, on log-sum-exps.
    """
    group = _process_group(group)
    _check(hidden, weight_shard, targets, bias_shard, vocab_start, outputs, lora)
    rows = weight_shard.shape[0]
    if rows == 0:  # the op needs a row, and every rank must take part in the collectives
        weight_shard = pad(weight_shard, (0, 0, 0, 1))
        bias_shard = None if bias_shard is None else pad(bias_shard, (0, 1))
        lora = None if lora is None else (lora[0], pad(lora[1], (0, 0, 0, 1)), lora[2])
    counts = targets >= 0
    local = targets - vocab_start
    inside = counts & (local >= 0) & (local < rows)
    if lora is None:
        (hidden,) = SumGradients.apply(group, hidden)
    else:
        A, B, scale = lora
        hidden, A = SumGradients.apply(group, hidden, A)
        lora = (A, B, scale)
    own = linear_logprob(
        hidden,
        weight_shard,
        torch.where(inside, local, torch.where(counts, 0, -1)),  # any valid row for targets of other ranks
        bias_shard,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        outputs=outputs,
        lora=lora,
        grad_filter=0.0,
        head_grad_filter=0.0,
        backend=backend,
        keep_unit=False,
    )
    lse = own.lse if rows else torch.full_like(own.lse, float("-inf")) + 0 * own.lse
    logp, lse, entropy, mean_logit = _Combine.apply(
        group, rows, counts, inside, own.logp, lse, own.entropy, own.mean_logit
    )
    return TokenLogprobs(logp, lse, entropy, mean_logit)


class SumGradients(torch.autograd.Function):
    """The identity; gradients are all-reduced over the group, in their dtypes."""

    @staticmethod
    def forward(ctx: Any, group: "dist.ProcessGroup", *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sums = [
            grad.clone(memory_format=torch.contiguous_format) if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad[1:], strict=True)
        ]
        for each in sums:
            if each is not None:
                dist.all_reduce(each, group=ctx.group)
        return (None, *sums)


class _Combine(torch.autograd.Function):
    """Results for the whole vocabulary from those of the shards.

    With w_r = exp(lse_r - lse), the probability mass of rank r's rows: d lse = sum w_r d lse_r, and the entropy is
    sum w_r (entropy_r - log w_r). fp64 is free at this size and keeps log(1 + 1e-6) exact.
    """

    @staticmethod
    def forward(ctx, group, rows, counts, inside, logp, lse, entropy, mean_logit):
        top = lse.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        shift = lse.double() - top  # (T,), at most 0
        mass = shift.exp()
        sums = [mass, torch.where(inside, logp + shift, 0.0), inside.double()]
        if entropy is not None:
            sums.append(torch.where(mass > 0, mass * (entropy - shift), 0.0))
        if mean_logit is not None:
            sums += [rows * mean_logit.double(), torch.full_like(mass, rows)]
        reduced = torch.stack(sums)
        dist.all_reduce(reduced, group=group)
        total, target, owners, *rest = reduced
        log_total = total.log()
        target = _check_owners(target, owners, counts)
        log_mass = shift - log_total  # (T,), log w_r
        out = [target - log_total, top + log_total]
        out.append(None if entropy is None else rest[0] / total + log_total)
        out.append(None if mean_logit is None else rest[-2] / rest[-1])
        out = [None if each is None else torch.where(counts, each, 0.0).float() for each in out]
        ctx.save_for_backward(inside, log_mass.float(), entropy, out[2])
        ctx.set_materialize_grads(False)
        if mean_logit is not None:
            ctx.mark_non_differentiable(out[3])
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, dlse, dentropy, _dmean_logit):
        inside, log_mass, own_entropy, entropy = ctx.saved_tensors
        mass = log_mass.exp()
        own_dlogp = None if dlogp is None else torch.where(inside, dlogp, 0.0)
        own_dlse = torch.zeros_like(mass)
        if dlogp is not None:  # 1 - w_r by expm1, exact where w_r is near 1
            own_dlse += dlogp * torch.where(inside, -torch.expm1(log_mass), -mass)
        if dlse is not None:
            own_dlse += dlse * mass
        own_dentropy = None
        if dentropy is not None:
            own_dentropy = dentropy * mass
            surprise = own_entropy - log_mass.clamp(min=-1000)  # mass underflows to 0 long before
            own_dlse += own_dentropy * (surprise - entropy)
        return None, None, None, None, own_dlogp, own_dlse, own_dentropy, None


def _check_owners(target: Tensor, owners: Tensor, counts: Tensor) -> Tensor:
    """``target``, NaN where not exactly one rank has it; an error on the CPU, where the check needs no sync."""
    wrong = counts & (owners != 1)
    if wrong.device.type == "cpu" and not torch.compiler.is_compiling() and wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{row}] is in the shards of {int(owners[row])} ranks; expected one: ids below the vocabulary "
            "size, and shards that cover the vocabulary without overlap, each with its vocab_start"
        )
    return torch.where(wrong, float("nan"), target)


def _process_group(group: "dist.ProcessGroup | DeviceMesh | None") -> "dist.ProcessGroup":
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed has no process group; expected init_process_group before sharded heads")
    if group is None:
        group = dist.group.WORLD
        assert group is not None
    if isinstance(group, dist.ProcessGroup):
        return group
    if group.ndim != 1:
        raise ValueError(
            f"group is a DeviceMesh of {group.ndim} dimensions; expected the one that shards the vocabulary"
        )
    return group.get_group()


def _check(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    bias_shard: Tensor | None,
    vocab_start: int,
    outputs: Sequence[str],
    lora: Lora | None,
) -> None:
    """Checks that need this function's argument names; the op checks the rest before the first collective."""
    named = {"hidden": hidden, "weight_shard": weight_shard, "targets": targets, "bias_shard": bias_shard}
    for name, value in named.items():
        if name == "bias_shard" and value is None:
            continue
        if not isinstance(value, Tensor) or hasattr(value, "device_mesh"):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a plain tensor")
    if lora is not None:
        named |= {"lora's A": lora[0], "lora's B": lora[1]}
    refuse_tangents("vocab_parallel_linear_logprob", named)
    if weight_shard.ndim != 2:
        raise ValueError(f"weight_shard has shape {tuple(weight_shard.shape)}; expected (V_r, H)")
    if bias_shard is not None and bias_shard.shape != weight_shard.shape[:1]:
        raise ValueError(
            f"bias_shard has shape {tuple(bias_shard.shape)}; expected ({weight_shard.shape[0]},), one for each row of "
            "weight_shard"
        )
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int) or vocab_start < 0:
        raise ValueError(f"vocab_start is {vocab_start!r}; expected the id of the first row, 0 or above")
    if "is_top1" in outputs:
        raise ValueError(
            "outputs has 'is_top1', which needs the largest logit of every shard, not returned by the op; expected "
            "names out of ('entropy', 'mean_logit')"
        )
