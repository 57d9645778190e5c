"""Option names of TRL and older transformers: translated with a warning, or refused with a reason."""

import logging
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.errors import UserError
from prefopt.options import SECTIONS, options_of
from prefopt.recipe import make_recipe
from prefopt.recipe.foreign_names import FOREIGN
from prefopt.recipe.run import preference_config

MINIMAL = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "training": {"output_dir": "run"}}


def problems(content, overrides=None):
    with pytest.raises(UserError) as error:
        make_recipe(content, overrides, name="r.yaml")
    return str(error.value).splitlines()


def test_the_table_leads_to_options_that_exist_and_hides_none():
    for name, foreign in FOREIGN.items():
        assert foreign.reason, name
        assert not any(name in options_of(section) for section in SECTIONS), name
        if foreign.new is not None:
            section, _, option = foreign.new.partition(".")
            assert option in options_of(section), name


def test_the_page_has_a_line_for_each_key():
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name, foreign in FOREIGN.items():
        what = f"refused: {foreign.reason}" if foreign.new is None else f"`{foreign.new}`"
        assert f"| `{name}` | {what} |\n" in page, name


@pytest.mark.parametrize(
    ("key", "value", "new", "expected"),
    [
        ("training.evaluation_strategy", "no", "eval_strategy", "no"),
        ("training.per_gpu_train_batch_size", 3, "per_device_train_batch_size", 3),
        ("training.per_gpu_eval_batch_size", 5, "per_device_eval_batch_size", 5),
        ("training.warmup_ratio", 0.1, "warmup_steps", 0.1),
        ("training.activation_checkpointing", True, "gradient_checkpointing", True),
        ("training.no_cuda", True, "use_cpu", True),
    ],
)
def test_old_training_options_are_read_as_the_new_ones(key, value, new, expected, caplog):
    caplog.set_level(logging.WARNING)
    section, _, name = key.partition(".")
    in_section = make_recipe({**MINIMAL, "training": {"output_dir": "run", name: value}})
    flat = make_recipe({**MINIMAL, name: value})
    on_top = make_recipe(MINIMAL, {key: value})
    for recipe in (in_section, flat, on_top):
        assert getattr(recipe.training, new) == expected
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and all(f"is read as training.{new}: " in text for text in said)
    assert said[0].startswith(f"recipe: {key} ") and said[1].startswith(f"recipe: {name} ")
    assert said[2].startswith(f"command line: {key} ")


def test_a_flat_file_of_transformers_and_trl_is_read(caplog):
    recipe = make_recipe(
        {
            "model_name_or_path": "someone/model",
            "torch_dtype": "torch.bfloat16",
            "load_in_4bit": True,
            "dataset_name": "d.jsonl",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_modules": ["q_proj"],
            "loss_type": "apo_zero_unpaired",
            "precompute_ref_log_probs": True,
            "output_dir": "run",
            "learning_rate": 1e-5,
            "gradient_checkpointing": True,
            "fp16": True,
            "max_steps": 3,
        }
    )
    assert (recipe.model.path, recipe.model.dtype) == ("someone/model", "bfloat16")
    assert recipe.model.quantization == "nf4" and recipe.data.path == "d.jsonl"
    assert (recipe.lora.r, recipe.lora.alpha) == (8, 16.0)
    assert recipe.lora.target_modules == ["q_proj"]
    assert recipe.loss.method == "apo_zero" and recipe.loss.precompute_ref_logps
    assert recipe.training.gradient_checkpointing and recipe.training.fp16
    assert (recipe.training.learning_rate, recipe.training.max_steps) == (1e-5, 3)
    assert len(caplog.records) == 14  # one for each key


def test_names_of_sections_are_no_old_keys(caplog):
    make_recipe({**MINIMAL, "training": {"output_dir": "r", "gradient_checkpointing": True}})
    make_recipe({**MINIMAL, "lora": {"r": 2}}, {"training.max_steps": 3})
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"max_prompt_length": 128},
            "r.yaml: max_prompt_length is not an option: a prompt is never cut here: ",
        ),
        ({"training": {"output_dir": "r", "use_liger_kernel": True}}, "always fused here"),
        ({"training": {"output_dir": "r", "warmup_ratio": 3}}, "is 3; expected a share of all"),
        ({"loss_type": "kto_pair"}, "loss_type is 'kto_pair'; expected one of kto, "),
        ({"load_in_4bit": "yes"}, "load_in_4bit is 'yes'; expected true or false"),
        (
            {"training": {"output_dir": "r", "warmup_ratio": 0.1, "warmup_steps": 5}},
            "r.yaml: training.warmup_ratio and training.warmup_steps are both given; expected "
            "training.warmup_steps alone",
        ),
        (
            {"training": {"output_dir": "r", "learning_rate": 1e-5}, "learning_rate": 1e-4},
            "learning_rate and training.learning_rate are both given",
        ),
    ],
)
def test_what_cannot_be_translated_is_refused_with_a_reason(content, message):
    found = problems({**MINIMAL, **content})
    assert len(found) == 1 and message in found[0]


def test_the_command_line_wins_over_an_old_key_of_the_file():
    content = {**MINIMAL, "training": {"output_dir": "r", "warmup_ratio": 0.1}}
    assert make_recipe(content, {"training.warmup_steps": 7}).training.warmup_steps == 7
    assert make_recipe(content, {"training.warmup_ratio": 0.3}).training.warmup_steps == 0.3


def test_old_keys_on_the_command_line_keep_their_values(tmp_path, capsys, caplog):
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: ./nowhere}\ndata: {path: d}\ntraining: {output_dir: out}\n", encoding="utf-8")
    words = ["train", str(path), "--training.warmup_ratio", "0.1", "--data.eval_fraction=0"]
    assert main([*words, "--training.evaluation_strategy=epoch"]) == 2
    # the value has come through: evaluation by epoch wants rows
    assert "training.eval_strategy needs rows" in capsys.readouterr().err
    assert "training.warmup_ratio is read as training.warmup_steps" in caplog.text


def test_fp16_reaches_the_trainer_and_not_together_with_bf16():
    content = {**MINIMAL, "training": {"output_dir": "run", "fp16": True, "use_cpu": True}}
    assert preference_config(make_recipe(content)).fp16
    with pytest.raises(UserError, match="fp16"):
        preference_config(make_recipe(content, {"training.bf16": True}))
