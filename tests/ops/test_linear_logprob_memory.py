"""Peak extra memory of linear_logprob, measured in a process of its own."""

import pytest
import torch

from prefopt_kernels.ops import _extension
from support.linear_logprob import backends
from support.peak_memory import MIB, H, T, V, logprob_step, peak_bytes

BOUND = 64 * MIB + 3 * T * H * 4  # stated in the op's README; all logits in fp32 would be 98 MiB
SETS = [name.removeprefix("cpu/") for name in backends() if name != "reference"]

pytestmark = pytest.mark.skipif(not SETS, reason=f"no C++ kernels: {_extension.why_not()}")


def peak(dtype, *, isa=None, wanted=("hidden",), outputs=(), backend="cpu") -> int:
    return peak_bytes(logprob_step, dtype, wanted, outputs, backend, isa or SETS[0])


@pytest.mark.parametrize(
    "isa, dtype",
    [
        *((isa, torch.bfloat16) for isa in SETS),
        *((isa, torch.float32) for isa in SETS[:1]),
        (None, torch.float16),
    ],
    ids=str,
)
def test_frozen_head(isa, dtype):
    assert peak(dtype, isa=isa) < BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_head(dtype):
    """The head's gradient is the caller's; beside it the bound is the same."""
    assert peak(dtype, wanted=("hidden", "weight")) < BOUND + V * H * dtype.itemsize


def test_through_the_entropy():
    assert peak(torch.bfloat16, outputs=("entropy",)) < BOUND


def test_the_measure_can_fail():
    """The reference keeps a few tensors of 64 MiB and a copy of the head: seen, and no more than that."""
    assert BOUND < peak(torch.bfloat16, backend="reference") < 6 * 64 * MIB + V * H * 4
