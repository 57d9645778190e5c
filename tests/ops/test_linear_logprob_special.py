"""Numbers at the edges: NaN, infinities, banned tokens, subnormal and largest values, logits that only padding sees."""

import math
from dataclasses import replace

import pytest
import torch

from prefopt_kernels import linear_logprob
from prefopt_kernels.ops.linear_logprob.checks import OUTPUTS
from support.linear_logprob import (
    DIFFERENTIABLE,
    DTYPES,
    OPERANDS,
    Results,
    baseline,
    check,
    exact,
    ours,
    problem,
)
from support.numerics import assert_as_good_as_torch
from support.triton_backend import ON_GPU

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@dtypes
def test_a_bad_row_stays_in_its_row(dtype, bad, backend):
    """Bit for bit the results of the other rows."""
    made = problem("normal", 50, 65, 300, dtype=dtype, bias=True, ignored=0)
    hidden = made.hidden.clone()
    hidden[19, 40] = bad
    others = torch.arange(50) != 19
    for through in (("logp",), DIFFERENTIABLE):
        made = problem("normal", 50, 65, 300, dtype=dtype, bias=True, ignored=0, through=through)
        right = ours(made, ("hidden",), backend)
        results = ours(replace(made, hidden=hidden), ("hidden",), backend)
        for name, value in results.outputs._asdict().items():
            assert torch.equal(value[others], getattr(right.outputs, name)[others]), name
        grads = results.grads["hidden"], right.grads["hidden"]
        assert torch.equal(grads[0][others], grads[1][others])
        assert results.outputs.logp[19].isnan() and results.outputs.entropy[19].isnan()
        assert results.grads["hidden"][19].isnan().any()
    # the gradients of a head see every row, as a matrix product does
    for grad in ours(replace(made, hidden=hidden), OPERANDS, backend).grads.values():
        assert grad.isnan().any()


@dtypes
def test_a_bad_row_that_does_not_count_is_not_read(dtype, backend):
    made = problem("normal", 50, 65, 300, dtype=dtype, bias=True, through=DIFFERENTIABLE)
    hidden = torch.where((made.targets < 0)[:, None], torch.nan, made.hidden)
    assert hidden.isnan().any()
    for wanted in (("hidden",), OPERANDS):
        check(made, ours(replace(made, hidden=hidden), wanted, backend))


@pytest.mark.parametrize("transform", ["plain", "scaled"])
@dtypes
def test_banned_tokens(dtype, transform, backend):
    """A bias of -inf takes a token out: what is left is the problem without these columns."""
    full = problem("normal", 33, 65, 400, dtype=dtype, bias=True, transform=transform, ignored=0)
    banned = torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.4
    banned[:130] = True  # a whole tile, the first
    banned[full.targets] = False
    bias = torch.where(banned, -torch.inf, full.bias)
    kept = (~banned).nonzero().squeeze(1)
    position = torch.cumsum(~banned, 0) - 1
    for through in (("logp",), DIFFERENTIABLE):
        upstream = problem("normal", 33, 65, 400, through=through, ignored=0).upstream
        banning = replace(full, bias=bias, upstream=upstream)
        without = replace(
            full,
            weight=full.weight[kept],
            bias=full.bias[kept],
            targets=position[full.targets],
            upstream=upstream,
        )
        for wanted in (("hidden",), OPERANDS):
            results = ours(banning, wanted, backend)
            assert (results.outputs.mean_logit == -torch.inf).all()
            outputs = results.outputs._replace(mean_logit=None)
            for name in ("weight", "bias"):
                if name in wanted:
                    assert (results.grads[name][banned] == 0).all(), name
            grads = {name: grad if name == "hidden" else grad[kept] for name, grad in results.grads.items()}
            check(without, Results(outputs, grads))


def test_a_banned_target(backend):
    """Its log-probability is -inf, it is not at the top, and the other rows do not notice."""
    made = problem("normal", 33, 65, 300, bias=True, ignored=0)
    bias = made.bias.clone()
    bias[made.targets[7]] = -torch.inf
    others = made.targets != made.targets[7]
    results = ours(replace(made, bias=bias), ("hidden",), backend)
    assert results.outputs.logp[7] == -torch.inf and not results.outputs.is_top1[7]
    assert results.outputs.logp[others].isfinite().all()
    assert results.outputs.entropy.isfinite().all() and results.outputs.lse.isfinite().all()
    assert results.grads["hidden"][others].isfinite().all()


@pytest.mark.parametrize("bias", [88.5, 89.0, 200.0, 443.5, 1e4])
@dtypes
def test_a_large_bias(dtype, bias, backend):
    """A token id whose bias alone overflows exp: the zeros that fill up a register's tokens must not reach a sum."""
    for T in (1, 3, 17, 33):
        made = problem("normal", T, 64, 40, dtype=dtype, bias=True, through=DIFFERENTIABLE, ignored=0)
        large = made.bias.clone()
        large[5] = bias
        made = replace(made, bias=large)
        check(made, ours(made, OPERANDS, backend))


@dtypes
def test_an_infinite_row_of_the_head(dtype, backend):
    """Logits of -inf through the weight: as a banned token, in every row that counts."""
    made = problem("normal", 5, 64, 40, dtype=dtype, bias=True, through=DIFFERENTIABLE, ignored=0)
    hidden, weight = made.hidden.clone(), made.weight.clone()
    hidden[:, 3] = 1
    weight[7, 3] = -torch.inf
    targets = torch.where(made.targets == 7, 8, made.targets)
    made = replace(made, hidden=hidden, weight=weight, targets=targets)
    results = ours(made, (), backend)
    finite = results.outputs._replace(mean_logit=None, is_top1=None)
    kept = torch.arange(40) != 7
    without = replace(
        made,
        weight=weight[kept],
        bias=made.bias[kept],
        targets=targets - (targets > 7).long(),
    )
    check(without, Results(finite, {}))
    grads = ours(made, ("weight", "bias"), backend).grads
    for name, grad in grads.items():
        assert (grad[7] == 0).all(), f"{name} of the token that cannot come"
        assert_as_good_as_torch(
            name,
            grad[kept],
            baseline(without).grads[name],
            exact(without).grads[name],
            terms=exact(without).terms[name],
        )


def special_values(dtype):
    """Both signs of powers of two over the range, subnormal ones too, of their neighbours, the largest and zero."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    sizes = [info.max, info.smallest_normal, 3 * smallest, 1.0, 1 + info.eps, 0.0, 1 / 3]
    sizes += [smallest * 2.0**k for k in range(0, 40, 3)] + [1.5 * 2.0**k for k in range(-12, 16)]
    values = torch.tensor(sizes, dtype=torch.float64).to(dtype)
    return torch.cat([values, -values])


def equal_or_flushed(ours, expected):
    """Equal bits; a dot product of bf16 takes numbers below fp32's (and bf16's) smallest normal one for 0."""
    flushed = (ours == 0) & (expected.abs() < torch.finfo(torch.float32).smallest_normal)
    return ((ours == expected) | flushed).all()


@pytest.mark.parametrize("vocabulary", [1, 2, 3])
@dtypes
@pytest.mark.compiled_only("Triton's logits are in units of log 2: right to one more rounding")
def test_every_format_is_read_exactly(dtype, vocabulary, backend):
    """A logit that is one product with 1 is what stands in memory, whichever operand has it.

    All logits are equal, so lse is the logit plus log V: exactly the logit for V = 1, else within two roundings.
    """
    values = special_values(dtype)
    ones, targets = torch.ones(vocabulary, 1, dtype=dtype), torch.zeros(len(values)).long()
    log_size, eps = math.log(vocabulary), torch.finfo(torch.float32).eps
    out = linear_logprob(values[:, None], ones, targets, outputs=OUTPUTS, backend=backend)
    other = [
        linear_logprob(ones[:1], value.repeat(vocabulary, 1), targets[:1], backend=backend).lse for value in values
    ]
    for lse in (out.lse, torch.cat(other)):
        if vocabulary == 1:
            assert equal_or_flushed(lse, values.float())
        rounding = eps * (values.double().abs() + log_size) + torch.finfo(torch.float32).tiny
        assert ((lse.double() - values.double() - log_size).abs() <= rounding).all()
    assert ((out.logp.double() + log_size).abs() <= eps * (values.double().abs() + log_size)).all()
    assert out.is_top1.all()


@dtypes
def test_every_format_is_written_exactly(dtype, backend):
    """A gradient that is one product with 1 is rounded once, to the nearest, ties to even, as torch rounds."""
    info = torch.finfo(dtype)
    steps = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.5]) * info.eps
    values = (special_values(dtype).float()[:, None] * (1 + steps)).flatten()
    normal = values.abs() >= 4 * torch.finfo(torch.float32).smallest_normal
    upstream = values[normal & values.isfinite()]
    if backend == "triton" and not ON_GPU:  # a launch in the interpreter takes milliseconds
        upstream = upstream[::11]  # 11 and the 5 steps have no common factor: every step is met
    # hidden is 1 and both logits are 0: the gradients of the head and the bias are half of the upstream gradient
    hidden, targets = torch.ones(1, 1, dtype=dtype), torch.tensor([0])
    for u in upstream:
        leaves = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in [(2, 1), (2,)]]
        out = linear_logprob(hidden, leaves[0], targets, leaves[1], backend=backend)
        out.logp.backward(u[None])
        expected = torch.stack([u / 2, -u / 2]).to(dtype)
        for leaf in leaves:
            assert equal_or_flushed(leaf.grad.flatten(), expected), (u, leaf.grad, expected)


def test_unit_gradients_are_rounded_once(backend):
    """The same for the gradient that the forward makes, of fp16 down to its subnormal numbers."""
    values = special_values(torch.float16)
    head = torch.stack([values, torch.zeros_like(values)])  # (2, H): d logp / d hidden = W[y] / 2
    hidden = torch.zeros(2, len(values), dtype=torch.float16, requires_grad=True)
    out = linear_logprob(hidden, head, torch.tensor([0, 1]), backend=backend)
    out.logp.backward(torch.tensor([1.0, 1.0]))
    half = (values.double() / 2).half()
    assert torch.equal(hidden.grad, torch.stack([half, -half]))


@dtypes
@pytest.mark.compiled_only("Triton's logits are in units of log 2: right to one more rounding")
def test_the_largest_values(dtype, backend):
    """Products of the largest fp16 fit fp32. Those of the others do not: no finite number comes out of them."""
    largest = torch.finfo(dtype).max
    hidden = torch.tensor([[largest], [-largest]], dtype=dtype)
    weight = torch.tensor([[largest], [-largest]], dtype=dtype)
    out = linear_logprob(hidden, weight, torch.tensor([0, 0]), outputs=OUTPUTS, backend=backend)
    if dtype == torch.float16:
        assert torch.equal(out.logp, torch.tensor([0.0, -2 * largest**2]))
        assert torch.equal(out.is_top1, torch.tensor([True, False]))
    else:
        assert not out.logp.isfinite().any() and not out.lse.isfinite().any()


def test_fp16_gradients_of_confident_targets_survive(backend):
    """A loss scale lifts small gradients above fp16's smallest numbers: the unit gradient must not lose them before."""
    made = problem("peak", 200, 65, 300, dtype=torch.float16, bias=True, ignored=0)
    p = exact(made).outputs.logp.exp()
    sure = (p > 1 - 1e-5) & (p < 1 - 1e-6)  # d logp / d hidden is some 1e-6
    assert sure.sum() > 10
    scale = {"logp": torch.full((200,), 2.0**16)}
    made = replace(made, targets=torch.where(sure, made.targets, -1), upstream=scale)
    check(made, ours(made, OPERANDS, backend))
    check(made, ours(made, ("hidden",), backend))
