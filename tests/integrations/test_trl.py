"""Patched TRL trainers log the same values, and undo restores TRL's function."""

import copy
import importlib.metadata
import os
import sys
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL's trainers ping a server when they are built, unless this is set

import pytest
import torch
import trl
import trl.trainer.utils as utils
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import PrinterCallback
from trl.kernels import ChunkedLogProbFunction

from prefopt_kernels.integrations import trl as ours
from support.tiny_models import ROWS, make_dataset
from support.trainer import COMMON, gradients_of_first_step, make_world, steps_of

OPTIONS = COMMON | {"max_steps": 2}
CONTRACT = 1e-4  # nats of a log-probability, and what is logged of them
OWN = (utils._ChunkedLogProbFunction, utils._use_triton)


@pytest.fixture(autouse=True)
def unpatched():
    """TRL has its own two functions before and after each test."""
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == OWN
    yield
    found = (utils._ChunkedLogProbFunction, utils._use_triton)
    utils._ChunkedLogProbFunction, utils._use_triton = OWN
    assert found == OWN


# The trainers


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {}

    def get(arch: str):
        if arch not in made:
            made[arch] = make_world(arch, tmp_path_factory.mktemp(arch))
        return made[arch]

    return get


def pairs() -> Dataset:
    prompts = [{"role": "user", "content": prompt} for prompt, _, _ in ROWS]
    answers = [{"role": "assistant", "content": completion} for _, completion, _ in ROWS]
    rotated = answers[1:] + answers[:1]
    return Dataset.from_list(
        [{"prompt": [p], "chosen": [a], "rejected": [b]} for p, a, b in zip(prompts, answers, rotated, strict=True)]
    )


def chats() -> Dataset:
    return make_dataset(conversational=True).remove_columns("label")


def prompts() -> Dataset:
    return make_dataset(conversational=True).select_columns("prompt")


def reward(completions, **_) -> list[float]:
    return [float(len(completion[0]["content"]) % 7) for completion in completions]


ONLINE = {"max_completion_length": 8, "num_generations": 2, "temperature": 0.9, "beta": 0.05}
CASES = {
    "kto": ("KTO", make_dataset, {}),
    "kto lora": ("KTO", make_dataset, {"lora": True}),
    "kto gemma2": ("KTO", make_dataset, {"arch": "gemma2"}),
    "dpo": ("DPO", pairs, {}),
    "dpo ipo, weighted": ("DPO", pairs, {"loss_type": ["ipo"], "use_weighting": True}),
    "sft": ("SFT", chats, {}),
    "sft dft": ("SFT", chats, {"loss_type": "dft"}),
    "grpo": ("GRPO", prompts, {**ONLINE, "num_iterations": 2}),
    "rloo": ("RLOO", prompts, ONLINE),
}


def build(case: str, world, folder: Path):
    name, data, options = CASES[case]
    options = dict(options)
    options.pop("arch", None)
    further, lora = {}, options.pop("lora", False)
    if name in ("GRPO", "RLOO"):
        further["reward_funcs"] = reward
    else:
        options["max_length"] = OPTIONS["max_length"]
    if name in ("KTO", "DPO") and not lora:
        further["ref_model"] = copy.deepcopy(world.ref)
    if lora:
        further["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    config = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        bf16=False,  # TRL turns bf16 autocast on otherwise
        gradient_checkpointing=False,
        **({key: value for key, value in OPTIONS.items() if key != "max_length"} | options),
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=copy.deepcopy(world.model),
        args=config,
        train_dataset=data(True) if data is make_dataset else data(),
        processing_class=world.tokenizer,
        **further,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_patched_trainers_equal_trl(case, worlds, tmp_path, monkeypatch):
    world = worlds(CASES[case][2].get("arch", "qwen3"))
    theirs = build(case, world, tmp_path / "theirs")
    their_gradients = gradients_of_first_step(theirs)

    scored, linear_logprob = [], ours.linear_logprob

    def counted(hidden, *args, **kwargs):
        scored.append(hidden.shape[0])
        return linear_logprob(hidden, *args, **kwargs)

    monkeypatch.setattr(ours, "linear_logprob", counted)
    with ours.patch() as patched:
        mine = build(case, world, tmp_path / "mine")
        gradients = gradients_of_first_step(mine)
    assert patched.calls >= OPTIONS["max_steps"] and patched.passed_on == 0
    assert len(scored) >= patched.calls

    logs, their_logs = steps_of(mine), steps_of(theirs)
    assert len(logs) == len(their_logs) == OPTIONS["max_steps"]
    for step, (found, expected) in enumerate(zip(logs, their_logs, strict=True)):
        assert found.keys() == expected.keys()
        for key in found.keys() - {"step_time"}:
            same = pytest.approx(expected[key], abs=CONTRACT, rel=0, nan_ok=True)
            assert found[key] == same, (step, key)

    assert gradients.keys() == their_gradients.keys()
    assert any("lm_head" in name or "embed" in name for name in gradients) != ("lora" in case)
    for name, gradient in gradients.items():
        error = (gradient - their_gradients[name]).norm()
        assert error <= 1e-5 * their_gradients[name].norm().clamp(min=1e-6), name


def test_only_completion_tokens_are_scored(worlds, tmp_path, monkeypatch):
    """On the CPU TRL also scores prompt and padding."""
    rows = {"ours": [], "theirs": []}
    linear_logprob, apply = ours.linear_logprob, ChunkedLogProbFunction.apply

    class Counted(ChunkedLogProbFunction):
        @staticmethod
        def apply(hidden, *args):
            rows["theirs"].append(hidden.shape[0])
            return apply(hidden, *args)

    def counted(hidden, *args, **kwargs):
        rows["ours"].append(hidden.shape[0])
        return linear_logprob(hidden, *args, **kwargs)

    model = copy.deepcopy(worlds("qwen3").model)
    utils.add_fused_lm_head(model)
    labels = torch.full((2, 9), -100)
    labels[0, 5:], labels[1, 7:8] = 7, 8
    ids = torch.arange(18).view(2, 9) + 20
    monkeypatch.setattr(ours, "linear_logprob", counted)
    with ours.patch():
        found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counted)
    expected = model(input_ids=ids, labels=labels, fused_lm_head=True)
    monkeypatch.undo()
    assert rows == {"ours": [5], "theirs": [16]}
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)

    with ours.patch():  # and none at all: the loss is 0, and stays connected
        nothing = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
        nothing.loss.backward()
    assert nothing.loss == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


# One call


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


# Patching


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


def test_all_users_of_the_function_in_trl_are_documented():
    """The function has one user, and the trainers that score through it are the ones in the documentation."""
    root = Path(trl.__file__).parent
    sources = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    assert {name for name, text in sources.items() if "ChunkedLogProbFunction" in text} == {
        "kernels/__init__.py",
        "kernels/chunked_logprob.py",
        "trainer/utils.py",
    }
    users = {Path(name).stem for name, text in sources.items() if "fused_lm_head=True" in text}
    assert users - {"utils"} == {f"{name}_trainer" for name in ("async_grpo", "dpo", "grpo", "kto", "rloo", "sft")}
