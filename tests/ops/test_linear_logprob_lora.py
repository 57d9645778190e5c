"""A low-rank adapter on the head, ``lora=(A, B, scale)``, against fp64 on the head W + scale B A."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from prefopt_kernels import linear_logprob
from support.linear_logprob import (
    DIFFERENTIABLE,
    DTYPES,
    LORA_OPERANDS,
    TRANSFORMS,
    Results,
    adapted,
    assert_same,
    check,
    exact,
    ours,
    problem,
    with_adapter,
)
from support.numerics import FAMILIES

T, V, R = 17, 300, 5  # of `adapted`, beside H 65
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
adapters = pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "fp32"])


@pytest.mark.parametrize("transform", TRANSFORMS)
@adapters
@dtypes
def test_values_and_gradients(dtype, adapter, transform, backend):
    for through in (("logp",), DIFFERENTIABLE):
        made = adapted(dtype=dtype, adapter=adapter, transform=transform, through=through)
        check(made, ours(made, LORA_OPERANDS, backend))


@pytest.mark.parametrize("family", FAMILIES)
@dtypes
def test_families(dtype, family, backend):
    made = adapted(family, dtype=dtype, adapter=torch.float32, through=("logp",))
    check(made, ours(made, LORA_OPERANDS, backend))


@pytest.mark.parametrize(
    "T, H, V, R",
    [
        *((17, 65, 300, R) for R in (1, 2, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 128)),
        (1, 1, 1, 1),
        (2, 3, 5, 7),
        (49, 130, 127, 3),
        (100, 31, 1000, 20),
        (600, 40, 1500, 9),  # more tokens than a panel, more rows than a chunk of the backward
        (33, 16, 140, 600),  # a rank above what one running sum takes
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_and_shapes_that_no_register_divides(dtype, T, H, V, R, backend):
    """Few rows are judged together with those of other seeds."""
    problems = [
        adapted(T=T, H=H, V=V, R=R, dtype=dtype, adapter=torch.float32, seed=seed) for seed in range(1 + 16 // T)
    ]
    check(problems, [ours(made, LORA_OPERANDS, backend) for made in problems])


@adapters
def test_each_gradient_alone_and_together(adapter, backend):
    """Also without any for the adapter, as in an evaluation of one that is trained elsewhere."""
    made = adapted(T=33, V=150, dtype=torch.bfloat16, adapter=adapter, transform="all")
    for n in range(len(LORA_OPERANDS) + 1):
        for wanted in combinations(LORA_OPERANDS, n):
            check(made, ours(made, wanted, backend))


@pytest.mark.parametrize("through", [("logp",), ("lse",), ("entropy",)], ids=str)
def test_upstream_through_one_output(through, backend):
    made = adapted(through=through, dtype=torch.bfloat16, adapter=torch.float32)
    check(made, ours(made, LORA_OPERANDS, backend))


def test_an_adapter_of_zeros_changes_no_bit(backend):
    """B = 0, where training starts: outputs and the other gradients are those of the head alone."""
    for dtype in DTYPES:
        plain = problem("normal", dtype=dtype, bias=True, through=DIFFERENTIABLE)
        made = with_adapter(plain, R)
        made = replace(made, B=torch.zeros_like(made.B))
        wanted = ("hidden", "weight", "bias")
        assert_same(ours(made, wanted, backend), ours(plain, wanted, backend))
        results = ours(made, LORA_OPERANDS, backend)
        assert not results.grads["A"].any() and results.grads["B"].any()


def test_the_merged_head_gives_the_same(backend):
    """Each is within 1e-5 nat of the truth, so they are within twice that of each other."""
    made = adapted(T=40, H=96, V=2000, R=16)
    merged = (made.weight.double() + made.lora_scale * made.B.double() @ made.A.double()).float()
    other = ours(replace(made, weight=merged, A=None, B=None), ("hidden", "bias"), backend)
    results = ours(made, LORA_OPERANDS, backend)
    check(made, results)
    check(made, other)
    assert (results.outputs.logp - other.outputs.logp).abs().max() <= 2e-5


@dtypes
def test_the_error_of_a_large_head(dtype, backend):
    """1e-5 nat, as without an adapter, for confident targets as for unlikely ones."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(20_000, 256, generator=generator) * (3 / 16)).to(dtype)
    targets = torch.randint(0, 20_000, (24,), generator=generator)
    hidden = torch.randn(24, 256, generator=generator)
    hidden[::2] = 2.5 * weight[targets[::2]].float()
    made = replace(problem("normal", 24, 256, 20_000), hidden=hidden.to(dtype), weight=weight)
    made = with_adapter(replace(made, targets=targets), 16, torch.float32)
    truth = exact(made).outputs.logp
    assert (truth > -0.1).sum() >= 8 and (truth < -5).sum() >= 8
    logp = ours(made, (), backend, ()).outputs.logp
    assert (logp.double() - truth).abs().max() <= 1e-5


def transposed(x):
    return torch.empty(x.shape[::-1], dtype=x.dtype).copy_(x.T).T


def column_slice(x):
    wide = torch.full((x.shape[0], x.shape[1] + 5), torch.nan, dtype=x.dtype)
    wide[:, 3:-2] = x
    return wide[:, 3:-2]


def every_second_row(x):
    return x.repeat_interleave(2, 0)[::2]


@pytest.mark.parametrize("rank", [1, R])
@pytest.mark.parametrize("view", [transposed, column_slice, every_second_row])
@adapters
def test_views(adapter, view, rank, backend):
    made = adapted(R=rank, dtype=torch.bfloat16, adapter=adapter)

    def call(lora, **arguments):
        return linear_logprob(lora=(view(lora[0]), view(lora[1]), lora[2]), **arguments)

    check(made, ours(made, LORA_OPERANDS, backend, call=call))


def test_one_row_for_all_token_ids(backend):
    made = adapted()
    made = replace(made, B=made.B[:1].expand(V, -1))

    def call(lora, **arguments):
        return linear_logprob(lora=(lora[0], lora[1][:1].expand(V, -1), lora[2]), **arguments)

    check(made, ours(made, (), backend, call=call))


@pytest.mark.parametrize("tokens", ["none", "none_counts"])
@dtypes
def test_nothing_to_do(dtype, tokens, backend):
    made = adapted(T=0 if tokens == "none" else 5, dtype=dtype, ignored=2)
    results = ours(made, LORA_OPERANDS, backend)
    check(made, results)
    assert not any(value.any() for value in results.outputs)
    assert not any(grad.any() for grad in results.grads.values())


def test_no_hidden_dimension(backend):
    """H = 0: A h is 0, and B's gradient with it."""
    made = adapted(H=0, through=("logp",))
    results = ours(made, LORA_OPERANDS, backend)
    check(made, results)
    assert not results.grads["B"].any()


def test_a_bad_row_stays_in_its_row(backend):
    made = adapted(ignored=0, dtype=torch.bfloat16)
    hidden = made.hidden.clone()
    hidden[7, 3] = torch.nan
    right = ours(made, ("hidden",), backend)
    results = ours(replace(made, hidden=hidden), ("hidden",), backend)
    others = torch.arange(T) != 7
    assert results.outputs.logp[7].isnan() and results.grads["hidden"][7].isnan().any()
    for name, value in results.outputs._asdict().items():
        assert torch.equal(value[others], getattr(right.outputs, name)[others]), name
    assert torch.equal(results.grads["hidden"][others], right.grads["hidden"][others])


@dtypes
def test_rows_that_do_not_count(dtype, backend):
    """Whatever lies in them: the same bits, in the gradients of A and B too."""
    made = adapted(T=50, dtype=dtype, ignored=0.5)
    hidden = made.hidden.clone()
    hidden[made.targets < 0] = 1e3
    results = ours(replace(made, hidden=hidden), LORA_OPERANDS, backend)
    check(made, results)
    assert_same(results, ours(made, LORA_OPERANDS, backend))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "T, H, V, R",
    [
        (17, 65, 385, 5),  # the vocabulary is split
        (150, 40, 130, 20),  # the tokens are divided, and the workers share a chunk
        (1100, 16, 700, 3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads(dtype, T, H, V, R, count, backend, threads):
    """Right for any number of them, and the same bits every time for a fixed one."""
    made = adapted(T=T, H=H, V=V, R=R, dtype=dtype, adapter=torch.float32)
    threads(count)
    results = [ours(made, LORA_OPERANDS, backend) for _ in range(3)]
    threads(1)
    check(made, results[0])
    for again in results[1:]:
        assert_same(again, results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend):
    """Hidden states, head and bias are cast as for a linear layer; the adapter keeps its dtype and A h its fp32."""
    made = adapted()
    cast = replace(made, **{n: getattr(made, n).to(dtype) for n in ("hidden", "weight", "bias")})
    expected = ours(cast, LORA_OPERANDS, backend)

    def call(**arguments):
        with torch.autocast("cpu", dtype):
            return linear_logprob(**arguments)

    results = ours(made, LORA_OPERANDS, backend, call=call)
    assert_same(Results(results.outputs, {}), Results(expected.outputs, {}))
    for name, grad in expected.grads.items():
        assert torch.equal(results.grads[name], grad.float()), name
