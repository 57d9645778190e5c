"""Values and gradients of linear_kl against fp64, for every backend of this machine."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from prefopt_kernels import linear_kl, linear_logprob
from support.linear_kl import DIFFERENTIABLE, assert_same, check, exact, ours, pair
from support.linear_logprob import DTYPES, LORA_OPERANDS, OPERANDS, TRANSFORMS
from support.numerics import FAMILIES

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
heads = pytest.mark.parametrize("shared", [True, False], ids=["one_head", "two_heads"])


def subsets(names):
    """Every non-empty one."""
    return [chosen for n in range(1, len(names) + 1) for chosen in combinations(names, n)]


@pytest.mark.parametrize("ref", ["near", "far"])
@pytest.mark.parametrize("family", FAMILIES)
@heads
@dtypes
def test_families(dtype, shared, family, ref, backend):
    for through in (("kl",), DIFFERENTIABLE):
        made = pair(family, dtype=dtype, bias=True, ref=ref, shared=shared, through=through)
        check(made, ours(made, OPERANDS, backend))
    check(made, ours(made, ("hidden",), backend))


@pytest.mark.parametrize("ref_transform", TRANSFORMS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_pair_of_transforms(transform, ref_transform, backend):
    for dtype, through in ((torch.float32, ("kl",)), (torch.bfloat16, DIFFERENTIABLE)):
        made = pair(dtype=dtype, bias=True, through=through, transform=transform, ref_transform=ref_transform)
        check(made, ours(made, OPERANDS, backend))


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("family", FAMILIES)
@dtypes
def test_the_unit_gradient_of_a_frozen_head(dtype, family, transform, backend):
    """Through logp alone, with and without the unit gradient that the forward stores."""
    made = pair(family, dtype=dtype, bias=True, transform=transform, through=("logp",))
    for keep in (True, False):
        check(made, ours(made, ("hidden",), backend, keep_unit=keep))


@pytest.mark.parametrize("rank, ref_rank", [(5, 0), (0, 5), (5, 3), (17, 64)])
@heads
@dtypes
def test_adapters(dtype, shared, rank, ref_rank, backend):
    for through in (("kl",), DIFFERENTIABLE):
        made = pair(dtype=dtype, bias=True, shared=shared, rank=rank, ref_rank=ref_rank, through=through)
        check(made, ours(made, LORA_OPERANDS if rank else OPERANDS, backend))


@pytest.mark.parametrize("through", subsets(DIFFERENTIABLE), ids="+".join)
def test_each_gradient_alone_and_together(through, backend):
    for bias in (True, False):
        made = pair(T=33, H=34, V=150, dtype=torch.bfloat16, bias=bias, through=through, transform="all")
        for wanted in subsets(OPERANDS if bias else OPERANDS[:2]):
            check(made, ours(made, wanted, backend))


@pytest.mark.parametrize("ref_H", [1, 30, 129])
@dtypes
def test_a_reference_model_of_another_width(dtype, ref_H, backend):
    made = pair(dtype=dtype, bias=True, ref="far", shared=False, ref_H=ref_H, ref_rank=3)
    check(made, ours(made, OPERANDS, backend))


SHAPES = [(T, 65, 300) for T in (1, 2, 16, 47, 49, 64, 113)]
SHAPES += [(17, H, 300) for H in (1, 3, 64, 257)] + [(17, 65, V) for V in (1, 2, 127, 128, 129, 257, 3001)]
SHAPES += [(1, 1, 1), (2, 3, 1), (65, 3, 1000), (600, 40, 1500), (1100, 16, 700), (37, 1030, 2100)]


@pytest.mark.parametrize("T, H, V", SHAPES, ids=str)
@dtypes
def test_shapes_that_no_tile_divides(dtype, T, H, V, backend):
    """Few rows are judged together with those of other seeds."""
    pairs = [
        pair(T=T, H=H, V=V, dtype=dtype, bias=True, through=DIFFERENTIABLE, shared=T % 2 == 0, seed=seed)
        for seed in range(1 + 16 // T)
    ]
    check(pairs, [ours(made, OPERANDS, backend) for made in pairs])


@heads
@dtypes
def test_equal_models_have_a_kl_of_exactly_zero(dtype, shared, backend):
    """Value and gradient, to the last bit; one token more in the softmax's sum would show."""
    for transform in TRANSFORMS:
        made = pair(T=50, V=700, dtype=dtype, bias=True, ref="same", shared=shared, transform=transform)
        results = ours(made, OPERANDS, backend)
        assert not results.outputs.kl.any()
        assert torch.equal(results.outputs.logp, results.outputs.ref_logp)
        assert not any(grad.any() for grad in results.grads.values())


@dtypes
def test_the_kl_is_not_negative(dtype, backend):
    for family in FAMILIES:
        for seed in range(4):
            made = pair(family, T=64, dtype=dtype, bias=True, seed=seed)
            kl = ours(made, (), backend, ()).outputs.kl
            rounding = 2 * torch.finfo(torch.float32).eps * exact(made).terms["kl"]
            assert (kl >= -rounding).all()


@dtypes
def test_the_other_outputs_are_those_of_linear_logprob(dtype, backend):
    """Bit for bit, of both models, and the unit gradient too."""
    made = pair(T=50, dtype=dtype, bias=True, shared=False, transform="all", through=("logp",), rank=3)
    for wanted in ((), ("hidden", "bias")):
        results = ours(made, wanted, backend)
        for problem, names in ((made.policy, ("logp", "lse")), (made.ref, ("ref_logp", "ref_lse"))):
            lora = None if problem.A is None else (problem.A, problem.B, problem.lora_scale)
            operands = (problem.hidden, problem.weight, problem.targets, problem.bias)
            out = linear_logprob(*operands, lora=lora, backend=backend, **problem.transform)
            for name, value in zip(names, (out.logp, out.lse), strict=True):
                assert torch.equal(getattr(results.outputs, name), value), name


@pytest.mark.parametrize("tokens", ["none", "none_counts"])
@dtypes
def test_nothing_to_do(dtype, tokens, backend):
    """T = 0, or every target negative: zeros of the right shapes, and gradients that are exactly 0."""
    T = 0 if tokens == "none" else 5
    for size, vocabulary in ((0, 1), (65, 300)):
        made = pair(T=T, H=size, V=vocabulary, dtype=dtype, bias=True, through=DIFFERENTIABLE, ignored=2)
        for wanted in (("hidden",), OPERANDS):
            results = ours(made, wanted, backend)
            check(made, results)
            assert not any(value.any() for value in results.outputs)
            assert not any(grad.any() for grad in results.grads.values())


def test_no_hidden_dimension(backend):
    """H = 0: the biases alone decide."""
    made = pair(H=0, bias=True, shared=False, through=DIFFERENTIABLE)
    check(made, ours(made, OPERANDS, backend))


@dtypes
def test_rows_that_do_not_count(dtype, backend):
    """They are 0, are not read, and change no bit of the others."""
    made = pair(T=50, dtype=dtype, bias=True, ignored=0.5, through=("logp", "kl"))
    poisoned = (torch.where(made.counts[:, None], x.hidden, torch.nan) for x in (made.policy, made.ref))
    policy, ref = (replace(x, hidden=h) for x, h in zip((made.policy, made.ref), poisoned, strict=True))
    results = ours(made, OPERANDS, backend)
    check(made, results)
    assert_same(ours(replace(made, policy=policy, ref=ref), OPERANDS, backend), results)


@pytest.mark.parametrize("outputs", [(), ("entropy",), ("mean_logit", "is_top1")], ids=str)
def test_outputs_that_are_asked_for(outputs, backend):
    made = pair(dtype=torch.bfloat16, bias=True, through=("logp", "kl"))
    everything = ours(made, OPERANDS, backend)
    results = ours(made, OPERANDS, backend, outputs)
    for name in ("entropy", "mean_logit", "is_top1"):
        assert (getattr(results.outputs, name) is None) == (name not in outputs)
    assert_same(everything, results)


def test_the_kl_follows_from_the_unit_gradient(backend):
    """With one frozen head and no softcap E[z - z'] = (h - h')(W[y] - D), with D = d logp / d h: the same number."""
    made = pair(T=40, H=48, V=2000, ignored=0, through=("logp",))
    hidden, ref_hidden, weight = made.policy.hidden.clone().requires_grad_(), made.ref.hidden, made.policy.weight
    out = linear_kl(hidden, weight, made.policy.targets, ref_hidden, backend=backend)
    (unit,) = torch.autograd.grad(out.logp.sum(), hidden)
    mean = ((hidden - ref_hidden).double() * (weight[made.policy.targets].double() - unit.double())).sum(1)
    again = mean - out.lse.double() + out.ref_lse.double()
    # both sums are of 48 products of size 1 and of two log-sum-exps of size 13
    torch.testing.assert_close(out.kl.double(), again, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_truth_agrees_with_the_formula():
    """d kl / d z = p (log p - log q - kl), against autograd's in fp64."""
    z, ref_z = (torch.randn(5, 9, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    log_p, log_q = z.log_softmax(1), ref_z.log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1)
    (grad,) = torch.autograd.grad(kl.sum(), z)
    torch.testing.assert_close(grad, log_p.exp() * (log_p - log_q - kl[:, None]))
