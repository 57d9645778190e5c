"""Peak extra memory, measured in a process of its own.

The measure is Linux's: the high-water mark of the resident set (VmHWM), set back to the resident set of the moment by
writing 5 to /proc/self/clear_refs once the operands are there and a small call has loaded the library and started the
threads. It counts whoever allocated, C++, torch or the libraries below; pages that nobody touched cost nothing.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt_kernels.ops import _extension
from support.linear_logprob import backends

T, H, V = 512, 64, 50_000
MIB = 2**20
BOUND = 64 * MIB + 3 * T * H * 4  # stated in the op's README; all logits in fp32 would be 98 MiB
SETS = [name.removeprefix("cpu/") for name in backends() if name != "reference"]

pytestmark = pytest.mark.skipif(not SETS, reason=f"no C++ kernels: {_extension.why_not()}")

PROGRAM = """
import ast, sys, torch
from prefopt_kernels import linear_logprob
from prefopt_kernels.ops.linear_logprob import cpu as backend_cpu

size, dtype, instruction_set, wanted, outputs, backend = ast.literal_eval(sys.argv[1])
torch.set_num_threads(2)
backend_cpu.instruction_set = lambda: instruction_set

def status(field):
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def operands(T, H, V):
    hidden = torch.randn(T, H, dtype=getattr(torch, dtype))
    weight = torch.randn(V, H, dtype=getattr(torch, dtype)).mul_(H**-0.5)
    x = {"hidden": hidden, "weight": weight}
    for name in wanted:
        x[name].requires_grad_()
    return x, torch.randint(0, V, (T,)), torch.randn(T)

def step(x, targets, upstream):
    out = linear_logprob(**x, targets=targets, outputs=outputs, backend=backend)
    sum((getattr(out, name) * upstream).sum() for name in ("logp", *outputs)).backward()
    return out

step(*operands(33, 40, 300))
call = operands(*size)
with open("/proc/self/clear_refs", "w", encoding="utf-8") as refs:
    refs.write("5")
before = status("VmRSS")
out = step(*call)
print(status("VmHWM") - before)
assert out.logp.isfinite().all() and all(call[0][name].grad.any() for name in wanted)
"""


def peak_bytes(dtype, *, isa=None, wanted=("hidden",), outputs=(), backend="cpu") -> int:
    """Extra memory at the peak of a forward and a backward, what they return included."""
    arguments = repr(((T, H, V), dtype, isa or SETS[0], wanted, outputs, backend))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    "isa, dtype",
    [
        *((isa, "bfloat16") for isa in SETS),
        *((isa, "float32") for isa in SETS[:1]),
        (None, "float16"),
    ],
)
def test_frozen_head(isa, dtype):
    assert peak_bytes(dtype, isa=isa) < BOUND


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_trained_head(dtype, size):
    """The head's gradient is the caller's; beside it the bound is the same."""
    assert peak_bytes(dtype, wanted=("hidden", "weight")) < BOUND + V * H * size


def test_through_the_entropy():
    assert peak_bytes("bfloat16", outputs=("entropy",)) < BOUND


def test_the_measure_can_fail():
    """The reference keeps a few tensors of 64 MiB and a copy of the head: seen, and no more than that."""
    assert BOUND < peak_bytes("bfloat16", backend="reference") < 6 * 64 * MIB + V * H * 4
