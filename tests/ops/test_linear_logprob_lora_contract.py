"""A low-rank adapter on the head: custom ops and compiler, refusals, memory, and the bugs that its tests must find."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from prefopt_kernels import linear_logprob
from prefopt_kernels.ops.linear_logprob import op
from support.linear_logprob import (
    LORA_OPERANDS,
    adapted,
    arguments_of,
    assert_same,
    backends,
    baseline,
    check,
    formula,
    ours,
    through_logp,
    want_of,
)
from support.numerics import assert_as_good_as_torch

T, R = 17, 5  # of `adapted`
adapters = pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "fp32"])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


one_of_each = pytest.mark.parametrize("name", list(dict.fromkeys(name.split("/")[0] for name in backends())))


@one_of_each
@adapters
def test_opcheck(adapter, name):
    """The low-rank operand of both custom ops, with and without gradients."""
    made = adapted(T=9, H=6, V=40, R=3, dtype=torch.bfloat16, adapter=adapter)
    low_hidden = made.lora_scale * (made.hidden.float() @ made.A.float().T)
    numbers = [1.2, 7.5, 0.6, 0.0, 0.0]
    for trained in (False, True):
        operands = (made.hidden, made.weight, made.targets, made.bias, low_hidden, made.B)
        leaf = [x.clone().requires_grad_(trained and x.is_floating_point()) for x in operands]
        want = want_of(entropy=True, mean_logit=True, is_top1=True)
        torch.library.opcheck(op._linear_logprob, (*leaf, numbers, want, name))
    # nothing of the head is trained, and low_hidden comes without a graph: a unit gradient may be asked for
    leaf = [made.hidden.clone().requires_grad_(), *operands[1:]]
    torch.library.opcheck(op._linear_logprob, (*leaf, numbers, want_of(unit=True), name))
    outputs = ours(made, (), name).outputs
    for need in ("low_hidden low_weight", " ".join(op.DIFFERENTIABLE)):
        arguments = (made.upstream["logp"], None, made.upstream["entropy"], *operands)
        saved = (outputs.lse, outputs.entropy, None, None)
        torch.library.opcheck(op._linear_logprob_backward, (*arguments, *saved, numbers, need, name))


@one_of_each
@pytest.mark.parametrize("wanted", [("A", "B"), LORA_OPERANDS], ids="+".join)
def test_compiled_is_eager(wanted, name, fresh_compiler):
    """One graph, forward and backward; every bit of eager's numbers."""
    made = adapted(dtype=torch.bfloat16, adapter=torch.float32, through=("logp",))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(through_logp, fullgraph=True, backend=counter)
    assert_same(ours(made, wanted, name, call=compiled), ours(made, wanted, name))
    assert counter.frame_count == 1


def test_a_given_low_hidden_has_a_unit_gradient(backend):
    """What the custom op takes is independent of hidden: d logp / d hidden is then through the head alone."""
    made = adapted(dtype=torch.bfloat16, through=("logp",))
    low_hidden = made.lora_scale * (made.hidden.float() @ made.A.float().T)
    operands = (made.hidden, made.weight, made.targets, made.bias, low_hidden, made.B)
    *_, unit, _ = op._linear_logprob(*operands, [1.0, 0.0, 1.0, 0.0, 0.0], want_of(unit=True), backend)
    results = {}
    for dtype in (torch.float32, torch.float64):
        x = {name: x.to(dtype) for name, x in made.operands.items()}
        z = x["hidden"] @ x["weight"].T + low_hidden.to(dtype) @ x["B"].T + x["bias"]
        dz = -z.softmax(1)
        dz[torch.arange(T), made.targets.clamp(min=0)] += 1
        results[dtype] = torch.where(made.targets[:, None] >= 0, dz @ x["weight"], 0)
    plain = results[torch.float32].bfloat16()
    assert_as_good_as_torch("unit", unit, plain, results[torch.float64])


BAD = {
    "a list of two": ((torch.zeros(2, 4), torch.zeros(7, 2)), TypeError, "lora is a tuple of 2"),
    "a tensor": (torch.zeros(3), TypeError, "lora is a Tensor; expected"),
    "no scale": ((torch.zeros(2, 4), torch.zeros(7, 2), None), TypeError, r"lora\[2\], the scale"),
    "scale of text": ((torch.zeros(2, 4), torch.zeros(7, 2), "1"), TypeError, "is a str"),
    "scale infinite": (
        (torch.zeros(2, 4), torch.zeros(7, 2), float("inf")),
        ValueError,
        "is inf; expected a finite number",
    ),
    "A of numbers": ((1.0, torch.zeros(7, 2), 1.0), TypeError, "lora's A is a float; expected"),
    "A of one dimension": (
        (torch.zeros(4), torch.zeros(7, 2), 1.0),
        ValueError,
        r"lora's A has shape \(4,\); expected \(R, H\)",
    ),
    "B sparse": (
        (torch.zeros(2, 4), torch.zeros(7, 2).to_sparse(), 1.0),
        TypeError,
        "lora's B has layout torch.sparse_coo",
    ),
    "A of another dtype": (
        (torch.zeros(2, 4).half(), torch.zeros(7, 2), 1.0),
        TypeError,
        "lora's A has dtype torch.float16; expected that of hidden, torch.bfloat16, or torch.float32",
    ),
    "B elsewhere": (
        (torch.zeros(2, 4), torch.zeros(7, 2, device="meta"), 1.0),
        ValueError,
        "lora's B is on meta; expected cpu, where hidden is",
    ),
    "A of another width": (
        (torch.zeros(2, 5), torch.zeros(7, 2), 1.0),
        ValueError,
        r"lora's A has shape \(2, 5\); expected \(2, 4\) with a rank of 1 or more",
    ),
    "B transposed": (
        (torch.zeros(2, 4), torch.zeros(2, 7), 1.0),
        ValueError,
        r"lora's B has shape \(2, 7\); expected \(7, 2\) with a rank",
    ),
    "rank 0": (
        (torch.zeros(0, 4), torch.zeros(7, 0), 1.0),
        ValueError,
        r"lora's A has shape \(0, 4\); expected \(0, 4\) with a rank of 1 or more",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case):
    lora, error, message = BAD[case]
    hidden, weight = torch.zeros(3, 4).bfloat16(), torch.zeros(7, 4).bfloat16()
    with pytest.raises(error, match=message) as caught:
        linear_logprob(hidden, weight, torch.tensor([0, -1, 2]), lora=lora)
    assert "\n" not in str(caught.value), "one sentence"


def fp32(made):
    return {name: x.to(torch.float32, copy=True) for name, x in made.operands.items()}


def logp_of(made, **changed):
    """The right result, but for logp, which is the formula's of other operands."""
    outputs, _ = formula(**{**fp32(made), **changed}, **arguments_of(made))
    right = baseline(made)
    return replace(right, outputs=right.outputs._replace(logp=outputs.logp))


def scale_forgotten(made):
    return logp_of(made, B=made.B.float() / made.lora_scale)


def last_rank_lost(made):
    return logp_of(made, A=made.A[:-1].float(), B=made.B[:, :-1].float())


def last_row_lost(made):
    return logp_of(made, B=torch.cat([made.B[:-1].float(), torch.zeros(1, R)]))


def low_hidden_rounded_to_bf16(made):
    low = made.lora_scale * (made.hidden.float() @ made.A.float().T)
    z = made.hidden.float() @ made.weight.float().T + low.bfloat16().float() @ made.B.float().T
    z = z + made.bias.float()
    logp = z[torch.arange(T), made.targets.clamp(min=0)] - z.logsumexp(1)
    right = baseline(made)
    logp = torch.where(made.targets >= 0, logp, 0)
    return replace(right, outputs=right.outputs._replace(logp=logp))


def with_grads(made, **changed):
    right = baseline(made)
    return replace(right, grads={**right.grads, **changed})


def a_without_the_scale(made):
    return with_grads(made, A=(baseline(made).grads["A"].float() / made.lora_scale).to(made.A.dtype))


def b_tile_lost(made):
    grad = baseline(made).grads["B"].clone()
    grad[128:256] = 0
    return with_grads(made, B=grad)


def hidden_without_the_adapter(made):
    """The gradient through W alone."""
    x = fp32(made)
    hidden = x["hidden"].requires_grad_()
    low = made.lora_scale * (hidden.detach() @ x["A"].T)
    z = hidden @ x["weight"].T + low @ x["B"].T + x["bias"]
    logp = z[torch.arange(T), made.targets.clamp(min=0)] - z.logsumexp(1)
    (torch.where(made.targets >= 0, logp, 0) * made.upstream["logp"]).sum().backward()
    return with_grads(made, hidden=hidden.grad.to(made.hidden.dtype))


BUGS = [
    scale_forgotten,
    last_rank_lost,
    last_row_lost,
    low_hidden_rounded_to_bf16,
    a_without_the_scale,
    b_tile_lost,
    hidden_without_the_adapter,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, dtype):
    made = adapted(dtype=dtype, adapter=torch.float32, through=("logp",))
    check(made, baseline(made))
    with pytest.raises(AssertionError):
        check(made, bug(made))


PROGRAM = """
import sys, torch
from prefopt_kernels import linear_logprob

T, H, V, R = map(int, sys.argv[1].split(","))
torch.set_num_threads(2)

def status(field):
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def operands(T, H, V, R):
    hidden, weight = torch.randn(T, H).bfloat16(), torch.randn(V, H).mul_(H**-0.5).bfloat16()
    A, B = torch.randn(R, H).mul_(H**-0.5), torch.randn(V, R).mul_(0.1)
    return [x.requires_grad_() for x in (hidden, A, B)], weight, torch.randint(0, V, (T,))

def step(leaves, weight, targets):
    hidden, A, B = leaves
    out = linear_logprob(hidden, weight, targets, lora=(A, B, 2.0), backend=sys.argv[2])
    out.logp.sum().backward()

step(*operands(33, 40, 300, 3))
call = operands(T, H, V, R)
with open("/proc/self/clear_refs", "w", encoding="utf-8") as refs:
    refs.write("5")
before = status("VmRSS")
step(*call)
print(status("VmHWM") - before)
assert all(leaf.grad.any() for leaf in call[0])
"""


def peak_bytes(backend) -> tuple[int, int]:
    """Extra memory at the peak of a forward and a backward, and what it may be."""
    T, H, V, R = 512, 256, 50_000, 16
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{T},{H},{V},{R}", backend],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # as without an adapter, beside B's gradient; the logits would be 98 MiB, the head in fp32 49
    return int(done.stdout), 64 * 2**20 + 3 * T * H * 4 + V * R * 4


@pytest.mark.skipif(backends() == ["reference"], reason="the C++ kernels are not built")
def test_memory():
    peak, bound = peak_bytes("cpu")
    assert peak < bound
    peak, bound = peak_bytes("reference")
    assert peak > bound, "the measure can fail"
