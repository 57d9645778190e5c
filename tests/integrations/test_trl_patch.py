"""One call of the function that replaces TRL's, and when the patch is applied, refused and undone."""

import importlib.metadata
import os
import sys
from types import ModuleType

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL's trainers ping a server when they are built, unless this is set

import pytest
import torch
import trl.trainer.utils as utils
from torch import nn
from trl.kernels import ChunkedLogProbFunction

from prefopt_kernels.integrations import trl as ours
from support.trl_patch import unpatched

__all__ = ["unpatched"]  # a fixture of every test here

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def operands(bias: bool, frozen: bool = False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 24, generator=generator).to(dtype).requires_grad_(not frozen)
    offset = torch.randn(50, generator=generator).to(dtype).requires_grad_(not frozen)
    targets = (hidden @ weight.T).argmax(-1)  # half of them the most likely token
    targets[::2] = torch.arange(20)
    return hidden, weight, offset if bias else None, targets


@pytest.mark.parametrize("outputs", [(), OUTPUTS, ("log_probs", "entropy")])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_a_call_has_the_results_of_trls_function(outputs, softcap, bias):
    results = []
    with ours.patch() as patched:
        for function in (utils._ChunkedLogProbFunction, ChunkedLogProbFunction):
            hidden, weight, offset, targets = operands(bias)
            out = function.apply(hidden, weight, offset, targets, 0.7, 16, softcap, 0.5, outputs)
            upstream = torch.linspace(-1, 2, 40)
            loss = (upstream * out[0]).sum() + (0 if out[1] is None else (out[1] ** 2).sum())
            loss.backward()
            results.append((out, [x.grad for x in (hidden, weight, offset) if x is not None]))
    assert patched.calls == 1
    (found, gradients), (expected, their_gradients) = results
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype and mine.requires_grad == theirs.requires_grad
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, their_gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_head_follows_the_hidden_states_dtype():
    """GRPO with cast_lm_head_to_fp32, and QLoRA, whose norms give fp32 hidden states to a bf16 head."""
    hidden, weight, bias, targets = operands(True)
    low = weight.detach().bfloat16().requires_grad_(), bias.detach().bfloat16().requires_grad_()
    with ours.patch():
        out = utils._ChunkedLogProbFunction.apply(hidden, *low, targets, 1.0, 16, None, 1.0, ())
    expected = ChunkedLogProbFunction.apply(hidden, *low, targets, 1.0, 16, None, 1.0, ())
    torch.testing.assert_close(out[0], expected[0], rtol=1e-5, atol=1e-5)
    out[0].sum().backward()
    assert [x.grad.dtype for x in (hidden, *low)] == [torch.float32] + [torch.bfloat16] * 2


def test_autocast_keeps_fp32_logits():
    hidden, weight, bias, targets = operands(True)
    arguments = (hidden, weight, bias, targets, 1.0, 16, None, 1.0, ())
    rounded = [x.detach().bfloat16().double() for x in (hidden, weight, bias)]
    logits = rounded[0] @ rounded[1].T + rounded[2]
    exact = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    with ours.patch(), torch.autocast("cpu", torch.bfloat16):
        mine = utils._ChunkedLogProbFunction.apply(*arguments)[0]
        theirs = ChunkedLogProbFunction.apply(*arguments)[0]
    mine.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    errors = [(logp.double() - exact).abs().max() for logp in (mine, theirs)]
    assert errors[0] < 1e-5 < errors[1]  # TRL rounds its logits to bf16


def test_a_call_compiles_into_one_graph():
    hidden, weight, bias, targets = operands(True)

    def score(hidden):
        return utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 16, None, 1.0, OUTPUTS)

    with ours.patch():
        compiled = torch.compile(score, backend="eager", fullgraph=True)
        for mine, theirs in zip(compiled(hidden), score(hidden), strict=True):
            assert torch.equal(mine, theirs)


def test_gradients_under_zero_3_are_delegated_to_trl():
    """ZeRO-3 marks parameters with ds_id and gathers them for the forward; TRL's backward gathers them again."""
    hidden, weight, bias, targets = operands(True)
    weight = nn.Parameter(weight.detach())
    weight.ds_id = 0
    arguments = (hidden, weight, bias, targets, 1.0, 16, None, 1.0, ("entropy",))
    with ours.patch() as patched:
        theirs = utils._ChunkedLogProbFunction.apply(*arguments)
        assert (patched.calls, patched.passed_on) == (0, 1)
        with torch.no_grad():
            utils._ChunkedLogProbFunction.apply(*arguments)
        assert (patched.calls, patched.passed_on) == (1, 1)
    assert torch.equal(theirs[0], ChunkedLogProbFunction.apply(*arguments)[0])


def patched() -> bool:
    return isinstance(utils._ChunkedLogProbFunction, ours.FusedHead)


def test_with_block_and_undo():
    with ours.patch():
        assert patched()
    assert not patched()
    with pytest.raises(KeyError), ours.patch():
        raise KeyError
    assert not patched()
    handle = ours.patch()
    assert patched()
    handle.undo()
    assert not patched()
    handle.undo()  # harmless
    with ours.patch():
        handle.undo()  # not its patch
        assert patched()


def test_patching_twice_in_any_order():
    first, second = ours.patch(), ours.patch()
    assert utils._ChunkedLogProbFunction.original is ChunkedLogProbFunction  # not stacked
    first.undo()
    assert patched()
    second.undo()
    assert not patched()
    with ours.patch(backend="reference"), ours.patch() as inner:
        assert utils._ChunkedLogProbFunction.backend == "reference"
        with pytest.raises(ValueError, match="patched already with 'reference'"):
            ours.patch(backend="cpu")
        inner.undo()
        assert patched()


def test_the_backend_is_the_named_one(monkeypatch):
    hidden, weight, bias, targets = operands(True)
    with ours.patch(backend="reference"), monkeypatch.context() as m:
        seen, linear_logprob = [], ours.linear_logprob
        m.setattr(
            ours,
            "linear_logprob",
            lambda *a, **k: seen.append(k["backend"]) or linear_logprob(*a, **k),
        )
        utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 16, None, 1.0, OUTPUTS)
    assert seen == ["reference", "reference"]


def test_a_later_replacement_is_kept(monkeypatch):
    handle = ours.patch()
    with monkeypatch.context() as m:
        m.setattr(utils, "_ChunkedLogProbFunction", int)
        with pytest.raises(RuntimeError, match="no longer this patch; undo the later"):
            handle.undo()
    handle.undo()


def refused(reason: str) -> None:
    assert reason in ours.why_not()
    with pytest.raises(RuntimeError, match="TRL cannot be patched: "):
        ours.patch()
    assert not patched()


@pytest.mark.parametrize("version", ["0.24.0", "1.15.1", "1.17.0", "2.0.0.dev0"])
def test_other_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    refused(f"TRL is {version}; tested with 1.16")


def test_missing_trl(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    refused("TRL is not installed")


@pytest.mark.parametrize("name", ["unsloth", "unsloth_zoo"])
def test_unsloth_is_refused(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    refused(f"{name} is loaded, which rewrites TRL's trainers")


def test_a_foreign_function_is_not_replaced(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(utils, "_ChunkedLogProbFunction", int)
        refused("<class 'int'>, which is not TRL's own")


def test_another_signature_is_refused(monkeypatch):
    def forward(ctx, hidden, weight, targets):
        return hidden

    monkeypatch.setattr(ChunkedLogProbFunction, "forward", staticmethod(forward))
    refused("takes (ctx, hidden, weight, targets); expected (ctx, hidden, weight, bias, targets,")


@pytest.mark.parametrize("name", ["_use_triton", "_ChunkedLogProbFunction"])
def test_a_missing_name_is_refused(name, monkeypatch):
    with monkeypatch.context() as m:
        m.delattr(utils, name)
        assert f"trl.trainer.utils has no {name}" in ours.why_not()
        with pytest.raises(RuntimeError, match="TRL cannot be patched"):
            ours.patch()
