"""Models that the trainer refuses, and that a refusal leaves the caller's models as they were."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from prefopt.data import DataError
from prefopt.errors import UserError
from prefopt.train.prepare import check_separate
from support.tiny_models import make_rows
from support.trainer import make_trainer, make_world, train

LORA = LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, init_lora_weights=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def model(world):
    """With dropout that a trainer would switch off, a hook, and a frozen parameter."""
    model = copy.deepcopy(world.model)
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    model.model.norm.weight.requires_grad_(False)
    model.model.embed_tokens.register_forward_hook(lambda *_: None)
    return model


def state(model: nn.Module) -> dict:
    """Everything that building a trainer changes in a model."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.clone().tolist()) for name, p in model.named_parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [list(module._forward_hooks) for module in model.modules()],
        "dropout": [
            (name, value)
            for module in model.modules()
            for name, value in vars(module).items()
            if "dropout" in name or name == "p"
        ],
        "config": model.config.to_dict(),
        "attributes": sorted(vars(model)),
    }


# ---- a reference that shares memory with what is trained ----


def shared(kind: str, model: nn.Module, other: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A policy and a reference that share what ``kind`` says."""
    if kind == "the same model":
        return model, model
    if kind == "the base of its adapter":
        return get_peft_model(model, LORA), model
    if kind == "a shallow copy":
        return model, copy.copy(model)
    if kind == "the embedding":
        other.model.embed_tokens.weight = model.model.embed_tokens.weight
    if kind == "the head":
        other.lm_head = model.lm_head
    if kind == "a view":
        other.lm_head.weight = nn.Parameter(model.lm_head.weight.detach()[:])
    return model, other


@pytest.mark.parametrize(
    "kind",
    [
        "the same model",
        "the base of its adapter",
        "a shallow copy",
        "the embedding",
        "the head",
        "a view",
    ],
)
def test_a_reference_that_training_would_change_is_refused(world, model, tmp_path, kind):
    policy, reference = shared(kind, model, copy.deepcopy(world.ref))
    before = state(policy), state(reference)
    with pytest.raises(ValueError, match="ref_model .* training changes"):
        make_trainer(world, tmp_path, model=policy, ref=reference)
    assert (state(policy), state(reference)) == before


def test_an_adapter_to_come_must_not_meet_the_references_modules(world, model, tmp_path):
    before = state(model)
    with pytest.raises(ValueError, match="the reference is then the model without its adapter"):
        make_trainer(world, tmp_path, model=model, ref=copy.copy(model), peft_config=LORA)
    assert state(model) == before


def test_frozen_weights_may_be_shared(world, tmp_path):
    """An adapter's base shared with a reference with another head: the same numbers as with a separate reference."""

    def logs(together: bool) -> list[dict]:
        base, reference = copy.deepcopy(world.model), copy.deepcopy(world.model)
        reference.lm_head = copy.deepcopy(world.ref.lm_head)
        policy = get_peft_model(base, LORA)
        if together:
            reference.model.embed_tokens.weight = base.model.embed_tokens.weight
            reference.model.norm = base.model.norm
        return train(make_trainer(world, tmp_path, model=policy, ref=reference, max_steps=2))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        apart = logs(together=False)
        torch.manual_seed(0)
        assert logs(together=True) == apart


def test_weights_without_memory_are_told_apart(world):
    with torch.device("meta"):
        one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    check_separate(one, other, adapted_later=False)
    other.weight = one.weight
    with pytest.raises(ValueError, match="shares the memory of weight with model"):
        check_separate(one, other, adapted_later=False)


# ---- refusals late in the constructor ----


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["whole", "adapter"])
@pytest.mark.parametrize("fault", ["row", "eval_strategy", "head", "ref_path", "frozen"])
def test_a_refusal_leaves_the_models_as_they_were(world, model, tmp_path, fault, peft_config):
    options = {"peft_config": peft_config, "ref": copy.deepcopy(world.ref)}
    error = ValueError
    if fault == "row":
        options["data"], error = [*make_rows(True), {"prompt": "a", "label": True}], DataError
    if fault == "eval_strategy":  # refused by Trainer, with the adapter on
        options["eval_strategy"] = "steps"
    if fault == "head":  # found by a forward pass, after all that changes the model
        forward = model.forward

        def doubled(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

        model.forward = doubled
    if fault == "ref_path":
        options["ref"], error = str(tmp_path / "nowhere"), UserError
    if fault == "frozen":
        model.requires_grad_(False)
        if peft_config is not None:
            options["peft_config"] = LoraConfig(target_modules=["q_proj"], inference_mode=True)
    before = state(model)
    with pytest.raises(error):
        make_trainer(world, tmp_path, model=model, activation_checkpointing=True, **options)
    assert state(model) == before


# ---- the reference from a folder ----


def test_the_reference_is_loaded_from_a_folder_in_the_dtype_of_the_model(world, tmp_path):
    world.ref.save_pretrained(tmp_path / "ref")
    options = {"max_steps": 1, "per_device_train_batch_size": 4}
    expected = train(make_trainer(world, tmp_path, **options))
    assert train(make_trainer(world, tmp_path, ref=str(tmp_path / "ref"), **options)) == expected
    trainer = make_trainer(
        world,
        tmp_path,
        model=copy.deepcopy(world.model).bfloat16(),
        ref=str(tmp_path / "ref"),
    )
    assert {p.dtype for p in trainer.reference.model.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="ref_model: cannot load a causal language model from .*no"):
        make_trainer(world, tmp_path, ref=str(tmp_path / "no"))
    with pytest.raises(TypeError, match="ref_model is a dict; expected a loaded model, or a folder"):
        make_trainer(world, tmp_path, ref={"path": "ref"})


# ---- models that are not causal ----


def test_models_that_are_not_causal_are_refused(world, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = len(world.tokenizer)
    bert = BertLMHeadModel(BertConfig(vocab_size=vocabulary, intermediate_size=32, **sizes))
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal: the logits of a token ch"):
        make_trainer(world, tmp_path, ref=False, model=bert)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        make_trainer(world, tmp_path, ref=False, model=t5)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        make_trainer(world, tmp_path, ref=t5)


# ---- runs that could not end well ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 64, "dataloader_drop_last": True}, "nothing to train on"),
        ({"max_steps": 0, "num_train_epochs": 0}, "expected one of them above 0"),
    ],
)
def test_a_run_without_a_step_is_refused(world, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(world, tmp_path, **options)


def test_the_best_of_several_evaluation_sets_needs_the_name_of_one(world, tmp_path):
    saving = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options = {"load_best_model_at_end": True, "max_steps": 1, **saving}
    sets = {"x": make_rows(True), "y": make_rows(False)}
    with pytest.raises(ValueError, match="such as eval_x_loss, eval_y_loss"):
        make_trainer(world, tmp_path, eval_dataset=sets, **options)
    options |= {"metric_for_best_model": "eval_x_loss"}
    assert make_trainer(world, tmp_path, eval_dataset=sets, **options).eval_dataset.keys() == sets.keys()
