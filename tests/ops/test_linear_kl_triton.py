"""The Triton kernels of linear_kl against the policy of numerics.py: on a GPU, or in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from prefopt_kernels.ops.linear_logprob.triton_kernels import config
from support.linear_kl import DIFFERENTIABLE, Results, assert_same, check, ours, pair
from support.linear_logprob import LORA_OPERANDS, OPERANDS, TRANSFORMS
from support.numerics import FAMILIES
from support.triton_backend import ON_GPU, TRITON_DTYPES, there

T, H, V = 33, 40, 330
A100 = config.Target((8, 0), 3, 166_912)
dtypes = pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)


@pytest.fixture(params=["descriptors", "pointers"])
def loads(request):
    """How tiles are read: by the hardware's descriptors (sm_90) or by addresses (sm_80)."""
    if ON_GPU:
        if request.param == "pointers":
            pytest.skip("a GPU reads as it can")
        yield
        return
    with config.pretending(config.INTERPRETER if request.param == "descriptors" else A100):
        yield


def results_of(made, wanted=(), **options) -> Results:
    """``ours`` by the triton backend where it runs, brought back to the CPU to be judged."""
    policy, ref = (
        replace(x, **{name: there(value) for name, value in vars(x).items()}) for x in (made.policy, made.ref)
    )
    moved = replace(made, policy=policy, ref=ref)
    found = ours(moved, wanted, "triton", **options)
    outputs = type(found.outputs)(*(None if value is None else value.cpu() for value in found.outputs))
    return Results(outputs, {name: grad.cpu() for name, grad in found.grads.items()})


@pytest.mark.parametrize("shared", [True, False], ids=["one_head", "two_heads"])
@pytest.mark.parametrize("family", FAMILIES)
@dtypes
def test_values_and_gradients(dtype, family, shared, loads):
    made = pair(family, T, H, V, dtype=dtype, bias=True, shared=shared, through=DIFFERENTIABLE)
    check(made, results_of(made, OPERANDS))


@pytest.mark.parametrize("through", ["logp", "kl"])
@dtypes
def test_a_frozen_head(dtype, through):
    made = pair("normal", T, H, V, dtype=dtype, ref="far", through=(through,))
    for wanted in ((), ("hidden",)):
        check(made, results_of(made, wanted))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_flag(transform):
    for ref_transform in ("plain", "all"):
        made = pair("normal", T, H, V, bias=True, transform=transform, ref_transform=ref_transform)
        check(made, results_of(made, OPERANDS))


@pytest.mark.parametrize("rank, ref_rank", [(5, 0), (0, 3), (17, 3)])
@dtypes
def test_adapters(dtype, rank, ref_rank):
    for shared in (True, False):
        made = pair("normal", T, H, V, dtype=dtype, bias=True, rank=rank, ref_rank=ref_rank, shared=shared)
        check(made, results_of(made, LORA_OPERANDS if rank else OPERANDS))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (15, 1, 3), (17, 65, 7), (113, 65, 255), (257, 40, 525)])
@dtypes
def test_shapes_that_no_tile_divides(dtype, shape):
    """Few rows are judged together with those of other seeds."""
    sizes = dict(zip(("T", "H", "V"), shape, strict=True))
    pairs = [
        pair(**sizes, dtype=dtype, bias=True, through=DIFFERENTIABLE, seed=seed) for seed in range(1 + 6 // shape[0])
    ]
    check(pairs, [results_of(made, OPERANDS) for made in pairs])


def test_a_reference_model_of_another_width(loads):
    made = pair("normal", T, H, V, bias=True, ref="far", shared=False, ref_H=40)
    check(made, results_of(made, OPERANDS))


@dtypes
def test_equal_models_have_a_kl_of_exactly_zero(dtype, loads):
    for shared in (True, False):
        made = pair("normal", T, H, V, dtype=dtype, bias=True, ref="same", shared=shared)
        results = results_of(made, OPERANDS)
        assert not results.outputs.kl.any()
        assert not any(grad.any() for grad in results.grads.values())


def test_no_rows_and_no_rows_that_count():
    for tokens, ignored in ((0, 0.0), (40, 2.0)):
        made = pair("normal", tokens, H, V, ignored=ignored, bias=True, through=DIFFERENTIABLE)
        results = results_of(made, OPERANDS)
        check(made, results)
        assert not any(value.any() for value in results.outputs)


def test_a_row_that_does_not_count_may_hold_nan():
    made = pair("normal", T, H, V, ignored=0.4, bias=True)
    poisoned = (
        replace(x, hidden=torch.where(made.counts[:, None], x.hidden, torch.nan)) for x in (made.policy, made.ref)
    )
    policy, ref = poisoned
    check(made, results_of(replace(made, policy=policy, ref=ref), OPERANDS))


def test_banned_tokens():
    """A ban of the policy takes a token out of the sum; one of the reference model alone makes it infinite."""
    made = pair("normal", T, H, V, bias=True, ignored=0)
    banned = torch.arange(V) % 3 == 0
    targets = torch.ones_like(made.policy.targets)
    bias = torch.where(banned, -torch.inf, made.policy.bias)
    policy, ref = (replace(x, targets=targets) for x in (made.policy, made.ref))
    both = replace(made, policy=replace(policy, bias=bias), ref=replace(ref, bias=bias))
    kept = (~banned).nonzero().squeeze(1)
    position = torch.cumsum(~banned, 0) - 1
    policy, ref = (
        replace(x, weight=x.weight[kept], bias=x.bias[kept], targets=position[targets]) for x in (policy, ref)
    )
    results = results_of(both, ("hidden",))
    check(replace(made, policy=policy, ref=ref), Results(results.outputs._replace(mean_logit=None), results.grads))


@pytest.mark.parametrize("wanted", [("hidden",), OPERANDS], ids=str)
def test_several_chunks_of_the_workspace(wanted, monkeypatch):
    monkeypatch.setattr(config, "WORKSPACE_BYTES", 300_000)
    made = pair("normal", 150, H, V, bias=True, through=DIFFERENTIABLE)
    check(made, results_of(made, wanted))


def test_repeats_bit_for_bit():
    made = pair("normal", 150, H, V, bias=True, through=DIFFERENTIABLE)
    assert_same(results_of(made, OPERANDS), results_of(made, OPERANDS))
