"""linear_kl in autograd: the unit gradient, what is saved, the reference model as a constant, autocast, checkpoints."""

import pytest
import torch
from torch.func import jvp, vmap
from torch.utils.checkpoint import checkpoint

from prefopt_kernels import TokenKL, linear_kl
from prefopt_kernels.ops.linear_kl import reference as backend_reference
from prefopt_kernels.ops.linear_logprob import reference as logprob_reference
from prefopt_kernels.ops.linear_logprob.checks import OUTPUTS
from support.linear_kl import DIFFERENTIABLE, arguments, check, ours, pair
from support.linear_logprob import OPERANDS, leaves

T, H, V = 17, 65, 300


@pytest.fixture
def kernels(monkeypatch):
    """The calls of the reference backend, in order."""
    calls = []

    def spy(module, name, entry):
        real = getattr(module, name)

        def called(*given):
            calls.append(entry(given))
            return real(*given)

        monkeypatch.setattr(module, name, called)

    spy(backend_reference, "forward", lambda given: ("forward", "unit" in given[-1]))
    spy(backend_reference, "backward", lambda given: ("backward", set(given[-1])))
    spy(logprob_reference, "backward", lambda given: ("backward of linear_logprob", set(given[-1])))
    return calls


def call(made, wanted, **options):
    x = leaves(made.policy, wanted)
    return x, linear_kl(**arguments(made, x), backend="reference", **options)


@pytest.mark.parametrize(
    "wanted, unit", [((), False), (("hidden",), True), (("weight",), False), (("hidden", "bias"), False)], ids=str
)
def test_the_unit_gradient_is_made_when_and_only_when_it_is_of_use(wanted, unit, kernels):
    made = pair(bias=True)
    call(made, wanted)
    call(made, wanted, keep_unit=False)
    with torch.no_grad():
        call(made, wanted)
    assert kernels == [("forward", unit), ("forward", False), ("forward", False)]


def test_which_backward_runs(kernels):
    """None for logp alone with a frozen head, that of linear_logprob without a gradient through kl."""
    made = pair(bias=True)
    expected = {
        "logp": [],
        "entropy": [("backward of linear_logprob", {"hidden"})],
        "kl": [("backward", {"hidden"})],
    }
    for name, calls in expected.items():
        kernels.clear()
        x, out = call(made, ("hidden",), outputs=OUTPUTS)
        getattr(out, name).sum().backward()
        assert kernels == [("forward", True), *calls]
        assert x["hidden"].grad.any()


def test_what_carries_a_gradient(kernels):
    made = pair(bias=True)
    x, out = call(made, OPERANDS, outputs=OUTPUTS)
    assert {name for name, value in out._asdict().items() if value.requires_grad} == set(DIFFERENTIABLE)
    other = torch.ones((), requires_grad=True)
    (other * (out.ref_logp + out.ref_lse + out.mean_logit).sum()).backward()
    assert kernels == [("forward", False)] and all(leaf.grad is None for leaf in x.values())


def test_a_shared_head_that_is_trained_is_a_constant_of_the_reference_model(backend):
    """The same gradient as with a second head of equal numbers."""
    made = pair(bias=True, through=("kl",), shared=True)
    x = leaves(made.policy, OPERANDS)
    apart = arguments(made, x) | {"ref_weight": made.policy.weight.clone(), "ref_bias": made.policy.bias.clone()}
    (linear_kl(**apart, backend=backend).kl * made.policy.upstream["kl"]).sum().backward()
    results = ours(made, OPERANDS, backend)
    for name in OPERANDS:
        assert torch.equal(x[name].grad, results.grads[name]), name


@pytest.mark.parametrize("name", ["ref_hidden", "ref_weight", "ref_bias", "ref_lora[0]", "ref_lora[1]"])
def test_a_reference_model_that_requires_grad_is_refused(name):
    made = pair(bias=True, shared=False, ref_rank=3)
    x = arguments(made, leaves(made.policy, ()))
    key, _, place = name.partition("[")
    if place:
        lora = list(x[key])
        lora[int(place[0])] = lora[int(place[0])].clone().requires_grad_()
        x[key] = tuple(lora)
    else:
        x[key] = x[key].clone().requires_grad_()
    with pytest.raises(ValueError) as caught:
        linear_kl(**x)
    assert str(caught.value).startswith(f"{name} requires grad, but the reference model is constant here; pass")
    with torch.no_grad():  # where nothing gets a gradient, a trained model is as good as any
        linear_kl(**x)


@pytest.mark.parametrize("wanted", [("hidden",), OPERANDS], ids="+".join)
def test_nothing_of_the_size_of_the_logits_is_saved(wanted, backend):
    made = pair(bias=True, shared=False)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = arguments(made, leaves(made.policy, wanted))
        linear_kl(**x, outputs=OUTPUTS, backend=backend)
    operands = {value.data_ptr() for value in x.values() if isinstance(value, torch.Tensor)}
    assert saved
    for tensor in saved:
        assert tensor.data_ptr() in operands or tensor.numel() <= T * H


@pytest.mark.parametrize("through", ["logp", "lse", "kl"])
def test_no_second_derivative(through, backend):
    made = pair(bias=True)
    for wanted in (("hidden",), OPERANDS):
        x = leaves(made.policy, wanted)
        out = linear_kl(**arguments(made, x), backend=backend)
        total = getattr(out, through).exp().sum()
        grads = torch.autograd.grad(total, [x[name] for name in wanted], create_graph=True)
        # through kl alone these do not depend on an upstream gradient that requires one
        with pytest.raises(RuntimeError, match="linear_kl has no second derivative"):
            sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"])
def test_a_tangent_is_refused_by_the_name_of_its_operand(name, backend):
    made = pair(bias=True, shared=False)
    x = arguments(made, leaves(made.policy, ()))

    def score(value):
        return linear_kl(**(x | {name: value}), backend=backend).kl

    with pytest.raises(NotImplementedError, match=f"linear_kl has no forward-mode derivative, and {name} carries"):
        jvp(score, (x[name],), (torch.ones_like(x[name]),))


def test_vmap_is_a_loop(backend):
    made = pair()
    x = arguments(made, leaves(made.policy, ()))
    batch = torch.stack([x["hidden"], -x["hidden"]]).requires_grad_()

    def score(hidden):
        return linear_kl(**(x | {"hidden": hidden}), backend=backend).kl

    mapped, expected = vmap(score)(batch), torch.stack([score(hidden) for hidden in batch])
    torch.testing.assert_close(mapped, expected)
    for first, second in zip(
        *(torch.autograd.grad(kl.square().sum(), batch) for kl in (mapped, expected)), strict=True
    ):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [("hidden",), OPERANDS], ids="+".join)
def test_autocast(wanted, dtype, backend):
    """fp32 operands of both models are cast as for a linear layer; the gradients arrive in fp32."""
    made = pair("grid", bias=True, shared=False, through=("logp", "kl"))

    def under(**given):
        with torch.autocast("cpu", dtype):
            return linear_kl(**given)

    def cast(**given):
        by = {
            name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in given.items()
        }
        return linear_kl(**by)

    results, expected = (ours(made, wanted, backend, call=call) for call in (under, cast))
    for name, value in expected.outputs._asdict().items():
        assert torch.equal(value, getattr(results.outputs, name)), name
    for name in wanted:
        assert torch.equal(results.grads[name], expected.grads[name]), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, backend):
    made = pair(bias=True, through=DIFFERENTIABLE)

    def recomputed(**given):
        def inner(*operands):
            return tuple(linear_kl(**{**given, **dict(zip(OPERANDS, operands, strict=True))})[:6])

        return TokenKL(*checkpoint(inner, *(given[name] for name in OPERANDS), use_reentrant=reentrant))

    for wanted in (("hidden",), OPERANDS):
        plain = ours(made, wanted, backend)
        results = ours(made, wanted, backend, ("entropy",), call=recomputed)
        check(made, results)
        for name in wanted:
            assert torch.equal(results.grads[name], plain.grads[name]), name


def test_gradients_accumulate_in_the_leaves(backend):
    made = pair(bias=True, through=("logp", "kl"))
    once = ours(made, OPERANDS, backend).grads
    x = leaves(made.policy, OPERANDS)
    out = linear_kl(**arguments(made, x), backend=backend)
    total = sum((getattr(out, name) * by).sum() for name, by in made.policy.upstream.items())
    total.backward(retain_graph=True)
    total.backward()
    for name in OPERANDS:
        assert torch.equal(x[name].grad, 2 * once[name]), name


def test_outputs_do_not_share_memory(backend):
    made = pair(bias=True)
    x = arguments(made, leaves(made.policy, ()))
    out = linear_kl(**x, outputs=OUTPUTS, backend=backend)
    places = [value.data_ptr() for value in out]
    assert len(set(places)) == len(places)
