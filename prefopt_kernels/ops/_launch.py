"""The one place that launches Triton kernels, so that launches can be recorded instead of run.

The static report cross-compiles what a call would launch: it runs a backend on meta tensors inside ``recording`` and
gets each kernel with the arguments of a real call.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch; ``arguments`` by the names of the kernel's parameters, ``kernel`` a function of ``triton.jit``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_records: list[Launch] | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
) -> None:
    """Start ``kernel`` over ``grid`` on the device of its tensors; an empty grid launches nothing."""
    if 0 in grid:
        return
    if _records is not None:
        _records.append(Launch(kernel, grid, arguments, num_warps, num_stages))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches instead of running them."""
    global _records
    outer, _records = _records, []
    try:
        yield _records
    finally:
        _records = outer
