"""The scheme "chunked" of FusedLinearKTOLoss against fp64 on all logits and against the scheme "op"."""

import functools

import pytest
import torch
from torch import tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefopt_kernels import chunked, modules
from prefopt_kernels.modules import FusedLinearKTOLoss
from prefopt_kernels.ops.linear_logprob.transform import Transform
from support.numerics import assert_as_good_as_torch
from test_modules import BOUNDS, HEADS, KL, LABELS, H, T, V, batch, leaves, plain

TRAINED = ("hidden", "weight", "bias")
OUTPUTS = ("entropy", "mean_logit", "is_top1")


def limit_rows(monkeypatch, rows):
    """Chunks of at most ``rows`` tokens; None for the default, which is one chunk here."""
    if rows is not None:
        small = functools.partial(chunked.chunked_head, chunk_bytes=4 * V * rows)
        monkeypatch.setattr(modules, "chunked_head", small)


def step(scheme, inputs, *, by=1.0, **options):
    settings = {"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.5, **options}
    kl = {"kl_log_ratio": tensor(KL)} if settings.get("method", "kto") == "kto" else {}
    loss, metrics = FusedLinearKTOLoss(scheme=scheme, **settings)(**inputs, **kl)
    (by * loss).backward()
    return loss.detach(), metrics


def check(inputs, loss, dtype, method="kto", reduction="mean", head="plain"):
    """The loss and -3 times its gradients, against plain torch in fp32 and fp64 on all logits."""
    settings = {"scale" if k == "logit_scale" else k: v for k, v in HEADS[head].items()}
    results = []
    for precision in (torch.float32, torch.float64):
        x = leaves(batch(dtype), TRAINED)
        losses, *_ = plain(x, precision, 1.5 if method == "kto" else 0.0, **settings)
        total = getattr(losses, reduction)()
        (-3.0 * total).backward()
        results.append((total.detach(), {name: x[name].grad for name in TRAINED}))
    (baseline, baseline_grads), (exact, exact_grads) = results
    assert_as_good_as_torch("loss", loss, baseline, exact)
    for name in TRAINED:
        assert inputs[name].grad.dtype == dtype
        truth = exact_grads[name].double()
        assert_as_good_as_torch(f"d{name}", inputs[name].grad, baseline_grads[name], truth)


@pytest.mark.parametrize("rows", [None, 5, 2, 1])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("method", ["kto", "apo_zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradients(dtype, method, reduction, head, rows, monkeypatch):
    """Also where a sequence is longer than a chunk, with an upstream gradient that is not 1."""
    limit_rows(monkeypatch, rows)
    options = {"method": method, "reduction": reduction, "outputs": OUTPUTS, **HEADS[head]}
    ours, beside = leaves(batch(dtype), TRAINED), leaves(batch(dtype), TRAINED)
    loss, metrics = step("chunked", ours, by=-3.0, **options)
    _, op_metrics = step("op", beside, by=-3.0, **options)

    check(ours, loss, dtype, method, reduction, head)
    assert torch.equal(loss, getattr(metrics.losses, reduction)())
    assert not any(value.requires_grad for value in vars(metrics).values())
    for name, value in vars(op_metrics).items():
        mine = getattr(metrics, name)
        assert mine.dtype == value.dtype and mine.shape == value.shape, name
        # five terms below 16 in size, each right to 2 eps on either side: 5 * 16 * 4 * 6e-8
        torch.testing.assert_close(mine, value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The CUDA path on the CPU: bf16 operands, rounded gradients of the logits, emulated products."""

    def product(a, b, *, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        return a.float() @ b.float()

    def add_product(to, a, b, *, out_dtype, out):
        assert out is to and to.dtype == torch.float32
        return to.add_(product(a, b, out_dtype=out_dtype))

    monkeypatch.setattr(chunked, "_has_mixed_products", lambda hidden: True)
    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch, "addmm", add_product)


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("head", HEADS)
def test_the_cuda_path(head, rows, as_on_cuda, monkeypatch):
    """With the same tolerance, although the gradient of the logits is rounded to bf16 for its products."""
    limit_rows(monkeypatch, rows)
    ours = leaves(batch(torch.bfloat16), TRAINED)
    loss, _ = step("chunked", ours, by=-3.0, **HEADS[head])
    check(ours, loss, torch.bfloat16, head=head)


@pytest.mark.parametrize(("name", "overload"), [("mm", "dtype"), ("addmm", "dtype_out")])
def test_torch_has_the_mixed_precision_products(name, overload):
    """By their schemas; on meta tensors torch 2.11 has a wrong addmm."""
    product = getattr(getattr(torch.ops.aten, name), overload)
    assert "Tensor mat2, ScalarType out_dtype" in str(product._schema)


@pytest.mark.parametrize("name", TRAINED[1:])
@pytest.mark.parametrize("also_hidden", [True, False])
def test_each_gradient_alone(name, also_hidden):
    """Bitwise independent of which other gradients are required."""
    wanted = ("hidden", name) if also_hidden else (name,)
    everything, some = leaves(batch(), TRAINED), leaves(batch(), wanted)
    step("chunked", everything)
    step("chunked", some)
    for leaf in TRAINED:
        if leaf in wanted:
            assert torch.equal(some[leaf].grad, everything[leaf].grad), leaf
        else:
            assert some[leaf].grad is None


def chunks_of(inputs, rows: int) -> list[tuple[int, int, int]]:
    """First and last sequence of each chunk, and its number of tokens."""
    found = []

    def loss_of(logp, bounds, sequences):
        found.append((sequences.start, sequences.stop, len(logp)))
        return modules.sequence_logps(logp, bounds)

    x = leaves(inputs, TRAINED)
    operands = (x[name] for name in (*TRAINED, "targets", "cu_seqlens"))
    chunked.chunked_head(*operands, loss_of, Transform(1.0, None, 1.0), chunk_bytes=4 * V * rows)
    return found


@pytest.mark.parametrize(
    "rows, expected",
    [
        (T, [(0, 4, 9)]),  # nine tokens are scored, in sequences of 3, 0, 4 and 2
        (7, [(0, 3, 7), (3, 4, 2)]),
        (4, [(0, 2, 3), (2, 3, 4), (3, 4, 2)]),
        (3, [(0, 2, 3), (2, 3, 4), (3, 4, 2)]),  # a longer sequence is one chunk, in parts
    ],
)
def test_chunks_are_whole_sequences(rows, expected):
    assert chunks_of(batch(), rows) == expected


@pytest.mark.parametrize("first", [True, False])
def test_a_sequence_of_ignored_tokens(first):
    """Its loss is that of log-ratio 0, and its gradient 0; other sequences are unchanged."""
    inputs = batch()
    inputs["targets"][: BOUNDS[1]] = -100
    ours, beside = leaves(inputs, TRAINED), leaves(inputs, TRAINED)
    _, metrics = step("chunked", ours)
    step("op", beside)
    assert metrics.logps[0] == 0 and not ours["hidden"].grad[: BOUNDS[1]].any()
    # bounds of the roundings of five tokens' terms, each below 1
    for name in TRAINED:
        torch.testing.assert_close(ours[name].grad, beside[name].grad, rtol=1e-5, atol=1e-6)


def test_no_token_counts():
    inputs = leaves(batch(), TRAINED)
    inputs["targets"] = torch.full((T,), -100)
    _, metrics = step("chunked", inputs)
    assert metrics.token_count.item() == 0 and chunks_of(inputs, T) == []
    for name in TRAINED:
        assert torch.equal(inputs[name].grad, torch.zeros_like(inputs[name])), name


def test_a_confident_target_keeps_its_gradient():
    """p above 0.9999: the small difference onehot - p is taken in fp32 before rounding."""
    inputs = batch(torch.bfloat16)
    inputs["targets"] = torch.arange(T)
    inputs["weight"] = torch.eye(V, H).bfloat16()
    inputs["hidden"] = (14 * torch.eye(T, H)).bfloat16()
    inputs["bias"] = torch.zeros(V).bfloat16()
    inputs["cu_seqlens"] = tensor([0, 2, 4, 6, T])
    inputs["targets"][7:] = -100
    ours = leaves(inputs, TRAINED)
    step("chunked", ours)
    grads = {}
    for precision in (torch.float32, torch.float64):
        x = leaves(inputs, TRAINED)
        z = x["hidden"].to(precision) @ x["weight"].to(precision).T + x["bias"].to(precision)
        logp = z.log_softmax(1)[torch.arange(7), torch.arange(7)]
        with torch.no_grad():
            ref = x["ref_hidden"].to(precision) @ x["ref_weight"].to(precision).T
            ref = (ref + x["ref_bias"].to(precision)).log_softmax(1)
            ref = ref[torch.arange(7), torch.arange(7)]
        ratio = logp - ref
        ratio = torch.stack([ratio[:2].sum(), ratio[2:4].sum(), ratio[4:6].sum(), ratio[6]])
        s = torch.where(tensor(LABELS), 1.0, -1.0).to(precision)
        weights = torch.where(tensor(LABELS), 1.25, 0.5).to(precision)
        (weights * torch.sigmoid(-s * 0.3 * (ratio - 1.5))).mean().backward()
        grads[precision] = {name: x[name].grad for name in TRAINED}
    for name in TRAINED:
        truth = grads[torch.float64][name].double()
        assert_as_good_as_torch(f"d{name}", ours[name].grad, grads[torch.float32][name], truth)


def test_a_banned_token():
    """A bias of -inf: p is 0, and there is no NaN."""
    inputs = batch()
    inputs["targets"][inputs["targets"] == 3] = 4
    inputs["bias"][3] = inputs["ref_bias"][3] = -torch.inf
    ours = leaves(inputs, TRAINED)
    _, metrics = step("chunked", ours, outputs=("entropy",))
    assert metrics.logps.isfinite().all() and metrics.entropy_sum.isfinite().all()
    assert all(ours[name].grad.isfinite().all() for name in TRAINED)
    assert ours["bias"].grad[3] == 0 and not ours["weight"].grad[3].any()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned, and tokens of the largest logits (n, 400)."""

    def __init__(self):
        super().__init__()
        self.elements = self.tokens = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
                if value.shape[1:] == (400,) and value.shape[0] != H:  # (H, 400) is the transposed head
                    self.tokens = max(self.tokens, value.shape[0])
        return out


@pytest.mark.parametrize("rows, expected", [(None, 9 * 400), (3, 400 * H)])
def test_memory_is_bounded_by_the_chunk_and_the_head(rows, expected):
    generator = torch.Generator().manual_seed(0)
    inputs = batch() | {
        "weight": torch.randn(400, H, generator=generator),
        "bias": torch.randn(400, generator=generator),
    }
    x = leaves(inputs, TRAINED)
    size = {} if rows is None else {"chunk_bytes": 4 * 400 * rows}
    with Largest() as largest:
        chunked.chunked_head(
            *(x[name] for name in (*TRAINED, "targets", "cu_seqlens")),
            lambda logp, bounds, rows: modules.sequence_logps(logp, bounds),
            Transform(1.0, None, 1.0),
            **size,
        )
    assert largest.elements == expected
    assert largest.tokens == (rows or 9)  # a sequence of four is split into parts


def test_the_backward_can_run_twice():
    inputs = leaves(batch(), TRAINED)
    loss, _ = FusedLinearKTOLoss(beta=0.3, scheme="chunked")(**inputs, kl_log_ratio=tensor(KL))
    loss.backward(retain_graph=True)
    once = {name: inputs[name].grad.clone() for name in TRAINED}
    loss.backward()
    assert all(torch.equal(inputs[name].grad, 2 * once[name]) for name in TRAINED)


def test_no_second_derivative():
    inputs = leaves(batch(), TRAINED)
    loss, _ = FusedLinearKTOLoss(beta=0.3, scheme="chunked")(**inputs, kl_log_ratio=tensor(KL))
    (grad,) = torch.autograd.grad(loss.square(), inputs["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_runs_repeat_bit_for_bit():
    first, again = leaves(batch(), TRAINED), leaves(batch(), TRAINED)
    assert torch.equal(step("chunked", first)[0], step("chunked", again)[0])
    assert all(torch.equal(first[name].grad, again[name].grad) for name in TRAINED)


def test_autocast():
    """The operands are cast as for a linear layer; the gradients come back in their own dtype."""
    cast = batch(torch.bfloat16)
    ours = leaves({k: v.float() if v.is_floating_point() else v for k, v in cast.items()}, TRAINED)
    by_hand = leaves(cast, TRAINED)
    step("chunked", by_hand)
    with torch.autocast("cpu", torch.bfloat16):
        step("chunked", ours)
    for name in TRAINED:
        assert ours[name].grad.dtype == torch.float32
        assert torch.equal(ours[name].grad, by_hand[name].grad.float()), name
