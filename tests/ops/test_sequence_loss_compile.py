"""sequence_loss under torch.library's checks, torch.compile and fake tensors: the same numbers, no graph break."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from prefopt_kernels.ops.sequence_loss import op, sequence_loss
from prefopt_kernels.ops.sequence_loss.parameters import OFF, TENSORS, Parameters
from support.sequence_loss import SETTINGS, backends, device, ours, problem

CASES = ["kto", "bco", "everything"]


KERNELS = [name for name in backends() if name != "reference"]  # those behind the custom op


@pytest.fixture(params=backends())
def backend(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same(a, b):
    for left, right in zip((*a.outputs, a.dlogp), (*b.outputs, b.dlogp), strict=True):
        assert torch.equal(left, right)


def operands(made, settings, backend, tensors=False) -> tuple:
    """What the custom op takes for a call."""
    place = device(backend)
    rows = (made.logp.clone(), made.cu_seqlens, made.ref_logps, made.labels, made.lengths)
    settings = OFF | {"decision_low": 0.5, "decision_high": 2.0} | settings
    return (
        *(None if row is None else row.to(place) for row in rows),
        *(torch.tensor(0.5, device=place) if tensors else None for _ in TENSORS),
        [float(settings[name] or 0) for name in Parameters._fields],
        settings["method"],
        settings["win_weighting"],
        settings["decision_weighting"],
        backend,
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_opcheck_of_the_forward(case, tensors, backend):
    call = operands(problem(5), SETTINGS[case], backend, tensors)
    torch.library.opcheck(op._sequence_loss, call)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck_with_a_gradient(backend):
    logp, *rest = operands(problem(5, lengths=False), SETTINGS["kto"], backend)
    torch.library.opcheck(op._sequence_loss, (logp.requires_grad_(), *rest))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("through", ["losses", "logps", "both"])
def test_opcheck_of_the_backward(through, backend):
    made, place = problem(5), device(backend)
    by_loss, by_logps, at = (x.to(place) for x in (made.by_loss, made.by_logps, made.cu_seqlens))
    slopes = torch.randn(5).to(place)
    upstream = (by_loss if through != "logps" else None, by_logps if through != "losses" else None)
    arguments = (*upstream, made.logp.to(place), at, slopes, backend)
    torch.library.opcheck(op._sequence_loss_backward, arguments)


@pytest.mark.parametrize("case", CASES)
def test_compiled_is_eager(case, backend):
    """One graph, forward and backward, and every bit of eager's numbers."""
    made, settings = problem(), SETTINGS[case]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sequence_loss, fullgraph=True, backend=counter)
    same(ours(made, settings, backend, call=compiled), ours(made, settings, backend))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", KERNELS)
def test_one_graph_serves_every_packing(backend):
    counter, compilations = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(sequence_loss, fullgraph=True, dynamic=True, backend=counter)
    for B in (12, 5, 33):
        made, settings = problem(B), SETTINGS["kto"]
        same(ours(made, settings, backend, call=compiled), ours(made, settings, backend))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


@pytest.mark.parametrize("backend", KERNELS)
def test_a_number_that_changes(backend):
    """The compiler turns it into a variable; each value is a compilation of its own all the same."""
    made = problem(5)
    compiled = torch.compile(sequence_loss, fullgraph=True, backend="aot_eager")
    for gate in (0.0, 0.25, 0.5):
        settings = SETTINGS["everything"] | {"shift_gate": gate, "beta": 0.1 + gate}
        same(ours(made, settings, backend, call=compiled), ours(made, settings, backend))


def test_a_reference_point_that_changes(backend):
    """As a tensor: one graph for a whole run."""
    made, counter = problem(5), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sequence_loss, fullgraph=True, backend=counter)
    for z0 in (0.0, 1.5, 2.25):
        tensor = torch.tensor(z0, device=device(backend))
        settings = SETTINGS["kto"] | {"reference_point": tensor}
        same(ours(made, settings, backend, call=compiled), ours(made, settings, backend))
    assert counter.frame_count == 1


def test_a_compiled_step(backend):
    """Backend chosen inside the graph, something differentiable before and a mean behind."""
    made, place = problem(), device(backend)
    rows = (made.cu_seqlens, made.ref_logps, made.labels, made.lengths)
    rows = [row.to(place) for row in rows]
    scale = torch.ones((), device=place, requires_grad=True)
    logp = made.logp.to(place)

    def step(scale):
        out = sequence_loss(logp * scale, *rows, **SETTINGS["everything"])
        return out.losses.mean() - 0.01 * out.logps.mean()

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = call(scale)
        results.append((loss.detach(), *torch.autograd.grad(loss, scale)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_fake_tensors(backend):
    """Shapes, dtypes, strides and devices of real outputs and gradients, without data."""
    made, place = problem(), device(backend)
    real = ours(made, SETTINGS["everything"], backend)
    rows = (made.logp, made.cu_seqlens, made.ref_logps, made.labels, made.lengths)
    with FakeTensorMode() as mode:
        logp, *rest = (mode.from_tensor(row.to(place)) for row in rows)
        logp.requires_grad_()
        out = sequence_loss(logp, *rest, **SETTINGS["everything"], backend=backend)
        (out.losses.sum() + out.logps.sum()).backward()
    for fake, tensor in zip((*out, logp.grad), (*real.outputs, real.dlogp), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (
            tensor.shape,
            tensor.dtype,
            tensor.stride(),
        )
        assert fake.device.type == place


@pytest.mark.parametrize("backend", KERNELS)
def test_a_compiled_call_still_refuses(backend):
    """Offsets are values: on the CPU they are looked at in every call, compiled or not."""
    if device(backend) != "cpu":
        pytest.skip("on a GPU reading them would make the host wait")
    made = problem(5)
    compiled = torch.compile(sequence_loss, fullgraph=True, backend="aot_eager")
    rows = (made.ref_logps, made.labels)
    compiled(made.logp, made.cu_seqlens, *rows, beta=0.1, backend=backend)
    with pytest.raises(ValueError, match="expected from 0 to T"):
        compiled(made.logp, made.cu_seqlens - 1, *rows, beta=0.1, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_no_second_derivative(backend):
    made, place = problem(5), device(backend)
    logp = made.logp.to(place, copy=True).requires_grad_()
    rows = (made.cu_seqlens, made.ref_logps, made.labels)
    out = sequence_loss(logp, *(row.to(place) for row in rows), beta=0.1, backend=backend)
    (gradient,) = torch.autograd.grad(out.losses.sum(), logp, create_graph=True)
    with pytest.raises(RuntimeError, match="sequence_loss has no second derivative"):
        gradient.sum().backward()


def test_what_is_logged_carries_no_gradient(backend):
    made, place = problem(5), device(backend)
    logp = made.logp.to(place, copy=True).requires_grad_()
    rows = (made.cu_seqlens, made.ref_logps.clone().requires_grad_(), made.labels)
    out = sequence_loss(logp, *(row.to(place) for row in rows), beta=0.1, backend=backend)
    needs = {name: value.requires_grad for name, value in out._asdict().items()}
    assert [name for name, needed in needs.items() if needed] == ["losses", "logps"]
    with torch.no_grad():
        assert not sequence_loss(logp, *(row.to(place) for row in rows), beta=0.1).losses.requires_grad


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.slow
def test_inductor(backend):
    """The default compiler changes no bit."""
    made = problem()
    compiled = torch.compile(sequence_loss, fullgraph=True)
    settings = SETTINGS["everything"]
    same(ours(made, settings, backend, call=compiled), ours(made, settings, backend))
