"""Recipes with a data plan: built once, found again, refused when changed; and templates for base models."""

import json

import pytest
from transformers import AutoTokenizer

from prefopt.cli import main
from prefopt.data import DataError
from prefopt.demo.tiny import tiny_recipe
from prefopt.errors import UserError
from prefopt.recipe import load_recipe, make_recipe
from prefopt.recipe.models import load_tokenizer
from prefopt.recipe.named import recipe_list, recipe_names
from prefopt.recipe.rows import load_data, with_plan
from prefopt.recipe.run import preference_config
from support.tiny_models import make_tokenizer

PUBLISHED = [name for name in recipe_names() if load_recipe(name).data.plan is not None]


@pytest.fixture
def content(tmp_path):
    rows = [
        {"prompt": f"What is {number}?", "chosen": f"It is {number}.", "rejected": "No idea."} for number in range(40)
    ]
    with (tmp_path / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    write_plan(tmp_path, validation=0.25)
    make_tokenizer(tmp_path / "model")
    return {
        "model": {"path": str(tmp_path / "model")},
        "data": {"plan": str(tmp_path / "plan.yaml"), "path": str(tmp_path / "built")},
        "training": {"output_dir": str(tmp_path / "run"), "use_cpu": True},
    }


def write_plan(folder, **arguments):
    plan = {"sources": [str(folder / "rows.jsonl")], "exact_split": True, **arguments}
    (folder / "plan.yaml").write_text(json.dumps(plan), encoding="utf-8")


def test_a_plan_is_built_once_and_its_splits_are_used(content, tmp_path, capsys):
    recipe = make_recipe(content)
    tokenizer = load_tokenizer(recipe)
    train, held_out = load_data(with_plan(recipe), tokenizer)
    assert "rows used" in capsys.readouterr().out
    assert (train.counts["rows"], held_out.counts["rows"]) == (60, 20)
    written = (tmp_path / "built" / "manifest.json").stat().st_mtime_ns
    again = with_plan(recipe)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "built" / "manifest.json").stat().st_mtime_ns == written
    assert (again.data.eval_path, again.data.eval_split) == (content["data"]["path"], "validation")


def test_rows_built_with_other_arguments_are_refused(content, tmp_path):
    with_plan(make_recipe(content))
    write_plan(tmp_path, validation=0.5)
    with pytest.raises(DataError, match="built with other arguments than data.plan .* remove the folder"):
        with_plan(make_recipe(content))


def test_rows_built_from_a_file_that_has_changed_are_refused(content, tmp_path):
    recipe = make_recipe(content)
    with_plan(recipe)
    rows = tmp_path / "rows.jsonl"
    before = rows.read_text(encoding="utf-8")
    rows.write_text(before.replace("No idea", "None", 1), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl has changed since .*built was built from it"):
        with_plan(recipe)
    rows.write_text(before, encoding="utf-8")
    assert with_plan(recipe).data.eval_split == "validation"
    rows.unlink()  # what was built from it is still there
    assert with_plan(recipe).data.eval_split == "validation"


def test_a_folder_that_nobody_built_is_refused(content, tmp_path):
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="no manifest.json"):
        with_plan(make_recipe(content))


def test_rows_to_evaluate_on_that_the_recipe_names_win(content, tmp_path):
    content["data"] |= {"eval_path": str(tmp_path / "rows.jsonl")}
    assert with_plan(make_recipe(content)).data.eval_path == str(tmp_path / "rows.jsonl")
    del content["data"]["eval_path"]
    recipe = make_recipe(content, {"data.eval_fraction": 0.1})
    assert with_plan(recipe).data.eval_path is None
    held_out = load_data(with_plan(recipe), load_tokenizer(recipe))[1]
    assert 0 < held_out.counts["rows"] < 20


def test_evaluation_by_epoch_knows_of_the_validation_split(content, tmp_path):
    assert preference_config(make_recipe(content, {"training.eval_strategy": "epoch"}))
    write_plan(tmp_path, validation=0.0)
    options = {"training.eval_strategy": "epoch"}
    with pytest.raises(UserError, match="training.eval_strategy needs rows: set data.eval_path or data.eval_fraction"):
        preference_config(make_recipe(content, options | {"data.eval_fraction": 0.0}))
    recipe = make_recipe(content, options)
    with pytest.raises(UserError, match="needs rows, and .* has .* prompts, too few to hold some out by default"):
        load_data(with_plan(recipe), load_tokenizer(recipe))
    recipe = make_recipe(content)
    assert load_data(with_plan(recipe), load_tokenizer(recipe))[1] is None


def test_an_unknown_plan_is_one_message(content, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert main(["train", str(path), "--data.plan", "s1-combine"]) == 2
    error = capsys.readouterr().err
    assert "no file, plan or published set s1-combine; did you mean s1-combined?" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- templates


def test_dialogue_gives_a_base_model_turns_that_end_in_its_eos_token(content):
    plain = make_recipe(content, {"data.chat_template": "dialogue"})
    tokenizer = load_tokenizer(plain)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"},
    ]
    render = tokenizer.apply_chat_template
    asked = "Be brief.\n\nHuman: Hi\n\nAssistant: Hello.<|im_end|>\n\nHuman: Why?"
    assert render(turns, tokenize=False) == asked
    assert render(turns, tokenize=False, add_generation_prompt=True) == f"{asked}\n\nAssistant:"
    answered = [*turns, {"role": "assistant", "content": "So."}]
    # the prompt alone begins the whole row, and nothing is scored behind the EOS token
    assert render(answered, tokenize=False) == f"{asked}\n\nAssistant: So.<|im_end|>"


def test_a_template_file_is_read_and_one_that_is_not_there_named(content, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert load_tokenizer(make_recipe(content, {"data.chat_template": str(path)})).chat_template == path.read_text(
        encoding="utf-8"
    )
    with pytest.raises(UserError, match="data.chat_template is 'dialog'; expected dialogue or a"):
        load_tokenizer(make_recipe(content, {"data.chat_template": "dialog"}))
    own = AutoTokenizer.from_pretrained(content["model"]["path"]).chat_template
    assert load_tokenizer(make_recipe(content)).chat_template == own


# ---------------------------------------------------------------- names and --tiny


def test_the_five_published_systems_are_recipes():
    assert [name[:2] for name in PUBLISHED] == ["s0", "s1", "s2", "s3", "s4"]
    listed = dict(line.split(None, 1) for line in recipe_list().splitlines())
    assert list(listed) == recipe_names() and all(len(text) > 20 for text in listed.values())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        (
            "s0-qwen3-kto",
            {
                "learning_rate": 2e-4,
                "num_train_epochs": 1,
                "batch": (2, 8),
                "max_length": 512,
                "lora": (16, 32, 0.0),
                "method": "kto",
            },
        ),
        (
            "s1-smollm2-enhanced-kto",
            {
                "learning_rate": 2e-4,
                "num_train_epochs": 1,
                "batch": (2, 8),
                "max_length": 512,
                "lora": (16, 32, 0.0),
                "method": "enhanced_kto",
                "beta": 0.1,
                "seed": 42,
                "shift": "off",
            },
        ),
        ("s2-arabic-qwen-kto", {"num_train_epochs": 2, "bf16": True, "method": "kto"}),
        (
            "s3-r1-distill-kto-4bit",
            {
                "num_train_epochs": 1,
                "batch": (4, 2),
                "max_length": 4096,
                "lora": (16, 16, 0.0),
                "method": "kto",
                "weight_decay": 0.01,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.1,
                "optim": "adamw_bnb_8bit",
                "gradient_checkpointing": True,
            },
        ),
        (
            "s4-qwen3-mmlu-pro-sft",
            {
                "learning_rate": 3e-4,
                "num_train_epochs": 8,
                "batch": (1, 16),
                "lora": (16, 32, 0.05),
                "method": "sft",
                "fp16": True,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.1,
            },
        ),
    ],
)
def test_a_recipe_has_the_published_settings(name, published):
    recipe = load_recipe(name)
    training, lora = recipe.training, recipe.lora
    said = {
        "batch": (training.per_device_train_batch_size, training.gradient_accumulation_steps),
        "lora": (lora.r, lora.alpha, lora.dropout),
        "max_length": recipe.data.max_length,
        "method": recipe.loss.method,
        "beta": recipe.loss.beta,
        "shift": recipe.loss.shift,
    }
    for key, value in published.items():
        assert (said[key] if key in said else getattr(training, key)) == value, key
    linears = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert lora.target_modules == linears
    # what the real command needs besides a GPU fits together
    preference_config(load_recipe(name, {"training.use_cpu": True}))


def test_tiny_makes_its_inputs_once_and_an_override_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = tiny_recipe("kto-lora", {"training.max_steps": 3})
    assert first.training.max_steps == 3 and first.training.use_cpu
    assert not any("max_steps" in note for note in first.notes)
    weights = tmp_path / "runs" / "kto-lora-tiny-inputs" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert str(weights.parent) == first.model.path
    assert tiny_recipe("kto-lora", {"training.max_steps": 3}) == first
    assert weights.stat().st_mtime_ns == written
    with pytest.raises(UserError, match="kto-lora-tiny-inputs is there and not what --tiny makes"):
        tiny_recipe("kto-lora", {"model.path": "other/SmolLM2-135M"} | {"training.seed": 7})


def test_tiny_names_the_families_that_it_knows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {path: someone/gemma}\ndata: {path: d}\ntraining: {output_dir: out}\n",
        encoding="utf-8",
    )
    assert main(["train", str(path), "--tiny"]) == 2
    assert "--tiny has no stand-in for model.path someone/gemma" in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["r.yaml"]
