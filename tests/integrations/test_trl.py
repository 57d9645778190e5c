"""Patched TRL trainers log the same values, and undo restores TRL's function."""

import copy
import os
from pathlib import Path

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL's trainers ping a server when they are built, unless this is set

import pytest
import torch
import trl
import trl.trainer.utils as utils
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from trl.kernels import ChunkedLogProbFunction

from prefopt_kernels.integrations import trl as ours
from support.tiny_models import ROWS, make_dataset
from support.trainer import COMMON, gradients_of_first_step, make_world, steps_of
from support.trl_patch import unpatched

__all__ = ["unpatched"]  # a fixture of every test here

OPTIONS = COMMON | {"max_steps": 2}
CONTRACT = 1e-4  # nats of a log-probability, and what is logged of them


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
