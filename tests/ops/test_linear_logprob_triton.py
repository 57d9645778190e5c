"""The Triton kernels of linear_logprob against the policy of numerics.py: on a GPU, or in Triton's interpreter."""

import mmap
from dataclasses import replace

import pytest
import torch

from prefopt_kernels import explain, linear_logprob
from prefopt_kernels.ops.linear_logprob.operands import Operands
from prefopt_kernels.ops.linear_logprob.transform import Transform
from prefopt_kernels.ops.linear_logprob.triton_kernels import backend as backend_triton
from prefopt_kernels.ops.linear_logprob.triton_kernels import config as backend_triton_choices
from prefopt_kernels.ops.linear_logprob.triton_kernels import frozen as backend_triton_unit
from support.linear_logprob import DIFFERENTIABLE, OPERANDS, TRANSFORMS, check, problem
from support.numerics import FAMILIES
from support.triton_backend import DEVICE, ON_GPU, TRITON_DTYPES, there, triton_results

T, H, V = 33, 72, 1000
A100 = backend_triton_choices.Target((8, 0), 3, 166_912)


@pytest.fixture(params=["descriptors", "pointers"])
def loads(request):
    """How tiles are read: by the hardware's descriptors (sm_90) or by addresses (sm_80)."""
    if ON_GPU:
        if request.param == "pointers":
            pytest.skip("a GPU reads as it can")
        yield
        return
    target = backend_triton_choices.INTERPRETER if request.param == "descriptors" else A100
    with backend_triton_choices.pretending(target):
        yield


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wanted", [(), ("hidden",), ("hidden", "weight")], ids=str)
def test_values_and_gradients(wanted, family, dtype, loads):
    made = problem(family, T, H, V, dtype=dtype)
    check(made, triton_results(made, wanted))


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("through", [("logp",), ("lse",), DIFFERENTIABLE], ids=str)
def test_every_flag(through, transform, dtype):
    made = problem("normal", T, H, V, dtype=dtype, bias=True, transform=transform, through=through)
    for wanted in (("hidden",), ("bias",), OPERANDS):
        check(made, triton_results(made, wanted))


SMALL = [(1, 1, 1), (1, 1, 2), (1, 72, 1), (2, 1, 300), (2, 3, 1), (15, 1, 3), (16, 65, 300)]
RAGGED = [
    (17, 65, 7),
    (17, 130, 129),
    (33, 1, 513),
    (113, 65, 255),
    (129, 65, 257),
    (257, 40, 1025),
]


@pytest.mark.parametrize("shape", [*SMALL, *RAGGED, (128, 64, 256)], ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_shapes_that_no_tile_divides(shape, dtype):
    """Few rows are judged together with those of other seeds."""
    for wanted, through in (
        ((), ("logp",)),
        (("hidden",), ("logp",)),
        (OPERANDS, DIFFERENTIABLE),
    ):
        problems = [
            problem("normal", *shape, dtype=dtype, bias=True, through=through, seed=seed)
            for seed in range(1 + 6 // shape[0])
        ]
        check(problems, [triton_results(made, wanted) for made in problems])


def test_no_rows_and_no_rows_that_count():
    for T, ignored in ((0, 0.0), (40, 1.0)):
        made = problem("normal", T, H, V, ignored=ignored, bias=True)
        for wanted in (("hidden",), OPERANDS):
            results = triton_results(made, wanted)
            check(made, results)
            assert all((grad == 0).all() for grad in results.grads.values())


def test_a_row_that_does_not_count_may_hold_nan():
    made = problem("normal", T, H, V, ignored=0.4)
    hidden = torch.where((made.targets < 0)[:, None], torch.nan, made.hidden)
    for wanted in (("hidden",), ("hidden", "weight")):
        poisoned = triton_results(replace(made, hidden=hidden), wanted)
        check(made, poisoned)


@pytest.mark.parametrize("wanted", [("hidden",), OPERANDS], ids=str)
def test_several_chunks_of_the_workspace(wanted, monkeypatch):
    """More rows, and more token ids, than one workspace holds."""
    monkeypatch.setattr(backend_triton_choices, "WORKSPACE_BYTES", 300_000)
    made = problem("normal", 300, H, V, bias=True, through=DIFFERENTIABLE)
    check(made, triton_results(made, wanted))


def test_all_logits_far_below_zero():
    """A running maximum that started at 0 would make every p zero."""
    made = problem("normal", T, H, V, bias=True)
    made = replace(made, bias=torch.full((V,), -300.0))
    for wanted in (("hidden",), ("hidden", "weight")):
        check(made, triton_results(made, wanted))


def one_tile_is_live(above: float):
    """Rows in which one token id, not the target, is ``above`` the rest."""
    made = problem("normal", T, H, V, ignored=0.0)
    weight = 0.01 * made.weight
    weight[777] = 1.0
    hidden = made.hidden.abs() * (above / made.hidden.abs().sum(1, keepdim=True))
    return replace(made, hidden=hidden, weight=weight, targets=made.targets.clamp(max=700))


@pytest.mark.parametrize("above", [20.0, 55.0, 300.0])
def test_one_live_tile(above):
    """From 42 nats (60 powers of two) on, the reference of the exponentials has to move."""
    made = one_tile_is_live(above)
    for wanted in (("hidden",), ("hidden", "weight")):
        check(made, triton_results(made, wanted))


def test_without_moving_the_reference_the_exponentials_overflow(monkeypatch):
    monkeypatch.setattr(backend_triton_unit, "REFERENCE_LIMIT", 1e30)
    results = triton_results(one_tile_is_live(300.0), ("hidden",))
    assert not results.grads["hidden"].isfinite().all()


def far_apart(rows: int, columns: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, columns) over more than 2^31 elements, of which only the pages that are used exist."""
    elements = rows * stride
    if ON_GPU:
        return torch.empty(elements, dtype=dtype, device=DEVICE).view(rows, stride)[:, :columns]
    memory = mmap.mmap(-1, elements * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(rows, stride)[:, :columns]


def test_offsets_past_two_to_the_31(loads):
    made = problem("normal", T, H, V, dtype=torch.float16)
    stride = 2**31 // (V - 1) + 8
    stride += -stride % 8
    weight = far_apart(V, H, stride, torch.float16)
    weight.copy_(made.weight)
    assert (V - 1) * weight.stride(0) > 2**31
    hidden = there(made.hidden).clone().requires_grad_()
    targets = torch.full((T,), V - 1)
    out = linear_logprob(hidden, weight, there(targets), backend="triton")
    out.logp.sum().backward()
    near = replace(made, targets=targets, upstream={"logp": torch.ones(T)})
    results = triton_results(near, ("hidden",))
    check(near, results)
    assert torch.equal(out.logp.detach().cpu(), results.outputs.logp)
    assert torch.equal(hidden.grad.cpu(), results.grads["hidden"])


@pytest.mark.parametrize("operand", ["hidden", "weight", "both"])
def test_strided_operands(operand):
    made = problem("normal", T, H, V)

    def columns_first(x, name):
        return x.T.contiguous().T if operand in (name, "both") else x

    strided = replace(
        made,
        hidden=columns_first(made.hidden, "hidden"),
        weight=columns_first(made.weight, "weight"),
    )
    equal = replace(made, weight=made.weight[:1].expand(V, H))
    for wanted in (("hidden",), ("hidden", "weight")):
        check(made, triton_results(strided, wanted))
        # The interpreter's product rounds equal columns differently, so who is at the top is open.
        check(equal, triton_results(equal, wanted, outputs=("entropy", "mean_logit")))


def test_repeats_bit_for_bit():
    made = problem("normal", 300, H, V, bias=True, through=DIFFERENTIABLE)
    for wanted in (("hidden",), OPERANDS):
        first, second = (triton_results(made, wanted) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first.outputs, second.outputs, strict=True))
        assert all(torch.equal(first.grads[name], second.grads[name]) for name in wanted)


def test_a_target_that_is_no_token_id_is_nan_not_a_wild_read():
    """Elsewhere targets are checked beforehand; on a GPU that would wait for the device."""
    made = there(vars(problem("normal", T, H, V)))
    targets = made["targets"].clone()
    targets[3], targets[7] = V, 2**40
    operands = Operands(made["hidden"], made["weight"], targets)
    want = frozenset({"logp", "lse", "unit"})
    out = backend_triton.forward(operands, Transform(1.0, None, 1.0), want, 0.0)
    wrong = torch.zeros(T, dtype=torch.bool, device=DEVICE)
    wrong[[3, 7]] = True
    assert torch.equal(out["logp"].isnan(), wrong)
    assert torch.equal(out["unit"].isnan().any(1), wrong)


@pytest.mark.skipif(ON_GPU, reason="about tensors that are on no GPU")
def test_why_not():
    hidden, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    assert explain(hidden, weight)["triton"] is None
    reason = explain(hidden.bfloat16(), weight.bfloat16())["triton"]
    assert "bf16" in reason
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call: .*bf16"):
        linear_logprob(hidden.bfloat16(), weight.bfloat16(), torch.tensor([0, 1]), backend="triton")
    assert "CUDA" in explain(hidden.to("meta"), weight.to("meta"))["triton"]
