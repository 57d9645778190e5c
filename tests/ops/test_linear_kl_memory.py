"""Peak extra memory of linear_kl, measured in a process of its own."""

import pytest
import torch

from prefopt_kernels.ops import _extension
from support.peak_memory import MIB, H, T, V, kl_step, peak_bytes

pytestmark = pytest.mark.skipif(_extension.why_not() is not None, reason=f"no C++ kernels: {_extension.why_not()}")

BOUND = 64 * MIB + 4 * T * H * 4  # stated in the op's README; all logits of one model in fp32 would be 98 MiB


@pytest.mark.parametrize("through", ["logp", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_head(dtype, through):
    assert peak_bytes(kl_step, dtype, ("hidden",), through, "cpu") < BOUND


def test_trained_head():
    """The head's gradient is the caller's; beside it the bound is the same."""
    assert peak_bytes(kl_step, torch.bfloat16, ("hidden", "weight"), "kl", "cpu") < BOUND + V * H * 2


def test_the_measure_can_fail():
    """The reference backend keeps a few tensors of 64 MiB and a copy of the head."""
    assert peak_bytes(kl_step, torch.bfloat16, ("hidden",), "kl", "reference") > BOUND
