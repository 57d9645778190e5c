"""sequence_logps and FusedLinearKTOLoss against fp64 arithmetic on all logits, written here."""

import itertools

import pytest
import torch
from torch import tensor

from prefopt_kernels import linear_logprob
from prefopt_kernels.modules import FusedLinearKTOLoss, KTOMetrics
from prefopt_kernels.parallel import dtensor as sharded_head
from prefopt_kernels.reference_point import MicrobatchKL
from support.numerics import assert_as_good_as_torch

T, H, V = 11, 7, 13
BOUNDS = [0, 4, 4, 9, 11]  # the second sequence is empty
LABELS = [True, False, False, True]
KL = [3.0, -1.0, 2.5]  # mean 1.5


def batch(dtype=torch.float32, *, seed=0):
    """Policy and reference model with heads and biases of their own, two tokens that do not count."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    targets = torch.randint(0, V, (T,), generator=generator)
    targets[2] = targets[7] = -100
    return {
        "hidden": randn(T, H),
        "weight": randn(V, H),
        "bias": randn(V),
        "ref_hidden": randn(T, H + 1),
        "ref_weight": randn(V, H + 1),
        "ref_bias": randn(V),
        "targets": targets,
        "cu_seqlens": tensor(BOUNDS),
        "labels": tensor(LABELS),
    }


def all_logits_logps(hidden, weight, bias, targets, *, scale=1.0, softcap=None, temperature=1.0):
    """(B,) sums of log-probabilities, and (B,) sums of entropies, in the operands' precision."""
    z = scale * (hidden @ weight.T + bias)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    log_p = z - z.exp().sum(1, keepdim=True).log()
    counts = targets >= 0
    logp = torch.where(counts, log_p[torch.arange(T), targets.clamp(min=0)], 0)
    entropy = torch.where(counts, -(log_p.exp() * log_p).sum(1), 0)
    sums = [[token[begin:end].sum() for begin, end in itertools.pairwise(BOUNDS)] for token in (logp, entropy)]
    return torch.stack(sums[0]), torch.stack(sums[1])


def plain(inputs, dtype, z0, *, beta=0.3, desirable=1.25, undesirable=0.5, **head):
    """The step in plain torch, in ``dtype``: per-row losses, logps, ref_logps, entropy sums."""
    x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    logps, entropy = all_logits_logps(x["hidden"], x["weight"], x["bias"], x["targets"], **head)
    ref_logps, _ = all_logits_logps(x["ref_hidden"], x["ref_weight"], x["ref_bias"], x["targets"], **head)
    s = torch.where(x["labels"], 1.0, -1.0).to(dtype)
    weights = torch.where(x["labels"], desirable, undesirable).to(dtype)
    u = s * beta * (logps - ref_logps - z0)
    return weights * (1 - 1 / (1 + torch.exp(-u))), logps, ref_logps, entropy


def leaves(inputs, names):
    """A copy of ``inputs`` in which ``names`` require gradients."""
    return {k: v.clone().requires_grad_() if k in names else v for k, v in inputs.items()}


HEADS = {
    "plain": {},
    "softcap": {"logit_scale": 0.7, "softcap": 2.0, "temperature": 1.3},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids=str)
@pytest.mark.parametrize("method", ["kto", "apo_zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradients(dtype, method, trained, head):
    module = FusedLinearKTOLoss(beta=0.3, method=method, desirable_weight=1.25, undesirable_weight=0.5, **HEADS[head])
    kl = {"kl_log_ratio": tensor(KL)} if method == "kto" else {}
    ours = leaves(batch(dtype), trained)
    loss, metrics = module(**ours, **kl)
    loss.backward()

    settings = {"scale" if k == "logit_scale" else k: v for k, v in HEADS[head].items()}
    results = {}
    for precision in (torch.float32, torch.float64):
        inputs = leaves(batch(dtype), trained)
        rows = plain(inputs, precision, 1.5 if method == "kto" else 0.0, **settings)
        rows[0].mean().backward()
        results[precision] = (rows, {name: inputs[name].grad for name in trained})
    (baseline, baseline_grads), (exact, exact_grads) = results.values()

    assert_as_good_as_torch("loss", loss, baseline[0].mean(), exact[0].mean())
    for name, i in {"losses": 0, "logps": 1, "ref_logps": 2}.items():
        assert_as_good_as_torch(name, getattr(metrics, name), baseline[i], exact[i])
    for name in trained:
        assert ours[name].grad.dtype == dtype
        assert_as_good_as_torch(f"d{name}", ours[name].grad, baseline_grads[name], exact_grads[name].double())


def test_metrics():
    outputs = ("entropy", "mean_logit", "is_top1")
    inputs = leaves(batch(), ("hidden", "weight"))
    z0 = tensor(1.5)
    module = FusedLinearKTOLoss(beta=0.3, outputs=outputs)
    loss, metrics = module(**inputs, reference_point=z0)
    assert isinstance(metrics, KTOMetrics)
    tensors = vars(metrics)
    assert not any(value.requires_grad for value in tensors.values())
    for name in ("losses", "logps", "ref_logps", "log_ratios", "rewards"):
        assert tensors[name].shape == (4,) and tensors[name].dtype == torch.float32, name
    assert torch.equal(loss.detach(), metrics.losses.mean())
    assert torch.equal(metrics.log_ratios, metrics.logps - metrics.ref_logps)
    torch.testing.assert_close(metrics.rewards, 0.3 * metrics.log_ratios, rtol=2**-23, atol=0)  # an fp32 ulp
    assert torch.equal(metrics.labels, tensor(LABELS))
    assert metrics.reference_point.item() == 1.5
    assert metrics.token_count.item() == T - 2

    baseline, exact = (plain(batch(), dtype, 1.5)[3] for dtype in (torch.float32, torch.float64))
    assert_as_good_as_torch("entropy", metrics.entropy_sum, baseline, exact)
    counts, per_sequence = inputs["targets"] >= 0, {}
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias = (batch()[name].to(dtype) for name in ("hidden", "weight", "bias"))
        z = hidden @ weight.T + bias  # (T, V)
        mean_logit = torch.where(counts, z.mean(1), 0)
        is_top1 = counts & (z.argmax(1) == inputs["targets"])
        per_sequence[dtype] = [
            torch.stack([token[begin:end].sum() for begin, end in itertools.pairwise(BOUNDS)])
            for token in (mean_logit, is_top1)
        ]
    (baseline, _), (exact, top1) = per_sequence.values()
    assert_as_good_as_torch("mean_logit", metrics.mean_logit_sum, baseline, exact)
    assert metrics.is_top1_sum.tolist() == top1.tolist()


def test_outputs_not_requested_are_none():
    _, metrics = FusedLinearKTOLoss(beta=0.3)(**batch(), reference_point=tensor(0.0))
    assert metrics.entropy_sum is None
    assert metrics.mean_logit_sum is None
    assert metrics.is_top1_sum is None


def test_reductions():
    inputs = leaves(batch(), ("hidden",))
    value = {}
    for reduction in ("mean", "sum", "none"):
        module = FusedLinearKTOLoss(beta=0.3, reduction=reduction)
        value[reduction], metrics = module(**inputs, reference_point=tensor(0.5))
    assert value["none"].requires_grad
    assert torch.equal(value["none"], metrics.losses)
    assert torch.equal(value["sum"], value["none"].sum())
    assert torch.equal(value["mean"], value["none"].mean())


def without(inputs, *names):
    return {k: v for k, v in inputs.items() if k not in names}


def test_precomputed_ref_logps_give_the_same_step():
    module = FusedLinearKTOLoss(beta=0.3)
    inputs = batch()
    loss, metrics = module(**inputs, reference_point=tensor(0.5))
    cached, cached_metrics = module(
        **without(inputs, "ref_hidden", "ref_weight", "ref_bias"),
        ref_logps=metrics.ref_logps.double().requires_grad_(),
        reference_point=tensor(0.5),
    )
    assert torch.equal(loss, cached)
    assert not cached_metrics.ref_logps.requires_grad


def test_the_reference_model_gets_no_gradient():
    inputs = leaves(batch(), ("hidden", "ref_hidden", "ref_weight", "ref_bias"))
    loss, _ = FusedLinearKTOLoss(beta=0.3)(**inputs, reference_point=tensor(0.5))
    loss.backward()
    assert inputs["hidden"].grad is not None
    assert all(inputs[name].grad is None for name in ("ref_hidden", "ref_weight", "ref_bias"))


def test_the_reference_pass_records_no_graph(monkeypatch):
    recording = []

    def spy(*args, **kwargs):
        recording.append(torch.is_grad_enabled())
        return linear_logprob(*args, **kwargs)

    monkeypatch.setattr(sharded_head, "linear_logprob", spy)
    inputs = leaves(batch(), ("hidden", "ref_hidden"))
    FusedLinearKTOLoss(beta=0.3)(**inputs, reference_point=tensor(0.5))
    assert recording == [False, True]  # reference model, policy


def test_a_frozen_head_may_be_shared_with_the_reference_model():
    inputs = leaves(batch(), ("hidden",))
    inputs["ref_hidden"] = inputs["ref_hidden"][:, :H]
    own = {"ref_weight": inputs["weight"], "ref_bias": inputs["bias"]}
    module = FusedLinearKTOLoss(beta=0.3)
    shared, _ = module(**without(inputs, "ref_weight", "ref_bias"), reference_point=tensor(0.5))
    spelled_out, _ = module(**(inputs | own), reference_point=tensor(0.5))
    assert torch.equal(shared, spelled_out)


def test_kl_log_ratio_is_the_estimators_clamped_mean():
    inputs, module = batch(), FusedLinearKTOLoss(beta=0.3)
    for log_ratios in (tensor(KL), tensor([-4.0, 1.0]), torch.zeros(0)):
        z0 = MicrobatchKL().estimate(log_ratios)
        given, _ = module(**inputs, reference_point=z0)
        taken, metrics = module(**inputs, kl_log_ratio=log_ratios.requires_grad_())
        assert torch.equal(given, taken)
        assert torch.equal(metrics.reference_point, z0)
        assert not metrics.reference_point.requires_grad


def test_no_token_counts():
    inputs = leaves(batch(), ("hidden",))
    inputs["targets"] = torch.full((T,), -100)
    loss, metrics = FusedLinearKTOLoss(beta=0.3)(**inputs, reference_point=tensor(0.0))
    loss.backward()
    assert metrics.losses.tolist() == [0.5] * 4
    assert metrics.token_count.item() == 0
    assert torch.equal(inputs["hidden"].grad, torch.zeros(T, H))


def test_runs_repeat_bit_for_bit():
    def step():
        inputs = leaves(batch(), ("hidden", "weight"))
        loss, _ = FusedLinearKTOLoss(beta=0.3)(**inputs, reference_point=tensor(0.5))
        loss.backward()
        return loss.detach(), inputs["hidden"].grad, inputs["weight"].grad

    first = step()
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_compiles_without_a_graph_break():
    module = FusedLinearKTOLoss(beta=0.3, backend="reference")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (module, compiled):
        inputs = leaves(batch(), ("hidden",))
        loss, _ = run(**inputs, kl_log_ratio=tensor(KL))
        loss.backward()
        gradients.append((loss.detach(), inputs["hidden"].grad))
    for eager, traced in zip(*gradients, strict=True):
        assert torch.equal(eager, traced)


def bad(message, error=ValueError, **change):
    return pytest.param(change, error, message, id=message.split(";")[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        bad("cu_seqlens has dtype torch.float32", TypeError, cu_seqlens=tensor([0.0, 11.0])),
        bad("cu_seqlens has shape (1,); expected (B + 1,)", cu_seqlens=tensor([0])),
        bad("cu_seqlens has shape (1, 5); expected (B + 1,)", cu_seqlens=tensor([BOUNDS])),
        bad("cu_seqlens is a list; expected a tensor", TypeError, cu_seqlens=BOUNDS),
        bad("cu_seqlens is on meta; expected cpu", cu_seqlens=tensor(BOUNDS, device="meta")),
        bad("cu_seqlens runs from 0 to 10; expected from 0 to T = 11", cu_seqlens=tensor([0, 10])),
        bad("cu_seqlens runs from 1 to 11; expected from 0 to T = 11", cu_seqlens=tensor([1, 11])),
        bad(
            "cu_seqlens[2] is 3, below cu_seqlens[1] = 4; expected non-decreasing",
            cu_seqlens=tensor([0, 4, 3, 9, 11]),
        ),
        bad("labels has shape (3,); expected (4,)", labels=tensor(LABELS[:3])),
        bad("labels has dtype torch.int64", TypeError, labels=tensor(LABELS).long()),
        bad("targets has shape (11, 1); expected (n,)", targets=torch.zeros(T, 1).long()),
        bad("both given; expected exactly one of ref_logps", ref_logps=torch.zeros(4)),
        bad("neither given; expected exactly one of ref_logps", ref_hidden=None),
        bad("ref_hidden has shape (10, 8); expected (11, 8)", ref_hidden=torch.zeros(10, 8)),
        bad("ref_weight has shape (12, 8); expected (13, 8)", ref_weight=torch.zeros(12, 8)),
        bad("ref_bias is given without ref_weight; expected both", ref_weight=None),
        bad(
            "ref_weight is None while the policy's head is trained",
            weight=torch.zeros(V, H, requires_grad=True),
            ref_weight=None,
            ref_bias=None,
        ),
        bad("ref_weight is given with ref_logps", ref_logps=torch.zeros(4), ref_hidden=None),
        bad("neither given; expected exactly one of reference_point", reference_point=None),
        bad("reference_point and kl_log_ratio given; expected", kl_log_ratio=torch.zeros(2)),
        bad("reference_point has shape (4,); expected a 0-dim", reference_point=torch.zeros(4)),
        bad("reference_point is a float; expected a 0-dim tensor", reference_point=0.5),
        bad("kl_log_ratio has shape (); expected (n,)", reference_point=None, kl_log_ratio=tensor(1.0)),
    ],
)  # fmt: skip
def test_invalid_arguments(change, error, message):
    arguments = batch() | {"reference_point": tensor(0.0)} | change
    with pytest.raises(error) as caught:
        FusedLinearKTOLoss(beta=0.3)(**arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ["reference_point", "kl_log_ratio"])
def test_apo_zero_refuses_a_reference_point(name):
    with pytest.raises(ValueError, match=f"^{name} is given; expected none"):
        FusedLinearKTOLoss(beta=0.3, method="apo_zero")(**batch(), **{name: tensor([0.0])})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "^beta is 0.0; expected a finite number above 0"),
        ({"method": "apo"}, r"^method is 'apo'; expected one of \('kto', 'apo_zero'\)"),
        ({"reduction": "avg"}, r"^reduction is 'avg'; expected one of \('mean', 'sum', 'none'\)"),
        ({"desirable_weight": -1.0}, "^desirable_weight is -1.0; expected a finite number, 0"),
    ],
)
def test_invalid_settings_raise_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearKTOLoss(**({"beta": 0.1} | settings))
