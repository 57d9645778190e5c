"""The fused subclass of TRL's KTO trainer against TRL's own.

Runs against the installed TRL, 1.16.0, whose trainer has the same methods. With 1.9.0 before it on the path, which is
what Axolotl pins, the same tests run against that one; there TRL's own trainer fails at prompt tuning.
"""

import copy
import importlib.metadata
import os
from pathlib import Path

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL's trainers ping a server when they are built, unless this is set

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, PrinterCallback, Qwen3MoeConfig
from trl import KTOConfig, KTOTrainer

from prefopt_kernels.integrations.transformers import LMHead
from prefopt_kernels.integrations.trl import kto as trl_kto
from prefopt_kernels.integrations.trl.kto import fused_kto_trainer
from support.tiny_models import make_dataset
from support.trainer import (
    COMMON,
    World,
    gradients_of_first_step,
    make_world,
    noisy_copy,
    steps_of,
    train,
)

OPTIONS = COMMON | {"max_steps": 2}
TOLERANCES = {"loss": 1e-5}  # the contract: 1e-5 on the loss,
OTHERS = 1e-4  # 1e-4 on sums of log-probabilities and on what is made of them
ON_BLOCKS = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def make_moe(folder: Path, tokenizer) -> torch.nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3, "vocab_size": len(tokenizer)}
    config = Qwen3MoeConfig(router_aux_loss_coef=0.5, **experts, **sizes, **heads, **tokens)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """By architecture; the noisy model is the policy, because then the KL estimate is above 0."""
    made = {}

    def get(arch: str) -> World:
        if arch not in made:
            folder = tmp_path_factory.mktemp(arch)
            world = make_world("qwen3" if arch == "moe" else arch, folder)
            if arch == "moe":
                model = make_moe(folder / "moe", world.tokenizer)
                world = world._replace(model=model, ref=noisy_copy(model, 0.02))
            made[arch] = world._replace(model=world.ref, ref=world.model)
        return made[arch]

    return get


def make(cls, world: World, folder: Path, *, peft_config=None, **options):
    settings = {"per_device_train_batch_size": 4} | OPTIONS | options
    torch.manual_seed(7)  # TRL 1.9 does not, before it makes the adapter
    trainer = cls(
        model=copy.deepcopy(world.model),
        ref_model=None if peft_config else copy.deepcopy(world.ref),
        args=KTOConfig(
            output_dir=str(folder),
            **({"bf16": False, "gradient_checkpointing": False} | settings),
        ),
        train_dataset=make_dataset(conversational=True),
        eval_dataset=make_dataset(conversational=True).select(range(6)),
        processing_class=world.tokenizer,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


CASES = {
    "full": {},
    "lora": {"peft_config": LoraConfig(**ON_BLOCKS), "gradient_checkpointing": True},
    "prompt tuning": {"peft_config": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")},
    "tied, with a softcap": {"arch": "gemma2"},
    "precomputed": {"precompute_ref_log_probs": True},
    "apo_zero": {"loss_type": "apo_zero_unpaired"},
    "weights, two micro-batches": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "desirable_weight": 0.7,
        "undesirable_weight": 1.9,
    },
    "experts": {"arch": "moe"},
}


@pytest.mark.parametrize("case", CASES)
def test_logs_and_gradients_equal_trl(case, worlds, tmp_path):
    options = dict(CASES[case])
    world = worlds(options.pop("arch", "qwen3"))
    found = {}
    for name, cls in {"theirs": KTOTrainer, "mine": fused_kto_trainer(KTOTrainer)}.items():
        trainer = make(cls, world, tmp_path / name, **options)
        gradients = gradients_of_first_step(trainer)
        found[name] = (gradients, [*steps_of(trainer), trainer.evaluate()])
    (gradients, logs), (their_gradients, their_logs) = found["mine"], found["theirs"]

    assert len(logs) == len(their_logs) == OPTIONS["max_steps"] + 1
    for step, (mine, theirs) in enumerate(zip(logs, their_logs, strict=True)):
        assert mine.keys() == theirs.keys()
        for key in mine:
            if "runtime" not in key and "per_second" not in key:
                allowed = TOLERANCES.get(key.removeprefix("eval_"), OTHERS)
                assert mine[key] == pytest.approx(theirs[key], abs=allowed, rel=0), (step, key)
    assert case in ("apo_zero", "prompt tuning") or any(entry["kl"] > 1e-2 for entry in logs[:-1])
    assert case != "experts" or logs[0]["aux_loss"] > 0
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        error = (gradient - their_gradients[name]).norm()
        assert error <= 1e-5 * their_gradients[name].norm().clamp(min=1e-6), name


def test_the_model_never_builds_logits(worlds, tmp_path):
    trainer = make(fused_kto_trainer(KTOTrainer), worlds("qwen3"), tmp_path)
    positions = []
    for model in (trainer.model, trainer.ref_model):
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda _module, _args, out: positions.append(out.shape[1]))
    train(trainer)
    trainer.evaluate()
    # policy and reference on matched and on mismatched completions, in each batch
    assert len(positions) == 4 * (OPTIONS["max_steps"] + 1) and set(positions) == {0}


def test_requested_logits_come_from_trl(worlds, tmp_path):
    trainer = make(fused_kto_trainer(KTOTrainer), worlds("qwen3"), tmp_path)
    batch = next(iter(trainer.get_eval_dataloader()))
    loss, logits, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    fused, _, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    assert logits is None or logits.shape[-1] == trainer.model.config.vocab_size
    torch.testing.assert_close(loss, fused, rtol=0, atol=1e-5)


def test_the_backend_is_used(worlds, tmp_path, monkeypatch):
    seen, score = [], LMHead.score

    def counted(self, *args, **kwargs):
        seen.append(kwargs["backend"])
        return score(self, *args, **kwargs)

    monkeypatch.setattr(LMHead, "score", counted)
    cls = fused_kto_trainer(KTOTrainer, backend="reference")
    assert cls.__name__ == "FusedKTOTrainer" and issubclass(cls, KTOTrainer)
    train(make(cls, worlds("qwen3"), tmp_path, max_steps=1))
    assert seen == ["reference"] * 4


def test_refusals(worlds, tmp_path, monkeypatch):
    cls = fused_kto_trainer(KTOTrainer)
    with pytest.raises(ValueError, match=r"loss_type is 'bco'; expected one of \('kto', 'apo_zero"):
        make(cls, worlds("qwen3"), tmp_path, loss_type="bco")
    with monkeypatch.context() as m, pytest.raises(ValueError, match="ZeRO-3 has partitioned the"):
        m.setattr(torch.nn.Parameter, "ds_id", 0, raising=False)  # as ZeRO-3 marks them
        make(cls, worlds("qwen3"), tmp_path)
    for version in ("0.29.1", "1.10.0", "1.17.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, v=version: v)
        with pytest.raises(RuntimeError, match=f"TRL is {version}; tested with 1.9 and 1.16"):
            fused_kto_trainer(KTOTrainer)


def test_missing_trl(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert trl_kto.why_not() == "TRL is not installed"
