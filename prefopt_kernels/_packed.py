"""Packed sequences: all their tokens one after another, and ``cu_seqlens``, the row where each begins."""

import torch
from torch import Tensor

from prefopt_kernels._checks import INTEGERS, check_bounds, check_device, check_vector


def sequence_logps(logp: Tensor, cu_seqlens: Tensor) -> Tensor:
    r"""Sum per-token log-probabilities over each sequence.

    .. math:: \mathrm{logps}_i = \sum_{t = c_i}^{c_{i+1} - 1} \mathrm{logp}_t

    Sums are taken in fp64 and rounded once, because KTO subtracts two sums of thousands of tokens; the
    order is fixed, so runs repeat bit for bit. Differentiable in ``logp``; nothing waits for a device.

    Args:
        logp: (T,) floating point, nats per token, 0 where a token does not count.
        cu_seqlens: (B + 1,) int32 or int64, non-decreasing from 0 to T. Row at which each sequence
            begins, and T last. Checked on the CPU only, where reading it is free.

    Returns:
        (B,) fp32, nats. An empty sequence gives 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or, on the CPU, value.

    Example:
        >>> import torch
        >>> from prefopt_kernels.modules import sequence_logps
        >>> sequence_logps(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 2, 3]))
        tensor([-3.,  0., -4.])
    """
    check_packing(logp, cu_seqlens)
    offsets = cu_seqlens.long().clamp(0, logp.shape[0])  # a wrong one must not read past the end
    # unsafe=True leaves out torch's own check, which would read the offsets back to the host.
    sums = torch.segment_reduce(logp.double(), "sum", offsets=offsets, initial=0.0, unsafe=True)
    return sums.float()


def check_packing(tokens: Tensor, cu_seqlens: Tensor, name: str = "logp") -> None:
    check_vector(name, tokens)
    check_vector("cu_seqlens", cu_seqlens, size="B + 1", dtypes=INTEGERS)
    if cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (B + 1,) with at least one sequence"
        )
    check_device(name, tokens, cu_seqlens=cu_seqlens)
    # Only where reading values neither waits for a device nor breaks a traced graph.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_bounds(cu_seqlens, tokens.shape[0], name)
