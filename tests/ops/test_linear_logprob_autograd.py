"""linear_logprob in autograd: the unit gradient, what is saved, launches, autocast, checkpoints."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from prefopt_kernels import TokenLogprobs, linear_logprob
from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.linear_logprob import reference as backend_reference
from prefopt_kernels.ops.linear_logprob.checks import OUTPUTS
from support.linear_logprob import DIFFERENTIABLE, DTYPES, OPERANDS, check, leaves, ours, problem

T, H, V = 17, 65, 300


@pytest.fixture
def kernels(monkeypatch):
    """What the reference backend is asked: ("forward", unit gradient wanted?) and ("backward", needs) in order."""
    calls = []
    forward, backward = backend_reference.forward, backend_reference.backward

    def spy_forward(*arguments):
        calls.append(("forward", "unit" in arguments[2]))
        return forward(*arguments)

    def spy_backward(*arguments):
        calls.append(("backward", set(arguments[-1])))
        return backward(*arguments)

    monkeypatch.setattr(backend_reference, "forward", spy_forward)
    monkeypatch.setattr(backend_reference, "backward", spy_backward)
    return calls


def call(made, wanted, **options):
    x = leaves(made, wanted)
    return x, linear_logprob(**x, targets=made.targets, backend="reference", **options)


@pytest.mark.parametrize(
    "wanted, unit",
    [
        ((), False),
        (("hidden",), True),
        (("weight",), False),
        (("bias",), False),
        (("hidden", "weight"), False),
        (("hidden", "bias"), False),
        (OPERANDS, False),
    ],
    ids=str,
)
def test_the_unit_gradient_is_made_when_and_only_when_it_is_of_use(wanted, unit, kernels):
    made = problem("normal", T, H, V, bias=True)
    call(made, wanted)
    assert kernels == [("forward", unit)]


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_no_unit_gradient_without_gradients(without, kernels):
    made = problem("normal", T, H, V)
    x = leaves(made, ("hidden",))
    with without():
        out = linear_logprob(**x, targets=made.targets, backend="reference")
    assert kernels == [("forward", False)] and not out.logp.requires_grad


def test_no_unit_gradient_in_an_evaluation(kernels):
    """A frozen model: nothing asks for a gradient, in eval() and out of no_grad()."""
    made = problem("normal", T, H, V)
    embed, head = torch.nn.Linear(H, H).requires_grad_(False).eval(), made.weight
    out = linear_logprob(embed(made.hidden), head, made.targets, backend="reference")
    assert kernels == [("forward", False)] and not out.logp.requires_grad


def test_the_backward_of_a_frozen_head_calls_no_kernel(kernels):
    made = problem("normal", T, H, V, bias=True)
    x, out = call(made, ("hidden",), outputs=OUTPUTS)
    (out.logp * made.upstream["logp"]).sum().backward()
    assert kernels == [("forward", True)] and x["hidden"].grad.any()


@pytest.mark.parametrize("through", ["lse", "entropy"])
def test_other_outputs_of_a_frozen_head_recompute(through, kernels):
    made = problem("normal", T, H, V, bias=True)
    _, out = call(made, ("hidden",), outputs=OUTPUTS)
    (out.logp.sum() + getattr(out, through).sum()).backward()
    assert kernels == [("forward", True), ("backward", {"hidden"})]


@pytest.mark.parametrize("wanted", [("weight",), ("bias",), ("hidden", "bias"), OPERANDS], ids=str)
def test_the_backward_is_asked_for_what_is_needed(wanted, kernels):
    made = problem("normal", T, H, V, bias=True)
    _, out = call(made, wanted)
    out.logp.sum().backward()
    assert kernels == [("forward", False), ("backward", set(wanted))]


def test_a_backward_through_nothing_calls_no_kernel(kernels):
    made = problem("normal", T, H, V, bias=True)
    x, out = call(made, OPERANDS, outputs=OUTPUTS)
    other = torch.ones((), requires_grad=True)
    assert not out.mean_logit.requires_grad and not out.is_top1.requires_grad
    (other * out.mean_logit.sum()).backward()
    assert kernels == [("forward", False)] and other.grad == out.mean_logit.sum()
    assert all(leaf.grad is None for leaf in x.values())


@pytest.mark.parametrize("wanted", [("hidden",), OPERANDS], ids="+".join)
def test_nothing_of_the_size_of_the_logits_is_saved(wanted, backend):
    made = problem("normal", T, H, V, bias=True)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = leaves(made, wanted)
        linear_logprob(**x, targets=made.targets, outputs=OUTPUTS, backend=backend)
    assert saved
    operands = {x[name].data_ptr() for name in x}
    for tensor in saved:
        assert tensor.data_ptr() in operands or tensor.numel() <= T * H


@pytest.mark.parametrize("wanted", [("hidden",), OPERANDS], ids="+".join)
def test_gradients_accumulate_in_the_leaves(wanted, backend):
    """Two backwards of one graph, and two graphs, add up; the first gradient is nobody else's memory."""
    made = problem("normal", T, H, V, bias=True)
    once = ours(made, wanted, backend).grads
    x = leaves(made, wanted)
    out = linear_logprob(**x, targets=made.targets, backend=backend)
    total = (out.logp * made.upstream["logp"]).sum()
    total.backward(retain_graph=True)
    first = {name: x[name].grad.clone() for name in wanted}
    total.backward()
    for name in wanted:
        assert torch.equal(first[name], once[name]), name
        assert torch.equal(x[name].grad, 2 * once[name]), name
    out = linear_logprob(**x, targets=made.targets, backend=backend)
    (out.logp * made.upstream["logp"]).sum().backward()
    for name in wanted:
        assert torch.equal(x[name].grad, 2 * once[name] + once[name]), name
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_gradients_of_some_leaves(backend):
    """torch.autograd.grad of one operand of a trained head leaves the others alone."""
    made = problem("normal", T, H, V, bias=True, through=DIFFERENTIABLE)
    together = ours(made, OPERANDS, backend).grads
    for name in OPERANDS:
        x = leaves(made, OPERANDS)
        out = linear_logprob(**x, targets=made.targets, outputs=OUTPUTS, backend=backend)
        total = sum((getattr(out, by) * made.upstream[by]).sum() for by in DIFFERENTIABLE)
        (grad,) = torch.autograd.grad(total, [x[name]])
        assert torch.equal(grad, together[name]), name
        assert all(leaf.grad is None for leaf in x.values())


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), OPERANDS], ids="+".join)
def test_no_second_derivative(wanted, backend):
    made = problem("normal", T, H, V, bias=True)
    x = leaves(made, wanted)
    out = linear_logprob(**x, targets=made.targets, backend=backend)
    grads = torch.autograd.grad(out.logp.exp().sum(), [x[n] for n in wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob has no second derivative"):
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [("hidden",), OPERANDS], ids="+".join)
def test_autocast(wanted, dtype, backend):
    """fp32 operands are cast as for a linear layer; the gradients arrive in fp32."""
    made = problem("normal", T, H, V, bias=True)
    x = leaves(made, wanted)
    with torch.autocast("cpu", dtype):
        out = linear_logprob(**x, targets=made.targets, outputs=OUTPUTS, backend=backend)
        assert torch.nn.functional.linear(x["hidden"], x["weight"]).dtype == dtype
    assert out.logp.dtype == out.lse.dtype == torch.float32
    (out.logp * made.upstream["logp"]).sum().backward()
    cast = problem("normal", T, H, V, bias=True, dtype=dtype)
    by_hand = ours(cast, wanted, backend)
    check(cast, by_hand)
    for name, value in by_hand.outputs._asdict().items():
        assert torch.equal(value, getattr(out, name).detach()), name
    for name in wanted:
        assert x[name].grad.dtype == torch.float32
        assert torch.equal(x[name].grad, by_hand.grads[name].float()), name


@pytest.mark.compiled_only("in bf16, which Triton's interpreter multiplies wrongly")
def test_autocast_leaves_nothing_else_alone(backend):
    """Operands of mixed dtypes meet in the autocast dtype, and autocast disabled means disabled."""
    made = problem("normal", T, H, V, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear_logprob(made.hidden.float(), made.weight, made.targets, backend=backend)
        with torch.autocast("cpu", enabled=False):
            fp32 = linear_logprob(made.hidden.float(), made.weight.float(), made.targets, backend=backend)
    both = linear_logprob(made.hidden, made.weight, made.targets, backend=backend)
    assert torch.equal(mixed.logp, both.logp)
    alone = linear_logprob(made.hidden.float(), made.weight.float(), made.targets, backend=backend)
    assert torch.equal(fp32.logp, alone.logp)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("wanted", [("hidden",), OPERANDS], ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_checkpointing(dtype, wanted, reentrant, backend):
    made = problem("normal", T, H, V, dtype=dtype, bias=True, through=DIFFERENTIABLE)

    def recomputed(**arguments):
        def inner(*operands):
            return tuple(linear_logprob(**{**arguments, **dict(zip(OPERANDS, operands, strict=True))})[:3])

        operands = [arguments[name] for name in OPERANDS]
        outputs = checkpoint(inner, *operands, use_reentrant=reentrant)
        return TokenLogprobs(*outputs)

    plain = ours(made, wanted, backend)
    results = ours(made, wanted, backend, ("entropy",), call=recomputed)
    for name in wanted:
        assert torch.equal(results.grads[name], plain.grads[name]), name


def test_outputs_do_not_share_memory(backend):
    """In-place work on one output changes no other, nor the operands."""
    made = problem("normal", T, H, V, bias=True)
    out = linear_logprob(**made.operands, targets=made.targets, outputs=OUTPUTS, backend=backend)
    places = [value.data_ptr() for value in out]
    assert len(set(places)) == len(places)
    assert not {x.data_ptr() for x in (*made.operands.values(), made.targets)} & set(places)


def test_the_environment_chooses_the_backend(monkeypatch, kernels):
    made = problem("normal", T, H, V)
    arguments = (made.hidden, made.weight, made.targets)
    monkeypatch.setenv("PREFOPT_BACKEND", "reference")
    linear_logprob(*arguments)
    assert len(kernels) == 1, "PREFOPT_BACKEND takes the place of auto"
    monkeypatch.setenv("PREFOPT_BACKEND", "auto")
    linear_logprob(*arguments, backend="reference")
    assert len(kernels) == 2
    monkeypatch.setenv("PREFOPT_BACKEND", "cpu")
    monkeypatch.setattr(_extension, "why_not", lambda: "no C++ compiler")
    linear_logprob(*arguments, backend="reference")
    assert len(kernels) == 3, "a named backend comes before the environment"
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run this call: no C\+\+ compiler"):
        linear_logprob(*arguments)
    monkeypatch.setenv("PREFOPT_BACKEND", "refrence")
    with pytest.raises(ValueError, match="'refrence'; expected one of .*'reference'"):
        linear_logprob(*arguments)
