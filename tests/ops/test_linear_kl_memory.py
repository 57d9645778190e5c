"""Peak extra memory of linear_kl, measured in a process of its own as the benchmarks measure it."""

import os
import subprocess
import sys

import pytest

from benchmarks.rows import ROOT
from prefopt_kernels.ops import _extension

pytestmark = pytest.mark.skipif(_extension.why_not() is not None, reason=f"no C++ kernels: {_extension.why_not()}")

T, H, V = 512, 64, 50_000
MIB = 2**20
BOUND = 64 * MIB + 4 * T * H * 4  # stated in the op's README; all logits of one model in fp32 would be 98 MiB

PROGRAM = """
import ast, sys, torch
from benchmarks.measure_cpu import extra_bytes_of
from prefopt_kernels import linear_kl

size, dtype, wanted, through, backend = ast.literal_eval(sys.argv[1])
torch.set_num_threads(2)

def operands(T, H, V):
    make = lambda *shape: torch.randn(shape, dtype=getattr(torch, dtype))
    x = {"hidden": make(T, H), "weight": make(V, H).mul_(H**-0.5), "ref_hidden": make(T, H)}
    for name in wanted:
        x[name].requires_grad_()
    return x, torch.randint(0, V, (T,))

def step(x, targets):
    out = linear_kl(**x, targets=targets, keep_unit=through == "logp", backend=backend)
    getattr(out, through).sum().backward()

step(*operands(33, 40, 300))
call = operands(*size)
print(extra_bytes_of(lambda: step(*call)))
"""


def peak_bytes(dtype, wanted, through, backend="cpu") -> int:
    """Extra memory at the peak of a forward and a backward, what they return included."""
    command = [sys.executable, "-c", PROGRAM, repr(((T, H, V), dtype, wanted, through, backend))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("through", ["logp", "kl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_head(dtype, through):
    assert peak_bytes(dtype, ("hidden",), through) < BOUND


def test_trained_head():
    """The head's gradient is the caller's; beside it the bound is the same."""
    assert peak_bytes("bfloat16", ("hidden", "weight"), "kl") < BOUND + V * H * 2


def test_the_measure_can_fail():
    """The reference backend keeps a few tensors of 64 MiB and a copy of the head."""
    assert peak_bytes("bfloat16", ("hidden",), "kl", "reference") > BOUND
