"""What the trainer saves: loaded again it is the model that was trained, or there was a sentence before training."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from prefopt.errors import UserError
from prefopt.runs import find_run, load_model
from support.trained_runs import make_base, make_split_tokenizer
from support.trainer import World, make_trainer, make_world, train

ONE_STEP = {"ref": False, "max_steps": 1, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A world whose model has one matrix for head and embedding."""
    folder = tmp_path_factory.mktemp("tied")
    tokenizer = make_split_tokenizer("gpt-2", folder)
    make_base("qwen2", tokenizer, folder, tie_word_embeddings=True)
    return World(folder, tokenizer, AutoModelForCausalLM.from_pretrained(folder), None)


def assert_same_logits(loaded, trained):
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, trained.eval()(input_ids=ids).logits)


def with_generation_config(world, **values):
    """The world's model, loaded with this generation_config.json; training aligns its tokens with the tokenizer's."""
    folder = world.folder / "model"
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return model


def test_a_temperature_without_sampling_does_not_lose_the_run(world, tmp_path, caplog):
    """Published generation configs have one, and transformers refuses to save it once a token id has changed."""
    model = with_generation_config(world, temperature=0.6, do_sample=False, eos_token_id=5)
    with pytest.raises(ValueError, match="temperature"):
        changed = GenerationConfig(temperature=0.6, do_sample=False)
        changed.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(world, tmp_path, model=model, **ONE_STEP)
    assert "sampling values without do_sample" in caplog.text
    train(trainer)
    trainer.save_model()
    saved = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert saved["temperature"] == 0.6 and saved["do_sample"] is True
    assert world.tokenizer.eos_token_id in saved["eos_token_id"] and 5 in saved["eos_token_id"]
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path), trainer.model)


def test_a_generation_config_that_cannot_be_saved_is_refused_before_training(world, tmp_path):
    model = with_generation_config(world, output_scores=True)
    with pytest.raises(ValueError, match="generation config of .* cannot be saved.*output_scores"):
        make_trainer(world, tmp_path, model=model, **ONE_STEP)
    # an adapter is saved without a generation config
    adapter = LoraConfig(target_modules=["q_proj"])
    make_trainer(world, tmp_path, model=model, peft_config=adapter, **ONE_STEP)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [3, 7]},
        None,
    ],
    ids=["tied head", "head and embedding", "tokens", "all weights"],
)
@pytest.mark.filterwarnings("ignore:.*`?tie_word_embeddings=True`?")
def test_a_tied_model_is_saved_as_it_was_trained(tied, tmp_path, options):
    adapter = None if options is None else LoraConfig(target_modules=["q_proj"], **options)
    trainer = make_trainer(tied, tmp_path, peft_config=adapter, learning_rate=0.01, **ONE_STEP)
    train(trainer)
    trainer.save_model()
    loaded = load_model(find_run(tmp_path))
    assert isinstance(loaded, PeftModel) is (options is not None)
    assert_same_logits(loaded, trainer.model)
    with pytest.raises(AssertionError):  # the step has moved it
        assert_same_logits(tied.model, trainer.model)


def test_an_adapter_on_a_resized_vocabulary_needs_the_resized_base(tied, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(tied.folder)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 7)
    model.save_pretrained(tmp_path / "resized")
    adapter = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[rows + 6])
    run = tmp_path / "run"
    trainer = make_trainer(tied, run, model=model, peft_config=adapter, **ONE_STEP)
    train(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.save_model()
    assert f"of {rows + 7} rows, which are saved with it, and {tied.folder} has {rows}" in caplog.text
    with pytest.raises(UserError, match=f"of {rows + 7} rows, and the base model {tied.folder} has {rows}"):
        load_model(find_run(run))
    assert_same_logits(load_model(find_run(run, str(tmp_path / "resized"))), trainer.model)


@pytest.mark.parametrize("indices", [[3, 425], {"lm_head": [3], "embed_tokens": [425]}, [-1]])
def test_token_ids_beyond_the_vocabulary_are_refused_before_training(tied, tmp_path, indices):
    adapter = LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices)
    with pytest.raises(ValueError, match=r"has (425|-1), and the vocabulary has 425 rows; expected"):
        make_trainer(tied, tmp_path, peft_config=adapter, **ONE_STEP)
    assert not any(tmp_path.iterdir())
