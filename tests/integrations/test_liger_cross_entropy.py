"""The cross-entropy with Liger's name against torch's definition, then against Liger's own kernel."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as TheirCrossEntropy

import prefopt_kernels.integrations.liger as ours
from support.liger_batch import B, Batch, L, V, assert_agree


def test_cross_entropy_has_ligers_arguments_and_defaults():
    for method in ("__init__", "forward"):
        mine, other = (
            [(p.name, p.default) for p in inspect.signature(getattr(c, method)).parameters.values()]
            for c in (ours.LigerFusedLinearCrossEntropyLoss, TheirCrossEntropy)
        )
        assert mine == other, method


def cross_entropy(x, ce_weight=None, **options):
    module = ours.LigerFusedLinearCrossEntropyLoss(ce_weight, **options)
    return module(x.weight, x.input.flatten(0, 1), x.target.flatten(), x.bias)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_equals_torch(reduction, weighted, smoothing, bias):
    ce_weight = torch.linspace(0.2, 2.0, V) if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    mine, other = Batch(bias=bias), Batch(bias=bias)
    loss = cross_entropy(mine, ce_weight, **options)
    logits = other.input.flatten(0, 1) @ other.weight.T + (other.bias if bias else 0.0)
    expected = F.cross_entropy(logits, other.target.flatten(), ce_weight, **options)
    assert_agree(loss, expected, "loss")
    upstream = torch.linspace(-1.0, 2.0, B * L).reshape(expected.shape if expected.ndim else B * L)
    for value in (loss, expected):
        (value * (upstream if value.ndim else 3.0)).sum().backward()
    for key, gradient in mine.gradients().items():
        assert_agree(gradient, other.gradients()[key], f"gradient of {key}")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_z_loss_token_scaling_and_accuracy(softcap, scaling, weighted):
    ce_weight = torch.linspace(0.2, 2.0, V) if weighted else None
    mine, other = Batch(), Batch()
    for x in (mine, other):
        x.target[0, :4] = (x.input[0] @ x.weight.T + x.bias).argmax(-1)[:4]
    out = cross_entropy(
        mine,
        ce_weight,
        lse_square_scale=1e-2,
        softcap=softcap,
        return_z_loss=True,
        return_token_accuracy=True,
        use_token_scaling=scaling,
    )
    logits = other.input.flatten(0, 1) @ other.weight.T + other.bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    target = other.target.flatten()
    counts = target != -100
    number = counts.sum()
    losses = F.cross_entropy(logits, target, ce_weight, reduction="none")
    weights = ce_weight[target[counts]].sum() if weighted else number
    z_losses = torch.where(counts, 1e-2 * logits.logsumexp(-1).square(), 0.0)
    if scaling:
        p = (-F.cross_entropy(logits, target, reduction="none")).exp().detach()
        losses, z_losses = p * losses, p * z_losses
    loss = losses.sum() / weights + z_losses.sum() / number
    assert_agree(out.loss, loss, "loss")
    assert_agree(out.z_loss, z_losses.detach().sum() / number, "z loss")
    assert not out.z_loss.requires_grad and out.predicted_tokens is None
    hits = (logits.argmax(-1) == target)[counts]
    assert 0 < hits.float().mean() < 1
    assert out.token_accuracy == hits.float().mean()
    for value in (out.loss, loss):
        value.backward()
    for key, gradient in mine.gradients().items():
        assert_agree(gradient, other.gradients()[key], f"gradient of {key}")


def test_cross_entropy_without_scored_tokens_is_0():
    x = Batch()
    x.target[:] = -100
    for reduction in ("mean", "sum"):
        for ce_weight in (None, torch.ones(V)):
            assert cross_entropy(x, ce_weight, reduction=reduction) == 0


def test_custom_ignore_index():
    x, y = Batch(), Batch()
    y.target[y.target == -100] = V + 3
    for ce_weight in (None, torch.linspace(0.2, 2.0, V)):
        first, second = (
            cross_entropy(x, ce_weight),
            cross_entropy(y, ce_weight, ignore_index=V + 3),
        )
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cross_entropy(x, reduction="average"), "reduction is 'average'"),
        (lambda x: cross_entropy(x, label_smoothing=1.5), "label_smoothing is 1.5"),
        (lambda x: cross_entropy(x, softcap=0.0), "softcap is 0.0"),
        (lambda x: cross_entropy(x, softcap=5.0, label_smoothing=0.1), "expected one of the two"),
        (lambda x: cross_entropy(x, return_predicted_tokens=True), "return_predicted_tokens"),
        (lambda x: cross_entropy(x, torch.ones(3)), r"ce_weight is torch.float32 of shape \(3,\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(Batch())


# Liger's cross-entropy is a Triton kernel. Triton's interpreter runs it on the CPU, if asked before it is imported; not
# with class weights or a softcap, whose Python floats it does not take.
WITH_LIGER = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
cases, operands = torch.load(sys.argv[1])
found = []
for options in cases:
    x = {name: value.clone().requires_grad_() for name, value in operands.items() if name != "target"}
    out = LigerFusedLinearCrossEntropyLoss(**options)(x["weight"], x["input"], operands["target"], x["bias"])
    loss = getattr(out, "loss", out)
    loss.sum().backward()
    logged = [getattr(out, name, None) for name in ("z_loss", "token_accuracy")]
    logged = [None if value is None else value.detach() for value in logged]
    found.append([loss.detach(), *logged, *(value.grad for value in x.values())])
torch.save(found, sys.argv[2])
"""


def test_cross_entropy_equals_liger(tmp_path):
    everything = {"lse_square_scale": 1e-2, "return_z_loss": True, "return_token_accuracy": True}
    cases = [
        {},
        {"reduction": "none"},
        {"reduction": "sum", "label_smoothing": 0.2},
        {"label_smoothing": 0.2, **everything},
        {"use_token_scaling": True, **everything},
        {"reduction": "none", **everything},
    ]
    x = Batch()
    x.target[0, :4] = (x.input[0] @ x.weight.T + x.bias).argmax(-1)[:4]
    operands = {
        "input": x.input.detach().flatten(0, 1),
        "weight": x.weight.detach(),
        "bias": x.bias.detach(),
        "target": x.target.flatten(),
    }
    torch.save((cases, operands), tmp_path / "cases")
    command = [sys.executable, "-c", WITH_LIGER, tmp_path / "cases", tmp_path / "found"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for options, results in zip(cases, torch.load(tmp_path / "found"), strict=True):
        mine = Batch()
        mine.target = x.target
        out = cross_entropy(mine, **options)
        loss = getattr(out, "loss", out)
        loss.sum().backward()
        logged = [getattr(out, name, None) for name in ("z_loss", "token_accuracy")]
        gradients = mine.gradients()
        gradients["input"] = gradients["input"].flatten(0, 1)
        found = [loss, *logged, *gradients.values()]
        for i, (value, expected) in enumerate(zip(found, results, strict=True)):
            assert (value is None) == (expected is None), (options, i)
            if value is not None:
                assert_agree(value.detach(), expected, f"{options} {i}")
