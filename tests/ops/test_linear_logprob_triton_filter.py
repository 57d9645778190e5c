"""grad_filter and head_grad_filter: the error stays under the documented bound; off unless asked for."""

import pytest
import torch

from prefopt_kernels.ops.linear_logprob.operands import FILTER_TILE
from prefopt_kernels.ops.linear_logprob.triton_kernels import backend as backend_triton
from prefopt_kernels.ops.linear_logprob.triton_kernels import config as backend_triton_choices
from support.linear_logprob import exact, problem
from support.numerics import assert_as_good_as_torch
from support.triton_backend import there, triton_results

T, H, V = 150, 64, 1000
EPS = 2.0**-12


def flat():
    """Rows whose probabilities are all about 1 / V, below EPS times anything: the filter's worst case."""
    made = problem("normal", T, H, V, ignored=0.1)
    return type(made)(0.02 * made.hidden, made.weight, made.targets, None, made.transform, made.upstream)


def peaked():
    return problem("peak", T, H, V, ignored=0.1)


def hidden_bound(made, eps):
    """|g_t| q_t max |W_v|, q_t the probability of a row's tokens below eps: the bound in the op's docstring."""
    p = (made.hidden.double() @ made.weight.double().T).softmax(1)
    lost = torch.where(p < eps, p, 0).sum(1)
    assert (lost <= min(1.0, eps * V) + 1e-12).all()
    return made.upstream["logp"].abs().double() * lost * made.weight.double().norm(dim=1).max()


def rounding_of(made, name):
    """What two exact gradients may differ by, a row: the rounding of the terms in each."""
    return 4 * torch.finfo(torch.float32).eps * exact(made).terms[name].norm(dim=1)


@pytest.mark.parametrize("wanted", [("hidden",), ("hidden", "weight")], ids=str)
@pytest.mark.parametrize("make", [flat, peaked])
@pytest.mark.parametrize("eps", [EPS, 0.01])
def test_the_hidden_gradient_keeps_the_bound(eps, make, wanted):
    made = make()
    exactly = triton_results(made, wanted)
    filtered = triton_results(made, wanted, grad_filter=eps)
    error = (filtered.grads["hidden"] - exactly.grads["hidden"]).double().norm(dim=1)
    rounding = rounding_of(made, "hidden")
    assert (error <= hidden_bound(made, eps) + rounding).all()
    assert torch.equal(filtered.outputs.logp, exactly.outputs.logp)
    if "weight" in wanted:  # never filtered unless asked by name
        assert torch.equal(filtered.grads["weight"], exactly.grads["weight"])


def test_tiles_are_left_out_and_nothing_else():
    """The gradient with the filter is that of the tiles it keeps: computed in fp64 from the same rule."""
    made, eps = peaked(), 1e-3
    filtered = triton_results(made, ("hidden",), grad_filter=eps).grads["hidden"].double()
    counts = made.targets >= 0
    order = torch.sort(~counts, stable=True).indices
    p = (made.hidden.double() @ made.weight.double().T).softmax(1)
    onehot = torch.zeros_like(p)
    onehot[counts, made.targets[counts]] = 1
    kept = torch.zeros_like(p)
    live = 0
    for rows in order[: counts.sum()].split(128):
        for first in range(0, V, FILTER_TILE):
            tile = slice(first, first + FILTER_TILE)
            if p[rows, tile].max() >= eps or onehot[rows, tile].any():
                kept[rows, tile], live = 1, live + 1
    dz = (onehot - kept * p) * made.upstream["logp"].double()[:, None] * counts[:, None]
    expected = dz @ made.weight.double()
    terms = exact(made).terms["hidden"]
    assert_as_good_as_torch("dhidden", filtered.float(), expected.float(), expected, terms=terms)
    tiles = 2 * -(-V // FILTER_TILE)
    rate = backend_triton.keep_rate(*(there(x) for x in (made.hidden, made.weight, made.targets)), grad_filter=eps)
    assert rate == pytest.approx(live / tiles)
    assert live < tiles  # else the test would show nothing


@pytest.mark.parametrize("make", [flat, peaked])
@pytest.mark.parametrize("filters", [(0.0, EPS), (EPS, EPS), (1e-3, EPS), (EPS, 1e-3)], ids=str)
def test_the_head_gradient_keeps_the_bound(filters, make):
    made = make()
    eps_hidden, eps_head = filters
    exactly = triton_results(made, ("hidden", "weight"))
    filtered = triton_results(made, ("hidden", "weight"), grad_filter=eps_hidden, head_grad_filter=eps_head)
    upstream = made.upstream["logp"].abs().double() * (made.targets >= 0)
    bound = eps_head * (upstream[:, None] * made.hidden.double().norm(dim=1, keepdim=True)).sum()
    error = (filtered.grads["weight"] - exactly.grads["weight"]).double().norm(dim=1)
    rounding = rounding_of(made, "weight")
    assert (error <= bound + rounding).all()
    error = (filtered.grads["hidden"] - exactly.grads["hidden"]).double().norm(dim=1)
    rounding = rounding_of(made, "hidden")
    assert (error <= hidden_bound(made, eps_hidden) + rounding).all()


def test_a_filter_that_keeps_everything_changes_no_bit():
    made = flat()
    for wanted in (("hidden",), ("hidden", "weight")):
        exactly = triton_results(made, wanted)
        filtered = triton_results(made, wanted, grad_filter=1e-30, head_grad_filter=1e-30)
        for name in wanted:
            assert torch.equal(filtered.grads[name], exactly.grads[name]), name


def test_a_filter_over_several_chunks_is_that_over_one(monkeypatch):
    made = peaked()
    once = triton_results(made, ("hidden",), grad_filter=1e-3).grads["hidden"]
    monkeypatch.setattr(backend_triton_choices, "WORKSPACE_BYTES", 1)  # 128 rows a chunk
    chunked = triton_results(made, ("hidden",), grad_filter=1e-3).grads["hidden"]
    assert_as_good_as_torch("dhidden", chunked, once, once.double(), terms=exact(made).terms["hidden"])


def test_the_entropy_gradient_is_never_filtered():
    made = problem("peak", T, H, V, through=("logp", "entropy"))
    exactly = triton_results(made, ("hidden", "weight"))
    filtered = triton_results(made, ("hidden", "weight"), grad_filter=0.5, head_grad_filter=0.5)
    for name in ("hidden", "weight"):
        assert torch.equal(filtered.grads[name], exactly.grads[name]), name


def test_the_filters_are_checked():
    made = flat()
    with pytest.raises(ValueError, match="grad_filter is 1.5; expected a number in \\[0, 1\\)"):
        triton_results(made, grad_filter=1.5)
    with pytest.raises(TypeError, match="head_grad_filter is a str"):
        triton_results(made, head_grad_filter="a")
