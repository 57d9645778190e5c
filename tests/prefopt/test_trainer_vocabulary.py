"""Token ids that the model has no embedding for are found before training, by file, line and token."""

import copy
import json

import pytest
import torch
from peft import LoraConfig

from prefopt.data import DataError, load_rows, tokenize_rows
from prefopt.errors import UserError
from prefopt.train.vocabulary import embedding_rows
from support.tiny_models import make_rows, make_tokenizer
from support.trainer import data_for, make_trainer, make_world, train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("llama", tmp_path_factory.mktemp("world"))


@pytest.fixture
def grown(world, tmp_path):
    """The world with a tokenizer that knows two words more than the model has embeddings."""
    tokenizer = make_tokenizer(tmp_path / "grown")
    tokenizer.add_tokens(["Jupiter", "ladder"])
    return world._replace(tokenizer=tokenizer)


@pytest.mark.parametrize("method", ["kto", "dpo", "sft"])
def test_rows_of_files_lists_and_token_ids_are_named(grown, tmp_path, method):
    rows, size = data_for(method, 20), len(grown.tokenizer) - 2
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError) as error:
        make_trainer(grown, tmp_path / "run", data=path, method=method)
    where = f"{path}:1: token {size} ('Jupiter') has no embedding: the model has {size}, for ids 0 to {size - 1}"
    assert str(error.value.bad[0]) == where and where in str(error.value)
    assert f"resize_token_embeddings(len(tokenizer)) (the tokenizer has {size + 2} tokens)" in str(error.value)
    # "ladder" is in an undesirable answer, which sft does not train on; in pairs it is in the chosen one
    lines = {"kto": [1, 17], "dpo": [1, 17], "sft": [1]}[method]
    assert [bad.line for bad in error.value.bad] == lines


def test_tokenised_rows_and_evaluation_rows_are_checked(grown, tmp_path):
    clean = make_rows(True)[1:16]
    tokens = tokenize_rows(load_rows(make_rows(True)), grown.tokenizer, max_length=96)
    with pytest.raises(DataError, match="^2 rows have tokens without an embedding:\n  rows:1: token"):
        make_trainer(grown, tmp_path / "run", data=tokens)
    with pytest.raises(DataError, match="rows:17: token 421 .'ladder'. has no embedding"):
        make_trainer(grown, tmp_path / "run", data=clean, eval_dataset={"mine": make_rows(True)})
    trainer = make_trainer(grown, tmp_path / "run", data=clean)
    with pytest.raises(DataError, match="^1 row has tokens .*\n  rows:1: token"):
        trainer.evaluate(make_rows(True)[:3])
    assert torch.isfinite(torch.tensor(train(trainer)[-1]["loss"]))


def test_a_resized_model_trains(grown, tmp_path):
    model = copy.deepcopy(grown.model)
    model.resize_token_embeddings(len(grown.tokenizer), mean_resizing=False)
    trainer = make_trainer(grown, tmp_path / "run", model=model, ref=False, max_steps=1)
    assert len(train(trainer)) == 1


def test_a_reference_with_fewer_embeddings_is_found(grown, tmp_path):
    model = copy.deepcopy(grown.model)
    model.resize_token_embeddings(len(grown.tokenizer), mean_resizing=False)
    with pytest.raises(DataError, match="dataset:1: token 420 .'Jupiter'. has no embedding"):
        make_trainer(grown, tmp_path / "run", model=model)


def test_a_padding_token_without_an_embedding(world, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "padded")
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    with pytest.raises(
        UserError,
        match=f"^pad_token_id is {size} .'<new pad>'.: the model has {size}, for ids 0 to",
    ):
        make_trainer(world._replace(tokenizer=tokenizer), tmp_path / "run")
    tokens = tokenize_rows(load_rows(make_rows(True)), world.tokenizer, max_length=96)
    model = copy.deepcopy(world.model)
    model.config.pad_token_id = -1  # what counts where there is no tokenizer
    with pytest.raises(UserError, match="^pad_token_id is -1: the model has .* tokenizer.eos_token will do"):
        make_trainer(
            world._replace(tokenizer=None),
            tmp_path / "run",
            model=model,
            ref=world.ref,
            data=tokens,
        )


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
)
def test_an_adapter_leaves_the_number_of_embeddings(world, options):
    from peft import get_peft_model

    size = embedding_rows(world.model)
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(copy.deepcopy(world.model), config)
    assert embedding_rows(model) == size == world.model.get_input_embeddings().weight.shape[0]
