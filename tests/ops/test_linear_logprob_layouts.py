"""Operands as callers have them: strided views, expanded rows, int32 targets, upstream gradients of any strides."""

from dataclasses import replace

import pytest
import torch

from prefopt_kernels import linear_logprob
from support.linear_logprob import DIFFERENTIABLE, DTYPES, OPERANDS, check, ours, problem

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def row_slice(x):
    return x.repeat_interleave(2, 0)[::2]


def row_offset(x):
    return torch.cat([torch.full_like(x[:1], torch.nan), x])[1:]


def column_slice(x):
    wide = torch.full((x.shape[0], x.shape[1] + 5), torch.nan, dtype=x.dtype)
    wide[:, 3:-2] = x
    return wide[:, 3:-2]


def transposed(x):
    return torch.empty(x.shape[::-1], dtype=x.dtype).copy_(x.T).T


def every_second_column(x):
    wide = torch.full((x.shape[0], 2 * x.shape[1]), torch.nan, dtype=x.dtype)
    wide[:, ::2] = x
    return wide[:, ::2]


VIEWS = [row_slice, row_offset, column_slice, transposed, every_second_column]


def through_views(made, backend, wanted, views):
    """The call on views of leaves: each view is cut inside, so that gradients flow through it."""

    def call(**arguments):
        viewed = {name: view(arguments[name]) for name, view in views.items()}
        for name, view in viewed.items():
            assert torch.equal(view.detach(), arguments[name].detach()), name
        return linear_logprob(**{**arguments, **viewed})

    return ours(made, wanted, backend, call=call)


@pytest.mark.parametrize("view", VIEWS)
@dtypes
def test_views(dtype, view, backend):
    made = problem("normal", 17, 66, 140, dtype=dtype, bias=True, through=DIFFERENTIABLE)
    for views in ({"hidden": view}, {"weight": view}, {"hidden": view, "weight": view}):
        check(made, through_views(made, backend, OPERANDS, views))
    made = problem("normal", 17, 66, 140, dtype=dtype, bias=True)
    check(made, through_views(made, backend, ("hidden",), {"hidden": view, "weight": view}))


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_narrow_matrices(view, size, backend):
    """torch calls a matrix of one column contiguous whatever its strides are."""
    problems = [problem("normal", 9, size, 33, bias=True, seed=seed) for seed in range(4)]
    for wanted in (("hidden",), OPERANDS):
        views = {"hidden": view, "weight": view}
        check(problems, [through_views(made, backend, wanted, views) for made in problems])


@dtypes
def test_views_of_the_bias_and_the_targets(dtype, backend):
    made = problem("normal", 17, 66, 140, dtype=dtype, bias=True, through=DIFFERENTIABLE)
    views = {
        "bias": lambda x: x.repeat_interleave(3)[::3],
        "targets": lambda x: torch.stack([x, x + 1], 1)[:, 0],
    }
    check(made, through_views(made, backend, OPERANDS, views))


@pytest.mark.parametrize("size", [66, 0])
@dtypes
def test_expanded_rows(dtype, size, backend):
    """One hidden state for all targets, one row for all token ids, one number for the bias."""
    made = problem("normal", 17, size, 140, dtype=dtype, bias=True, through=DIFFERENTIABLE)
    same = {
        "hidden": replace(made, hidden=made.hidden[:1].expand(17, -1)),
        "weight": replace(made, weight=made.weight[:1].expand(140, -1)),
        "bias": replace(made, bias=made.bias[:1].expand(140)),
    }
    for name, repeated in same.items():

        def expand(x):
            return x[:1].expand(x.shape)

        def call(name=name, **arguments):
            return linear_logprob(**{**arguments, name: expand(arguments[name])})

        results = ours(repeated, (), backend, call=call)
        if name != "weight":  # all logits equal: whether the target is at the top is rounding
            check(repeated, results)
        results = ours(repeated, OPERANDS, backend)
        results = replace(results, outputs=results.outputs._replace(is_top1=None))
        check(repeated, results)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_targets_of_both_dtypes(dtype, backend):
    made = problem("normal", 17, 66, 140, bias=True, through=DIFFERENTIABLE)
    check(made, ours(replace(made, targets=made.targets.to(dtype)), OPERANDS, backend))
    lowest = torch.where(made.targets < 0, torch.iinfo(dtype).min, made.targets)
    check(made, ours(replace(made, targets=lowest.to(dtype)), OPERANDS, backend))


@pytest.mark.parametrize("wanted", [("hidden",), OPERANDS], ids=str)
@pytest.mark.parametrize(
    "spread",
    [
        lambda by: by.flip(0).flip(0),
        lambda by: torch.stack([by, torch.full_like(by, torch.nan)], 1)[:, 0],
        lambda by: by[:1].expand(by.shape),  # as .sum() sends it
    ],
    ids=["contiguous", "strided", "expanded"],
)
@dtypes
def test_upstream_gradients_of_any_strides(dtype, spread, wanted, backend):
    made = problem("normal", 17, 66, 140, dtype=dtype, bias=True, through=DIFFERENTIABLE)
    made = replace(made, upstream={name: spread(by) for name, by in made.upstream.items()})
    leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in made.operands.items()}
    outputs = linear_logprob(**leaves, targets=made.targets, outputs=("entropy",), backend=backend)
    torch.autograd.backward(
        [getattr(outputs, name) for name in DIFFERENTIABLE],
        [made.upstream[name] for name in DIFFERENTIABLE],
    )
    results = ours(made, wanted, backend)
    check(made, replace(results, grads={name: leaves[name].grad for name in wanted}))
