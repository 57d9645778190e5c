"""Both ops under torch.func and forward-mode AD: the right numbers, or an error, and never a tangent that is lost."""

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from prefopt_kernels import linear_logprob, vocab_parallel_linear_logprob
from prefopt_kernels.modules import FusedLinearKTOLoss
from prefopt_kernels.ops.sequence_loss import sequence_loss
from support.linear_logprob import backends

T, H, V = 6, 8, 17
CU, LABELS, REF = torch.tensor([0, 2, 6]), torch.tensor([True, False]), torch.tensor([-5.0, -9.0])
NAMES = ("hidden", "weight", "bias", "A", "B", "logp")


@pytest.fixture(params=list(dict.fromkeys(name.split("/")[0] for name in backends())))
def backend(request) -> str:
    return request.param


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def operands() -> dict[str, torch.Tensor]:
    shapes = ((T, H), (V, H), (V,), (2, H), (V, 2), (T,))
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(shape, generator=generator) for shape in shapes)
    return dict(zip(NAMES, made, strict=True))


def calls(backend: str) -> dict:
    """Each public entry as a function of one of its operands, by that operand's name."""
    x, targets = operands(), torch.arange(T)
    packed = {"ref_logps": REF, "reference_point": torch.zeros(())}

    def plain(**own):
        of = x | own
        lora = (of["A"], of["B"], 0.5)
        named = {"bias": of["bias"], "lora": lora, "backend": backend, "outputs": ("entropy",)}
        out = linear_logprob(of["hidden"], of["weight"], targets, **named)
        return out.logp + out.entropy

    def parallel(**own):
        of = x | own
        lora = (of["A"], of["B"], 0.5)
        named = {"lora": lora, "vocab_start": 0, "backend": backend}
        head = (of["weight"], targets, of["bias"])
        return vocab_parallel_linear_logprob(of["hidden"], *head, **named).logp

    def kto(scheme):
        module = FusedLinearKTOLoss(beta=0.1, backend=backend, scheme=scheme)

        trained = {"weight": x["weight"].clone().requires_grad_(scheme == "chunked")}

        def loss(**own):
            of = x | trained | own
            head = (of["weight"], targets, CU, LABELS)
            return module(of["hidden"], *head, bias=of["bias"], **packed)[0]

        return loss

    def sequences(**own):
        return sequence_loss(own["logp"], CU, REF, LABELS, beta=0.1, backend=backend).losses

    return {
        "linear_logprob": (plain, NAMES[:5]),
        "vocab_parallel": (parallel, NAMES[:5]),
        "op": (kto("op"), NAMES[:3]),
        "chunked": (kto("chunked"), NAMES[:3]),
        "sequence_loss": (sequences, NAMES[5:]),
    }


@pytest.mark.parametrize("entry", calls("reference"))
def test_a_tangent_is_refused_by_the_name_of_its_operand(entry, backend, group):
    call, names = calls(backend)[entry]
    for name in names:
        value = operands()[name]
        match = f"no forward-mode derivative, and (lora's )?{name}(_shard)? carries a tangent"
        with pytest.raises(NotImplementedError, match=match):
            jvp(lambda v, name=name: call(**{name: v}), (value,), (torch.ones_like(value),))
        for trained in (False, True):
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=match):
                own = value.clone().requires_grad_(trained)
                call(**{name: forward_ad.make_dual(own, torch.ones_like(value))})
        with forward_ad.dual_level():  # where nothing carries one
            inside = call(**{name: value})
        assert torch.equal(inside, call(**{name: value}))


def test_a_tangent_is_refused_in_a_compiled_graph(backend):
    call, _ = calls(backend)["linear_logprob"]
    hidden = operands()["hidden"]

    def derivative(hidden):
        return jvp(lambda h: call(hidden=h), (hidden,), (torch.ones_like(hidden),))

    with pytest.raises(Exception, match="no forward-mode derivative"):
        torch.compile(derivative, backend="eager")(hidden)
    torch.compiler.reset()


@pytest.mark.parametrize("entry", ["linear_logprob", "op", "sequence_loss"])
def test_vmap_is_a_loop(entry, backend):
    call, names = calls(backend)[entry]
    for name in names:
        value = operands()[name]
        batch = torch.stack([value, 2 * value, -value]).requires_grad_()
        mapped = vmap(lambda v, name=name: call(**{name: v}))(batch)
        expected = torch.stack([call(**{name: v}) for v in batch])
        torch.testing.assert_close(mapped, expected)
        (ours,) = torch.autograd.grad(mapped.square().sum(), batch)
        (loop,) = torch.autograd.grad(expected.square().sum(), batch)
        torch.testing.assert_close(ours, loop)


@pytest.mark.parametrize("transform", [grad, hessian])
@pytest.mark.parametrize("entry", ["linear_logprob", "vocab_parallel", "op"])
def test_derivatives_of_torch_func_raise(entry, transform, backend, group):
    """torch has no support for them in custom ops yet."""
    call, _ = calls(backend)[entry]
    with pytest.raises(RuntimeError, match=r"functorch transforms"):
        transform(lambda h: call(hidden=h).sum())(operands()["hidden"])
