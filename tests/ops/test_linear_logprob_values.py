"""Values and gradients of linear_logprob against fp64, for every backend of this machine."""

from dataclasses import replace
from functools import lru_cache
from itertools import combinations

import pytest
import torch

from prefopt_kernels import linear_logprob
from prefopt_kernels.ops.linear_logprob.checks import OUTPUTS
from support.linear_logprob import (
    DIFFERENTIABLE,
    DTYPES,
    OPERANDS,
    TRANSFORMS,
    check,
    ours,
    problem,
)
from support.numerics import FAMILIES

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def subsets(names):
    """Every non-empty one."""
    return [chosen for n in range(1, len(names) + 1) for chosen in combinations(names, n)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("family", FAMILIES)
@dtypes
def test_trained_head(dtype, family, transform, backend):
    for through in (("logp",), DIFFERENTIABLE):
        made = problem(family, dtype=dtype, bias=True, through=through, transform=transform)
        check(made, ours(made, OPERANDS, backend))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("family", FAMILIES)
@dtypes
def test_frozen_head(dtype, family, transform, backend):
    """The gradient that the forward has made."""
    made = problem(family, dtype=dtype, bias=True, transform=transform)
    check(made, ours(made, ("hidden",), backend))


@pytest.mark.parametrize("through", subsets(DIFFERENTIABLE), ids="+".join)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@dtypes
def test_each_gradient_alone_and_together(dtype, bias, through, backend):
    made = problem("normal", 33, 34, 150, dtype=dtype, bias=bias, through=through, transform="all")
    for wanted in subsets(OPERANDS if bias else ("hidden", "weight")):
        check(made, ours(made, wanted, backend))


@pytest.mark.parametrize("outputs", [(), *subsets(OUTPUTS)], ids="+".join)
@pytest.mark.compiled_only("in bf16, which Triton's interpreter multiplies wrongly")
def test_each_output_alone_and_together(outputs, backend):
    """What is asked for comes, what is not is None, and neither changes the rest by a bit."""
    made = problem("normal", dtype=torch.bfloat16, bias=True)
    for wanted in ((), ("hidden",), OPERANDS):
        results = ours(made, wanted, backend, outputs)
        check(made, results)
        everything = ours(made, wanted, backend, OUTPUTS)
        for name, value in results.outputs._asdict().items():
            if name in (*outputs, "logp", "lse"):
                assert torch.equal(value, getattr(everything.outputs, name)), name
            else:
                assert value is None, name
        for name, grad in results.grads.items():
            assert torch.equal(grad, everything.grads[name]), name


SHAPES = {
    "T": [(T, 65, 300) for T in (1, 2, 15, 16, 17, 33, 47, 49, 64, 65, 100, 113)],
    "H": [(17, H, 300) for H in (1, 2, 3, 31, 64, 72, 130, 257)],
    "V": [(17, 65, V) for V in (1, 2, 7, 8, 127, 128, 129, 255, 257, 513, 1000, 3001)],
    "small": [(1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 3, 7), (2, 3, 1), (15, 1, 3), (3, 72, 2)],
    "odd": [(49, 130, 127), (33, 1, 129), (65, 3, 1000), (100, 131, 129), (47, 72, 3001)],
}


@pytest.mark.parametrize("T, H, V", [shape for kind in SHAPES.values() for shape in kind], ids=str)
@dtypes
@pytest.mark.compiled_only("test_linear_logprob_triton.py has the shapes around its tiles")
def test_shapes_that_no_tile_divides(dtype, T, H, V, backend):
    """Few rows are judged together with those of other seeds."""
    problems = [
        problem("normal", T, H, V, dtype=dtype, bias=True, through=DIFFERENTIABLE, seed=seed)
        for seed in range(1 + 16 // T)
    ]
    check(problems, [ours(made, OPERANDS, backend) for made in problems])
    problems = [problem("normal", T, H, V, dtype=dtype, seed=seed, transform="all") for seed in range(1 + 16 // T)]
    check(problems, [ours(made, ("hidden",), backend) for made in problems])


@pytest.mark.parametrize(
    "T, H, V",
    [
        (600, 96, 1500),  # more tokens than a panel of any kernel
        (1100, 16, 700),  # more than a group of tokens
        (37, 1030, 2100),  # as wide as a model, and more than a chunk of the backward
    ],
)
@dtypes
@pytest.mark.compiled_only("test_linear_logprob_triton.py has its own sizes, and several chunks of the workspace")
def test_larger_than_every_block(dtype, T, H, V, backend):
    made = problem("normal", T, H, V, dtype=dtype, bias=True, through=DIFFERENTIABLE)
    check(made, ours(made, OPERANDS, backend))
    made = problem("normal", T, H, V, dtype=dtype)
    check(made, ours(made, ("hidden",), backend))


@pytest.mark.parametrize("hidden_size, vocabulary", [(0, 300), (1, 2), (65, 1), (65, 300)])
@pytest.mark.parametrize("tokens", ["none", "none_counts"])
@dtypes
def test_nothing_to_do(dtype, tokens, vocabulary, hidden_size, backend):
    """T = 0, or every target negative: zeros of the right shapes, and gradients that are exactly 0."""
    T = 0 if tokens == "none" else 5
    for through in (("logp",), DIFFERENTIABLE):
        made = problem("normal", T, hidden_size, vocabulary, dtype=dtype, bias=True, through=through, ignored=2)
        for wanted in subsets(OPERANDS):
            results = ours(made, wanted, backend)
            check(made, results)
            assert not any(value.any() for value in results.outputs)
            assert not any(grad.any() for grad in results.grads.values())


def test_no_hidden_dimension(backend):
    """H = 0: the bias alone decides."""
    made = problem("normal", 17, 0, 300, bias=True, through=DIFFERENTIABLE)
    check(made, ours(made, ("bias",), backend))
    check(made, ours(made, OPERANDS, backend))


@pytest.mark.parametrize("ignored", [0.0, 0.5, 0.95])
@dtypes
def test_rows_that_do_not_count(dtype, ignored, backend):
    """Rows that do not count are 0 and change nothing for the others: the same bits as without them."""
    made = problem("normal", 50, 65, 300, dtype=dtype, bias=True, ignored=ignored)
    check(made, ours(made, OPERANDS, backend))
    counts = made.targets >= 0
    results = ours(made, ("hidden",), backend)
    check(made, results)
    only = replace(
        made,
        hidden=made.hidden[counts],
        targets=made.targets[counts],
        upstream={name: by[counts] for name, by in made.upstream.items()},
    )
    alone = ours(only, ("hidden",), backend)
    for name, value in results.outputs._asdict().items():
        assert torch.equal(value[counts], getattr(alone.outputs, name)), name
    assert torch.equal(results.grads["hidden"][counts], alone.grads["hidden"])


@lru_cache(maxsize=1)
def qwen_like():
    """Operands of the size of Qwen3-0.6B's head, half of the rows confident, and log-probabilities in fp64."""
    generator = torch.Generator().manual_seed(0)
    T, H, V = 32, 1024, 151_936
    weight = torch.randn(V, H, generator=generator).mul_(3 / H**0.5).bfloat16()
    hidden = torch.randn(T, H, generator=generator)
    targets = torch.randint(0, V, (T,), generator=generator)
    hidden[::2] = 2.5 * weight[targets[::2]].float()
    hidden = hidden.bfloat16()
    z = torch.cat([hidden.double() @ part.double().T for part in weight.split(10_000)], 1)
    return hidden, weight, targets, z[torch.arange(T), targets] - z.logsumexp(1)


@pytest.mark.slow
def test_the_error_at_the_size_of_a_model(backend):
    """1e-5 nat against fp64 of the same bf16 operands: what the op promises for V of 151,936."""
    hidden, weight, targets, exact = qwen_like()
    assert (exact > -0.01).sum() >= 10 and (exact < -5).sum() >= 10
    out = linear_logprob(hidden, weight, targets, backend=backend)
    assert (out.logp.double() - exact).abs().max() <= 1e-5
