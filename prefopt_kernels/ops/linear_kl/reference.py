"""The definition of linear_kl in plain torch, chunked over tokens. Every kernel is tested against it."""

from torch import Tensor

from prefopt_kernels.ops.linear_kl.operands import Saved, Transforms, Upstream
from prefopt_kernels.ops.linear_logprob.operands import Operands
from prefopt_kernels.ops.linear_logprob.reference import (
    add_products,
    chunks,
    fill,
    new_gradients,
    new_outputs,
    raw_logits,
    why_not,
)
from prefopt_kernels.ops.linear_logprob.transform import logit_gradient

__all__ = ["KEEPS_UNIT", "backward", "forward", "why_not"]

KEEPS_UNIT = True  # whether the forward can make the unit gradient of a frozen head


def forward(policy: Operands, ref: Operands, transforms: Transforms, want: frozenset[str]) -> dict[str, Tensor]:
    """Every wanted output; ``unit`` = d logp / d hidden."""
    out = new_outputs(policy.hidden, want)
    ref_out = {"logp": out["ref_logp"], "lse": out["ref_lse"]}
    policy, ref = (operands._replace(weight=operands.weight.float()) for operands in (policy, ref))
    for rows in chunks(policy):
        z, slope = transforms.policy.apply(raw_logits(policy, rows))
        ref_z, ref_slope = transforms.ref.apply(raw_logits(ref, rows))
        fill(out, rows, policy, z, slope)
        fill(ref_out, rows, ref, ref_z, ref_slope)
        p = z.softmax(-1)
        mean_gap = (p * (z - ref_z).masked_fill(p == 0, 0)).sum(-1)
        out["kl"][rows] = mean_gap - out["lse"][rows] + out["ref_lse"][rows]
    return out


def backward(
    policy: Operands, ref: Operands, upstream: Upstream, saved: Saved, transforms: Transforms, need: frozenset[str]
) -> dict[str, Tensor]:
    """Gradients of ``sum(dlogp * logp + dlse * lse + dentropy * entropy + dkl * kl)`` for the needed operands."""
    grads = new_gradients(policy, need)
    wide, ref = (operands._replace(weight=operands.weight.float()) for operands in (policy, ref))
    for rows in chunks(policy):
        z, slope = transforms.policy.apply(raw_logits(wide, rows))
        log_q = transforms.ref.apply(raw_logits(ref, rows))[0] - saved.ref_lse[rows, None]
        lse, through = saved.lse[rows], (upstream.logp, upstream.lse, upstream.entropy, saved.entropy)
        dz = logit_gradient(
            z, policy.targets[rows].long(), lse, *(None if value is None else value[rows] for value in through)
        )
        log_p = z - lse[:, None]
        p = log_p.exp()
        gap = (log_p - log_q - saved.kl[rows, None]).masked_fill(p == 0, 0)
        dz += upstream.kl[rows, None] * p * gap
        add_products(grads, rows, wide, dz * slope)
    return {name: grad.to(getattr(policy, name).dtype) for name, grad in grads.items()}
