"""The Triton kernels' entry: when they run, and how a call is cut into launches.

README.md has the algorithms and their cost; config.py every launch choice with its reason.
"""

import torch
from torch import Tensor

from prefopt_kernels.ops.linear_logprob.operands import Operands, Saved, Upstream
from prefopt_kernels.ops.linear_logprob.transform import Transform

try:
    import triton
except ImportError as error:
    triton, INTERPRETED, _MISSING = None, False, f"triton cannot be imported: {error}"
else:
    from prefopt_kernels.ops.linear_logprob.triton_kernels.backward import gradients
    from prefopt_kernels.ops.linear_logprob.triton_kernels.frozen import fill_unit
    from prefopt_kernels.ops.linear_logprob.triton_kernels.inputs import LOG2_E, Call

    INTERPRETED = triton.knobs.runtime.interpret  # read once: torch.compile cannot trace it


FILTERS_HEAD = True  # whether the backward uses tile_max


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    if triton is None:
        return _MISSING
    if hidden.device.type == "cuda":
        capability = _capability(hidden.device)
        if capability < (8, 0):
            return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
        return None
    if hidden.device.type != "cpu" or not INTERPRETED:
        return (
            f"hidden is on {hidden.device}, the Triton kernels run on CUDA devices (on the CPU with TRITON_INTERPRET=1)"
        )
    if hidden.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 wrongly"
    return None


@torch.compiler.assume_constant_result  # asked while a graph is traced, not in it
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def forward(operands: Operands, transform: Transform, want: frozenset[str], grad_filter: float) -> dict[str, Tensor]:
    call = Call(operands, transform)
    out = call.outputs(want)
    if call.T == 0:
        return out
    if "unit" in want:
        fill_unit(call, want, grad_filter, out)
    else:
        partials = call.new_partials(call.blocks)
        call.scan(want, partials, 0, call.blocks, tile_max=out.get("tile_max"))
        call.combine(want, partials, out, 0, call.blocks)
    return out


def backward(
    operands: Operands, upstream: Upstream, saved: Saved, transform: Transform, need: frozenset[str]
) -> dict[str, Tensor]:
    return gradients(Call(operands, transform), upstream, saved, need)


def keep_rate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    grad_filter: float,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> float:
    """Share rho of the (128 tokens, 128 ids) tiles that ``grad_filter`` keeps; 1 - rho is what skipping saves of a
    product.

    For looking, not for training: it runs the forward without gradient and waits for the device. Arguments as
    :func:`prefopt_kernels.linear_logprob`.
    """
    operands, transform = (
        Operands(hidden, weight, targets, bias),
        Transform(logit_scale, softcap, temperature),
    )
    out = forward(operands, transform, frozenset({"logp", "lse", "tile_max"}), 0.0)
    call = Call(operands, transform)
    counted = -(-int(call.count) // call.tiles.block_t)
    if counted == 0:
        return 0.0
    peak = call.peaks(out["tile_max"], call.rows_of(out["lse"]) * LOG2_E)
    return (peak[:counted] >= grad_filter).float().mean().item()
