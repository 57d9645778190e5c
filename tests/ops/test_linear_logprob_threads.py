"""Threads share the vocabulary or the tokens: right for any number of them, and the same bits for a fixed one."""

from dataclasses import replace

import pytest
import torch

from support.linear_logprob import DIFFERENTIABLE, OPERANDS, backends, check, ours, problem

# torch divides the work of the reference
pytestmark = pytest.mark.parametrize("backend", backends()[1:] or ["reference"], indirect=True)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "T, H, V",
    [
        (3, 64, 1000),  # the vocabulary is split
        (17, 65, 385),  # into parts of unequal size
        (17, 65, 130),  # too small a vocabulary: the tokens are divided
        (2, 3, 5),  # more threads than anything to do
        (150, 40, 1100),
        (1100, 16, 700),  # the tokens in groups as well
    ],
)
@dtypes
def test_any_number_of_threads(dtype, T, H, V, count, backend, threads):
    options = {"dtype": dtype, "bias": True, "transform": "all"}
    seeds = range(1 + 16 // T)
    for wanted, through in ((("hidden",), ("logp",)), (OPERANDS, DIFFERENTIABLE)):
        problems = [problem("normal", T, H, V, through=through, seed=s, **options) for s in seeds]
        threads(count)
        results = [ours(made, wanted, backend) for made in problems]
        threads(1)  # the truth needs no more, and waits for nobody on a busy machine
        check(problems, results)


@pytest.mark.slow
def test_sums_of_the_unit_gradient_too_large_to_split(backend, threads):
    """Above 32 MiB of them a split of the vocabulary would cost too much memory: the tokens are divided."""
    made = problem("normal", 2060, 4096, 270, dtype=torch.bfloat16)
    threads(2)
    check(made, ours(made, ("hidden",), backend))


@pytest.mark.parametrize("count", [2, 3])
def test_a_split_far_below_the_other(count, backend, threads):
    """Parts of the vocabulary whose maxima are far apart: the lower one adds exactly 0, not NaN."""
    made = problem("extreme", 33, 65, 1000, bias=True, through=DIFFERENTIABLE)
    weight = torch.cat([made.weight[:500], made.weight[500:] * 1e-4])
    made = replace(made, weight=weight)
    threads(count)
    results = ours(made, OPERANDS, backend)
    threads(1)
    check(made, results)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("wanted", [("hidden",), OPERANDS], ids="+".join)
@pytest.mark.parametrize("T", [3, 150])
@dtypes
def test_the_same_bits_every_time(dtype, T, wanted, count, backend, threads):
    threads(count)
    through = ("logp",) if wanted == ("hidden",) else DIFFERENTIABLE
    made = problem("normal", T, 65, 1100, dtype=dtype, bias=True, through=through, transform="all")
    first = ours(made, wanted, backend)
    for _ in range(4):
        again = ours(made, wanted, backend)
        for name, value in first.outputs._asdict().items():
            assert torch.equal(value, getattr(again.outputs, name)), name
        for name, grad in first.grads.items():
            assert torch.equal(grad, again.grads[name]), name
