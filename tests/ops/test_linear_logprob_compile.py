"""linear_logprob under torch.library's checks, torch.compile and fake tensors: the same numbers, no graph break."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from prefopt_kernels import TokenLogprobs, linear_logprob
from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.linear_logprob import op
from prefopt_kernels.ops.linear_logprob.checks import OUTPUTS
from support.linear_logprob import (
    DIFFERENTIABLE,
    DTYPES,
    OPERANDS,
    backends,
    check,
    leaves,
    ours,
    problem,
    through_logp,
    want_of,
)

T, H, V = 17, 34, 150
LOW = (None, None)  # no adapter on the head
PLAIN = [1.0, 0.0, 1.0, 0.0, 0.0]  # scale, no softcap, temperature, filters
WANTED = [(), ("hidden",), ("weight",), OPERANDS]


@pytest.fixture(params=list(dict.fromkeys(name.split("/")[0] for name in backends())))
def backend(request) -> str:
    """Each backend once: the instruction set is below what a compiler sees."""
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "wanted, dtype",
    [*((wanted, torch.float32) for wanted in WANTED), (("hidden",), torch.bfloat16), (OPERANDS, torch.float16)],
    ids=str,
)
def test_opcheck_of_the_forward(wanted, dtype, backend):
    made = problem("normal", T, H, V, dtype=dtype, bias=True)
    x = leaves(made, wanted)
    unit = wanted == ("hidden",)
    for optional in (False, True):
        arguments = (x["hidden"], x["weight"], made.targets, x["bias"])
        want = want_of(optional, optional, optional, unit)
        torch.library.opcheck(op._linear_logprob, (*arguments, *LOW, [1.2, 7.5, 0.6, 0.0, 0.0], want, backend))
    arguments = (x["hidden"], x["weight"], made.targets, None, *LOW, PLAIN, want_of(unit=unit), backend)
    torch.library.opcheck(op._linear_logprob, arguments)


@pytest.mark.parametrize(
    "needed, through, dtype",
    [
        (("hidden",), ("logp",), torch.float32),
        (("hidden",), DIFFERENTIABLE, torch.bfloat16),
        (("weight", "bias"), ("logp",), torch.float16),
        (("weight", "bias"), ("lse",), torch.float32),
        (OPERANDS, ("lse",), torch.bfloat16),
        (OPERANDS, DIFFERENTIABLE, torch.float32),
    ],
    ids=str,
)
def test_opcheck_of_the_backward(needed, through, dtype, backend):
    made = problem("normal", T, H, V, dtype=dtype, bias=True, through=through)
    forward = ours(made, (), backend).outputs
    torch.library.opcheck(
        op._linear_logprob_backward,
        (
            *(made.upstream.get(name) for name in DIFFERENTIABLE),
            made.hidden,
            made.weight,
            made.targets,
            made.bias,
            *LOW,
            forward.lse,
            forward.entropy,
            None,
            None,
            PLAIN,
            " ".join(needed),
            backend,
        ),
    )


def test_opcheck_of_the_backward_of_a_frozen_head(backend):
    made = problem("normal", T, H, V)
    lse, unit = torch.randn(T), torch.randn(T, H)
    torch.library.opcheck(
        op._linear_logprob_backward,
        (
            made.upstream["logp"],
            *(None, None),
            made.hidden,
            made.weight,
            made.targets,
            *(None, *LOW, lse, None, unit, None),
            PLAIN,
            "hidden",
            backend,
        ),
    )


def same(results, expected):
    for name, value in expected.outputs._asdict().items():
        assert torch.equal(value, getattr(results.outputs, name)), name
    for name, grad in expected.grads.items():
        assert torch.equal(grad, results.grads[name]), name
        assert grad.dtype == results.grads[name].dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_compiled_is_eager(wanted, dtype, backend):
    """One graph, forward and backward, and every bit of eager's numbers."""
    made = problem("normal", T, H, V, dtype=dtype, bias=True, transform="all")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(through_logp, fullgraph=True, backend=counter)
    same(ours(made, wanted, backend, call=compiled), ours(made, wanted, backend))
    assert counter.frame_count == 1


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_compiled_with_every_output(wanted, backend):
    for through in (("logp",), DIFFERENTIABLE):
        made = problem("normal", T, H, V, bias=True, through=through, transform="all")
        compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
        check(made, ours(made, wanted, backend, call=compiled))


def test_a_compiled_step_with_auto_and_a_loss():
    """As a training step has it: backend chosen inside the graph, a projection before and a sum behind."""
    made = problem("normal", T, H, V, ignored=0.2)
    projection = torch.randn(H, H, requires_grad=True)

    def step(projection):
        out = linear_logprob(made.hidden @ projection, made.weight, made.targets)
        return -(out.logp * made.upstream["logp"]).sum() / (made.targets >= 0).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (step, compiled):
        loss = call(projection)
        results.append((loss.detach(), *torch.autograd.grad(loss, projection)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_dynamic_shapes(backend):
    """One graph serves every number of tokens."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(through_logp, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for tokens in (17, 5, 33, 64):
        for wanted in (("hidden",), OPERANDS):
            made = problem("normal", tokens, H, V, bias=True)
            same(ours(made, wanted, backend, call=compiled), ours(made, wanted, backend))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def test_the_first_compilation_of_a_process(monkeypatch):
    """The extension is loaded while torch.compile traces, and with dynamic shapes it traces more than once."""
    if _extension.why_not() is not None:
        pytest.skip(f"needs the C++ kernels: {_extension.why_not()}")
    loaded = (_extension.library(), None)
    monkeypatch.setattr(_extension, "_tried", False)
    monkeypatch.setattr(_extension, "_find_and_load", lambda: loaded)
    made = problem("normal", T, H, V, bias=True)

    def score(hidden, weight, bias):
        named = {"softcap": 5.0, "outputs": ("entropy",)}
        return linear_logprob(hidden, weight, made.targets, bias, **named)[:3]

    operands = made.operands.values()
    compiled = torch.compile(score, dynamic=True, backend="aot_eager")(*operands)
    torch.testing.assert_close(compiled, score(*operands), rtol=0, atol=0)


def test_compiled_under_autocast(backend):
    made = problem("normal", T, H, V, bias=True)

    def call(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return through_logp(**arguments)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for wanted in (("hidden",), OPERANDS):
        same(ours(made, wanted, backend, call=compiled), ours(made, wanted, backend, call=call))


def test_a_temperature_that_changes(backend):
    """The compiler turns a number that changes into a variable; each value is a compilation of its own all the same."""
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    made = problem("normal", T, H, V)
    for temperature in (1.0, 0.9, 0.8):
        arguments = {"temperature": temperature, "backend": backend}
        out = compiled(made.hidden, made.weight, made.targets, **arguments)
        eager = linear_logprob(made.hidden, made.weight, made.targets, **arguments)
        assert torch.equal(out.logp, eager.logp)


def test_a_compiled_call_still_refuses(backend):
    made = problem("normal", T, H, V)
    compiled = torch.compile(linear_logprob, backend="aot_eager")
    compiled(made.hidden, made.weight, made.targets, backend=backend)
    with pytest.raises(ValueError, match=r"targets\[0\] is 150"):
        compiled(made.hidden, made.weight, torch.full_like(made.targets, V), backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [("hidden",), OPERANDS], ids=str)
def test_inductor(wanted, backend):
    """The default compiler: what it does around the op changes no bit of these results."""
    made = problem("normal", T, H, V, bias=True)
    compiled = torch.compile(through_logp, fullgraph=True)
    same(ours(made, wanted, backend, call=compiled), ours(made, wanted, backend))


def test_fake_tensors(backend):
    """Shapes, dtypes and devices of real outputs and gradients, without data."""
    for dtype in DTYPES:
        for wanted in WANTED:
            made = problem("normal", T, H, V, dtype=dtype, bias=True)
            real, x = ours(made, wanted, backend), leaves(made, wanted)
            with FakeTensorMode() as mode:
                x = {name: mode.from_tensor(leaf) for name, leaf in x.items()}
                targets = mode.from_tensor(made.targets)
                out = linear_logprob(**x, targets=targets, outputs=OUTPUTS, backend=backend)
                if wanted:
                    out.logp.sum().backward()
            pairs = list(zip(out, real.outputs, strict=True))
            pairs += [(x[name].grad, real.grads[name]) for name in wanted]
            for fake, tensor in pairs:
                assert (fake.shape, fake.dtype, fake.device) == (
                    tensor.shape,
                    tensor.dtype,
                    tensor.device,
                )
                assert fake.stride() == tensor.stride()


def test_fake_gradients_are_laid_out_as_real_ones(backend):
    """Operands of odd strides: what the compiler plans for is what comes."""
    made = problem("normal", T, H, V, bias=True)
    for wanted in (("hidden",), OPERANDS):
        x = leaves(made, wanted)
        x["hidden"] = x["hidden"].detach().T.contiguous().T.requires_grad_("hidden" in wanted)
        x["weight"] = x["weight"].detach().T.contiguous().T.requires_grad_("weight" in wanted)
        for optional in (False, True):
            arguments = (x["hidden"], x["weight"], made.targets, x["bias"])
            want = want_of(optional, optional, optional, wanted == ("hidden",))
            torch.library.opcheck(op._linear_logprob, (*arguments, *LOW, PLAIN, want, backend))


def test_an_exported_graph(backend):
    class Head(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

        def forward(self, hidden, targets) -> TokenLogprobs:
            return linear_logprob(hidden, self.weight, targets, backend=backend)

    made = problem("normal", T, H, V)
    head = Head(made.weight)
    exported = torch.export.export(head, (made.hidden, made.targets)).module()
    out = exported(made.hidden, made.targets)
    assert torch.equal(out.logp, head(made.hidden, made.targets).logp)
