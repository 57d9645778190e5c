"""linear_kl under torch.library's checks, torch.compile and fake tensors: the same numbers, no graph break."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from prefopt_kernels import TokenKL, linear_kl
from prefopt_kernels.ops.linear_kl import op
from prefopt_kernels.ops.linear_logprob.checks import OUTPUTS
from support.linear_kl import DIFFERENTIABLE, Pair, arguments, assert_same, check, ours, pair
from support.linear_logprob import DTYPES, OPERANDS, backends, leaves

T, H, V = 17, 34, 150
SHAPE = {"T": T, "H": H, "V": V}
NUMBERS = [1.2, 7.5, 0.6, 1.0, 0.0, 1.0]  # of both transforms
WANTED = [(), ("hidden",), OPERANDS]
BASIC = "logp ref_logp lse ref_lse kl"


@pytest.fixture(params=list(dict.fromkeys(name.split("/")[0] for name in backends())))
def backend(request) -> str:
    """Each backend once: the instruction set is below what a compiler sees."""
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def op_operands(made: Pair, x: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    ref_head = (None, None) if made.shared else (made.ref.weight, made.ref.bias)
    policy = (x["hidden"], x["weight"], made.policy.targets, x.get("bias"), None, None)
    return (*policy, made.ref.hidden, *ref_head, None, None)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_opcheck_of_the_forward(wanted, shared, backend):
    for dtype in DTYPES if wanted == OPERANDS else DTYPES[:1]:
        made = pair(**SHAPE, dtype=dtype, bias=True, shared=shared)
        operands = op_operands(made, leaves(made.policy, wanted))
        unit = " unit" if wanted == ("hidden",) else ""
        for want in (BASIC + unit, f"{BASIC} {' '.join(OUTPUTS)}{unit}"):
            torch.library.opcheck(op._linear_kl, (*operands, NUMBERS, want, backend))


@pytest.mark.parametrize("through", [("kl",), ("logp",), DIFFERENTIABLE], ids=str)
@pytest.mark.parametrize("needed", [("hidden",), OPERANDS], ids=str)
def test_opcheck_of_the_backward(needed, through, backend):
    for shared in (True, False):
        made = pair(**SHAPE, bias=True, through=through, shared=shared)
        out = ours(made, (), backend).outputs
        upstream = (made.policy.upstream.get(name) for name in ("logp", "lse", "entropy", "kl"))
        operands = op_operands(made, leaves(made.policy, ()))
        unit = torch.randn(T, H) if needed == ("hidden",) and through == ("logp",) else None
        saved = (out.lse, out.ref_lse, out.kl, out.entropy, unit)
        arguments = (*upstream, *operands, *saved, NUMBERS, " ".join(needed), backend)
        torch.library.opcheck(op._linear_kl_backward, arguments)


def training(**given) -> TokenKL:
    """A gradient through logp and kl, numbers to log from the rest."""
    out = linear_kl(**given)
    return TokenKL(out.logp, out.ref_logp, out.lse.detach(), out.ref_lse, out.kl, out.entropy.detach(), *out[6:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_compiled_is_eager(wanted, dtype, backend):
    """One graph, forward and backward, and every bit of eager's numbers."""
    for shared in (True, False):
        made = pair(**SHAPE, dtype=dtype, bias=True, shared=shared, transform="all", rank=3, through=("logp", "kl"))
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(training, fullgraph=True, backend=counter)
        assert_same(ours(made, wanted, backend, call=compiled), ours(made, wanted, backend))
        assert counter.frame_count == 1


def test_compiled_with_every_output(backend):
    made = pair(**SHAPE, bias=True, through=DIFFERENTIABLE, transform="all")
    compiled = torch.compile(linear_kl, fullgraph=True, backend="aot_eager")
    for wanted in WANTED:
        check(made, ours(made, wanted, backend, call=compiled))


def test_dynamic_shapes(backend):
    """One graph serves every number of tokens."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for tokens in (17, 5, 33, 64):
        made = pair(T=tokens, H=H, V=V, bias=True, through=("logp", "kl"))
        assert_same(ours(made, OPERANDS, backend, call=compiled), ours(made, OPERANDS, backend))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def test_compiled_under_autocast(backend):
    made = pair(**SHAPE, bias=True, through=("logp", "kl"))

    def call(**given):
        with torch.autocast("cpu", torch.bfloat16):
            return training(**given)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(ours(made, OPERANDS, backend, call=compiled), ours(made, OPERANDS, backend, call=call))


@pytest.mark.slow
def test_inductor(backend):
    made = pair(**SHAPE, bias=True, through=("logp", "kl"))
    compiled = torch.compile(training, fullgraph=True)
    assert_same(ours(made, OPERANDS, backend, call=compiled), ours(made, OPERANDS, backend))


def test_fake_tensors(backend):
    """Shapes, dtypes, devices and strides of real outputs and gradients, without data."""
    for dtype in DTYPES:
        for wanted in WANTED:
            made = pair(**SHAPE, dtype=dtype, bias=True)
            real, x = ours(made, wanted, backend), arguments(made, leaves(made.policy, wanted))
            with FakeTensorMode() as mode:
                x = {name: mode.from_tensor(y) if isinstance(y, torch.Tensor) else y for name, y in x.items()}
                out = linear_kl(**x, outputs=OUTPUTS, backend=backend)
                if wanted:
                    out.kl.sum().backward()
            pairs = list(zip(out, real.outputs, strict=True)) + [(x[name].grad, real.grads[name]) for name in wanted]
            for fake, tensor in pairs:
                assert (fake.shape, fake.dtype, fake.device) == (tensor.shape, tensor.dtype, tensor.device)
                assert fake.stride() == tensor.stride()


def test_an_exported_graph(backend):
    class Head(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

        def forward(self, hidden, ref_hidden, targets) -> TokenKL:
            return linear_kl(hidden, self.weight, targets, ref_hidden, backend=backend)

    made = pair(**SHAPE)
    operands = (made.policy.hidden, made.ref.hidden, made.policy.targets)
    head = Head(made.policy.weight)
    exported = torch.export.export(head, operands).module()
    assert torch.equal(exported(*operands).kl, head(*operands).kl)
