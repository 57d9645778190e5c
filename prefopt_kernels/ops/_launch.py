"""The one place where a Triton kernel starts, so that a launch can be read instead of run.

The static report compiles what a call would launch, for GPUs that are not here: it runs a backend on meta tensors
inside ``recording`` and gets each kernel with the very arguments of a real call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch as it was asked for; ``arguments`` by the names of the kernel's parameters."""

    kernel: Callable
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_records: list[Launch] | None = None


def launch(
    kernel: Callable,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
) -> None:
    """Start ``kernel`` over ``grid`` on the device of its tensors; a grid without programs starts nothing."""
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
    """Inside, launches are listed and not run."""
    global _records
    outer, _records = _records, []
    try:
        yield _records
    finally:
        _records = outer
