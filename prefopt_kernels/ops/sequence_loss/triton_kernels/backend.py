"""Two small Triton kernels: sums over tokens, one program for each sequence; then all rows, one program for all.

Also runs on CPU tensors where TRITON_INTERPRET=1 was set before triton was imported.
"""

import torch
from torch import Tensor

from prefopt_kernels.ops._launch import launch
from prefopt_kernels.ops.sequence_loss.parameters import (
    METHODS,
    TENSORS,
    WEIGHTINGS,
    Form,
    Parameters,
)

MISSING: str | None
try:
    import triton

    from prefopt_kernels.ops.sequence_loss.triton_kernels import kernels as kernels
except ImportError as error:
    MISSING, INTERPRETED = f"triton cannot be imported: {error}", False
else:
    MISSING, INTERPRETED = None, triton.knobs.runtime.interpret  # the kernels above are made so

# Launch choices. A sequence has hundreds to thousands of tokens and a call tens to hundreds of rows: all of this is
# latency, so one step of a program should hold a typical sequence, or a typical batch, and no more.
TOKENS = 1024  # of one step: 8 fp64 sums a thread
ROWS = 128  # of one step: the fp64 work on a row takes up to 114 registers, and none spills
WARPS = 4  # so one row a thread
STAGES = 2  # of loops that carry a sum and read a few KiB


def why_not(logp: Tensor) -> str | None:
    if MISSING is not None:
        return MISSING
    if logp.device.type == "cpu" and INTERPRETED:
        return None
    if logp.device.type != "cuda":
        return f"logp is on {logp.device}, the Triton kernels run on CUDA devices (on the CPU with TRITON_INTERPRET=1)"
    major, minor = torch.cuda.get_device_capability(logp.device)
    if major < 8:
        return f"{logp.device} is sm_{major}{minor}, the Triton kernels need sm_80 or newer"
    return None


def forward(
    logp: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    lengths: Tensor | None,
    form: Form,
    parameters: Parameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, B = logp.shape[0], ref_logps.shape[0]
    losses, logps, log_ratios, rewards, slopes = (logp.new_empty(B) for _ in range(5))
    sums = logp.new_empty(8, dtype=torch.float64)
    cu_seqlens = cu_seqlens.contiguous()
    launch(
        kernels.sum_tokens,
        (B,),
        {
            "logp_ptr": logp.contiguous(),
            "cu_seqlens_ptr": cu_seqlens,
            "logps_ptr": logps,
            "T": T,
            "TOKENS": TOKENS,
        },
        num_warps=WARPS,
        num_stages=STAGES,
    )
    # The metrics, and the mean of the decision weights, need every row's sum. Without atomics or locks only the end of
    # a launch tells that all programs are done: hence a second one.
    p = parameters
    tensors = {name: value if isinstance(value, Tensor) else None for name, value in _named(p)}
    numbers = {name: 0.0 if isinstance(value, Tensor) else value for name, value in _named(p)}
    launch(
        kernels.all_rows,
        (1,),
        {
            "cu_seqlens_ptr": cu_seqlens,
            "ref_logps_ptr": ref_logps.contiguous(),
            "labels_ptr": labels.contiguous(),
            "lengths_ptr": None if lengths is None else lengths.contiguous(),
            "logps_ptr": logps,
            "losses_ptr": losses,
            "log_ratios_ptr": log_ratios,
            "rewards_ptr": rewards,
            "slopes_ptr": slopes,
            "sums_ptr": sums,
            "B": B,
            **{f"{name}_ptr": tensors[name] for name in TENSORS},
            **numbers,
            "METHOD": METHODS.index(form.method),
            "WIN": _code(form.win_weighting),
            "DECISION": _code(form.decision_weighting),
            "OWN_MEAN": tensors["decision_mean"] is None and p.decision_mean == 0,
            "CURVED": p.alpha != 1,
            "AVERSE": p.loss_aversion != 1,
            "ODDS": p.odds_weight > 0,
            "ROWS": ROWS,
        },
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return losses, logps, log_ratios, rewards, sums, slopes


def backward(dlosses: Tensor | None, dlogps: Tensor | None, cu_seqlens: Tensor, slopes: Tensor, tokens: int) -> Tensor:
    # Rows outside of a cu_seqlens that is wrong, which only the CPU can tell, get 0 and not what lay in memory.
    dlogp = slopes.new_zeros(tokens)
    launch(
        kernels.spread,
        (slopes.shape[0],),
        {
            "dlosses_ptr": None if dlosses is None else dlosses.contiguous(),
            "dlogps_ptr": None if dlogps is None else dlogps.contiguous(),
            "cu_seqlens_ptr": cu_seqlens.contiguous(),
            "slopes_ptr": slopes,
            "dlogp_ptr": dlogp,
            "T": tokens,
            "TOKENS": TOKENS,
        },
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return dlogp


def _named(parameters: Parameters) -> list[tuple[str, Tensor | float]]:
    return list(parameters._asdict().items())


def _code(weighting: str | None) -> int:
    return 0 if weighting is None else 1 + WEIGHTINGS.index(weighting)
