"""The trainer's everyday: gradient checkpointing, bf16 autocast, evaluation, saving."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from prefopt.train.prepare import pad_token_id
from support.tiny_models import make_dataset, make_rows
from support.trainer import data_for, gradients_of_first_step, make_trainer, make_world, train

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("qwen3"))


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)


@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing_changes_memory_and_nothing_else(world, tmp_path, adapter):
    found = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            world,
            tmp_path,
            ref=not adapter,
            peft_config=lora() if adapter else None,
            activation_checkpointing=checkpointing,
            per_device_train_batch_size=4,
            max_steps=1,
        )
        runs = 0

        def count(*args):
            nonlocal runs
            runs += 1

        layer = next(m for m in trainer.model.modules() if type(m).__name__ == "Qwen3DecoderLayer")
        layer.self_attn.register_forward_hook(count)
        found.append((gradients_of_first_step(trainer), runs))
    (plain, runs), (checkpointed, more_runs) = found
    assert more_runs == runs + 1  # the layer ran again in the backward pass
    assert set(plain) == set(checkpointed)
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


@pytest.mark.parametrize("adapter", [False, True])
def test_bf16_autocast_trains_in_bf16_and_scores_in_fp32(world, tmp_path, adapter):
    def run(bf16: bool):
        trainer = make_trainer(
            world,
            tmp_path,
            ref=not adapter,
            peft_config=lora() if adapter else None,
            bf16=bf16,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        )
        dtypes, losses = set(), trainer.objective.losses
        trainer.objective.losses = lambda rows, baselines: (
            dtypes.update((rows.logps.dtype, rows.ref_logps.dtype)) or losses(rows, baselines)
        )
        return train(trainer), dtypes, trainer

    exact, dtypes, _ = run(bf16=False)
    rounded, same_dtypes, trainer = run(bf16=True)
    assert dtypes == same_dtypes == {torch.float32}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    eps = torch.finfo(torch.bfloat16).eps
    for mine, other in zip(rounded, exact, strict=True):
        for key in ("logps/chosen", "logps/rejected"):
            assert mine[key] != other[key]  # autocast was on
            assert mine[key] == pytest.approx(other[key], rel=4 * eps)
    # the gradient of bf16 is that of fp32 but for rounding, so nothing was cut off from it
    assert rounded[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=32 * eps)


def test_autocast_under_no_grad_leaves_no_weight_without_gradient(world, tmp_path):
    """The reference and the mismatched rows run first, without gradient, on the same weights."""
    found = gradients_of_first_step(
        make_trainer(world, tmp_path, bf16=True, per_device_train_batch_size=4, max_steps=1)
    )
    trained = dict(world.model.named_parameters())
    assert set(found) == set(trained)
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_evaluation_weighs_every_row_the_same(world, tmp_path):
    """20 rows in batches of 8, 8 and 4 against one batch of all."""
    options = {"eval_dataset": make_dataset(True), "method": "apo_zero"}
    parts = make_trainer(world, tmp_path, per_device_eval_batch_size=8, **options).evaluate()
    whole = make_trainer(world, tmp_path, per_device_eval_batch_size=20, **options).evaluate()
    for key in ("loss", "entropy", "logits/chosen", "logps/rejected", "rewards/margins"):
        value = whole[f"eval_{key}"]
        assert parts[f"eval_{key}"] == pytest.approx(value, rel=100 * EPS, abs=200 * EPS), key


def test_evaluation_neither_trains_nor_counts(world, tmp_path):
    def run(**options):
        trainer = make_trainer(
            world,
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=2,
            max_steps=4,
            **options,
        )
        return train(trainer), trainer.mismatched.estimator.value

    quiet, value = run()
    watched, same = run(eval_dataset=make_dataset(True), eval_strategy="steps", eval_steps=1)
    assert watched == quiet and torch.equal(value, same)


def test_several_evaluation_sets_and_rows_given_later(world, tmp_path):
    halves = {"first": make_rows(True)[:10], "second": make_rows(True)[10:]}
    trainer = make_trainer(world, tmp_path, eval_dataset=halves, method="apo_zero")
    metrics = trainer.evaluate()
    later = trainer.evaluate(halves["second"], metric_key_prefix="test")
    assert metrics["eval_second_loss"] == later["test_loss"]
    assert metrics["eval_first_logps/chosen"] != metrics["eval_second_logps/chosen"]


@pytest.mark.parametrize("adapter", [False, True])
def test_what_is_saved_is_what_was_trained(world, tmp_path, adapter):
    trainer = make_trainer(
        world,
        tmp_path,
        ref=False,
        peft_config=lora() if adapter else None,
        per_device_train_batch_size=4,
    )
    train(trainer)
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "README.md").write_text("my own words\n", encoding="utf-8")
    trainer.save_model(str(folder))
    assert (folder / "README.md").read_text(encoding="utf-8") == "my own words\n"
    assert list(folder.glob("*.safetensors")) and not list(folder.glob("*.pt"))
    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    if adapter:  # the base was loaded from the world's folder, which its name says
        assert trainer.model.peft_config["default"].base_model_name_or_path
    loaded = kind.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["kto", "dpo"])
def test_an_adapter_on_the_head_is_trained_and_the_reference_has_none(world, tmp_path, method):
    head = LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    options = {"per_device_train_batch_size": 4, "method": method, "data": data_for(method, 20)}
    trainer = make_trainer(world, tmp_path, ref=False, peft_config=head, **options)
    found = gradients_of_first_step(trainer)
    assert found["base_model.model.lm_head.lora_B.default.weight"].abs().max() > 0
    first, *_, last = trainer.state.log_history[:-1]
    assert first["rewards/margins"] == 0.0 != last["rewards/margins"]  # B is 0 at the start
    state = trainer.model.state_dict()
    assert torch.equal(state["base_model.model.lm_head.base_layer.weight"], world.model.lm_head.weight)


def test_dropout_stays_where_it_is_asked_for(world, tmp_path):
    adapter = LoraConfig(target_modules=["q_proj"], lora_dropout=0.4)

    def rates(**options):
        trainer = make_trainer(world, tmp_path, ref=False, peft_config=adapter, **options)
        return {m.p for m in trainer.model.modules() if isinstance(m, nn.Dropout)}

    assert rates() == {0.0}
    assert rates(disable_dropout=False) == {0.4}


def test_rows_are_padded_with_the_tokenizers_id_or_the_end_of_sequence(world):
    assert pad_token_id(world.tokenizer, world.model) == world.tokenizer.pad_token_id
    without = copy.deepcopy(world.tokenizer)
    without.pad_token = None
    assert pad_token_id(without, world.model) == world.tokenizer.eos_token_id
