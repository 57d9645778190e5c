"""Recipes: strict, every problem at once, and a run that does what they say."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest
import yaml

import prefopt.options
from prefopt.data import DataError
from prefopt.errors import UserError
from prefopt.options import Loss, MethodName
from prefopt.recipe import Lora, load_recipe, make_recipe, run_recipe
from prefopt.recipe.named import recipe_names
from prefopt.recipe.run import preference_config, write_recipe
from prefopt.train import PreferenceConfig
from prefopt.train.methods import METHODS
from support import option_tables
from support.tiny_models import make_model, make_rows, make_tokenizer
from support.trainer import make_pairs

MINIMAL = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "training": {"output_dir": "run"}}
# Those of the published systems, whose data are a plan, run in test_recipes_tiny*.py.
SHIPPED = [name for name in recipe_names() if load_recipe(name).data.plan is None]


def problems(content, overrides=None) -> list[str]:
    with pytest.raises(UserError) as error:
        make_recipe(content, overrides, name="r.yaml")
    return str(error.value).splitlines()


def test_minimal_recipe_takes_the_defaults():
    recipe = make_recipe(MINIMAL)
    assert recipe.lora is None and recipe.loss.method == "kto" and recipe.loss.beta is None
    assert recipe.data.on_bad_row == "stop" and recipe.training.sampler is None
    config = preference_config(recipe)
    assert config.beta == 0.1 and config.sampler == "label_balanced"
    assert make_recipe({**MINIMAL, "lora": {}}).lora == Lora()


def test_every_problem_is_said_at_once_with_file_key_and_nearest_name():
    content = {
        "model": {"path": "m", "dtpye": "float32", "dtype": "float23"},
        "data": {"max_length": "long", "on_bad_row": True, "eval_fraction": "a bit"},
        "loss": {"beta": True, "desirable_weight": float("nan"), "learning_rate": 1},
        "training": {"output_dir": "", "seed": 1.5, "bf16": "yes", "report_to": []},
        "traning": {},
        "beta": 0.2,
    }
    assert problems(content, {"loss.betta": 1, "los.beta": 1}) == [
        "r.yaml: traning is unknown; did you mean training?",
        "r.yaml: beta is unknown; did you mean loss.beta?",
        "command line: los.beta is unknown; did you mean loss.beta?",
        "r.yaml: model.dtpye is unknown; did you mean model.dtype?",
        "r.yaml: model.dtype is 'float23'; expected one of float32, bfloat16, float16, auto; did you mean float32?",
        "r.yaml: data.max_length is 'long'; expected a whole number or null",
        "r.yaml: data.on_bad_row is True; expected one of stop, skip",
        "r.yaml: data.eval_fraction is 'a bit'; expected a number or null",
        "r.yaml: data.path is missing: a .jsonl or .parquet file (relative to the current folder), a folder from "
        "`prefopt data build`, or a hub id",
        "r.yaml: loss.beta is True; expected a number or null",
        "r.yaml: loss.desirable_weight is nan; expected a number or null",
        "r.yaml: loss.learning_rate is unknown; did you mean training.learning_rate?",
        "command line: loss.betta is unknown; did you mean loss.beta?",
        "r.yaml: training.output_dir is ''; expected text",
        "r.yaml: training.seed is 1.5; expected a whole number",
        "r.yaml: training.bf16 is 'yes'; expected true or false",
        "r.yaml: training.report_to is []; expected text or a list of names",
    ]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("loss.beta", 0, "a number above 0"),
        ("lora.r", 0, "a number at least 1"),
        ("lora.dropout", 1.0, "a number at least 0 and below 1"),
        ("data.max_length", 1, "a number at least 2"),
        ("data.eval_fraction", -0.1, "a number at least 0 and below 1"),
        ("training.per_device_train_batch_size", 0, "a number at least 1"),
        ("training.learning_rate", "-1e-5", "a number above 0"),
        ("training.save_total_limit", 0, "a number at least 1"),
    ],
)
def test_numbers_have_bounds(key, value, expected):
    assert problems(MINIMAL, {key: value}) == [f"command line: {key} is {value!r}; expected {expected}"]


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_a_recipe_is_sections(content):
    assert "expected the sections model, data, lora, loss, training" in problems(content)[0]


def test_a_section_is_keys_with_values():
    assert "r.yaml: loss is 'kto'; expected keys with values" in problems({**MINIMAL, "loss": "kto"})
    assert "command line: lora is 3; expected null or {}" in problems(MINIMAL, {"lora": 3})[0]
    assert "command line: loss is null; expected null or {}, and only for lora" in problems(MINIMAL, {"loss": None})[0]


def test_overrides_win_and_can_drop_the_adapter():
    content = {**MINIMAL, "lora": {"r": 8}, "loss": {"beta": 0.3}}
    recipe = make_recipe(content, {"loss.beta": 0.2, "lora.r": 4, "data.max_length": None})
    assert (recipe.loss.beta, recipe.lora.r, recipe.data.max_length) == (0.2, 4, None)
    assert make_recipe(content, {"lora": None}).lora is None
    assert make_recipe(MINIMAL, {"lora.r": 4}).lora == Lora(r=4)


def test_yaml_traps(tmp_path):
    path = tmp_path / "r.yaml"
    head = "model: {path: m}\ndata: {path: d}\n"
    path.write_text("\ufeff" + head + "training: {output_dir: تجربة, learning_rate: 1e-5}\n", encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.training.learning_rate == 1e-5  # text to YAML, because it has no dot
    assert recipe.training.output_dir == "تجربة" and recipe.name == str(path)
    path.write_text(head + "training:\n  output_dir: a\n  output_dir: b\n", encoding="utf-8")
    with pytest.raises(UserError, match="the key 'output_dir' appears twice .* line 5"):
        load_recipe(path)
    for broken in ("model: [", "model: {path: !!python/name:os.system }", "a: 2026-13-01"):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(UserError, match="is not valid YAML"):
            load_recipe(path)
    path.write_bytes(b"model: caf\xe9")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(path)
    with pytest.raises(UserError, match="there is no recipe .*missing.yaml"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)


def test_every_option_has_help():
    for section in prefopt.options.SECTIONS:
        for name, one in prefopt.options.options_of(section).items():
            assert one.metadata["help"], f"{section}.{name}"


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model("qwen3", len(make_tokenizer(folder / "model")), folder / "model")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(True))
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in make_pairs(20))
    return folder


@pytest.fixture
def content(base, tmp_path):
    return content_of(base, tmp_path)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A recipe and its finished run."""
    content = content_of(base, tmp_path_factory.mktemp("whole"))
    recipe = make_recipe(content)
    return recipe, run_recipe(recipe)


def content_of(base, folder):
    return {
        "model": {"path": str(base / "model")},
        "data": {"path": str(base / "rows.jsonl"), "eval_fraction": 0.3, "max_length": 128},
        "lora": {"r": 4},
        "training": {
            "output_dir": str(folder / "run"),
            "use_cpu": True,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    }


def logs(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_leaves_everything_in_its_folder(whole):
    recipe, folder = whole
    assert folder == Path(recipe.training.output_dir)
    names = {path.name for path in folder.iterdir()}
    assert {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "adapter_model.safetensors",
        "report.html",
        "README.md",
    } <= names
    assert "bad_rows.jsonl" not in names
    again = load_recipe(folder / "recipe.yaml")
    training = dataclasses.replace(again.training, sampler=None)  # what was null is spelled out
    assert dataclasses.replace(again, name=recipe.name, loss=recipe.loss, training=training) == recipe
    assert preference_config(again).to_dict() == preference_config(recipe).to_dict()
    losses = [entry["loss"] for entry in logs(folder) if "loss" in entry]
    # Policy and reference are one model: log-ratios and z0 are exactly 0, and four times sigmoid(0) / 4 is exact.
    assert len(losses) == 4 and losses[0] == 0.5 and losses[-1] != losses[0]
    evaluated = [entry for entry in logs(folder) if "eval_loss" in entry][-1]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["after"] == evaluated["eval_rewards/margins"] and summary["before"] == 0.0
    data = json.loads((folder / "run.json").read_text(encoding="utf-8"))["data"]
    assert data["train"]["rows"] + summary["n"] == 20 and data["train"]["held_out"] == summary["n"]


def test_resume_goes_on_from_the_last_checkpoint(content, whole, tmp_path):
    folder = tmp_path / "stopped"
    overrides = {
        "training.output_dir": str(folder),
        "training.extra": {"lr_scheduler_kwargs": None},
    }
    first = make_recipe(content, overrides)
    stop_after(first, 2)
    with pytest.raises(UserError, match="is not empty; choose another folder, or continue the run with --resume"):
        run_recipe(first)
    run_recipe(first, resume=True)
    expected = [entry["loss"] for entry in logs(whole[1]) if "loss" in entry]
    assert [entry["loss"] for entry in logs(folder) if "loss" in entry] == expected  # bit for bit


def stop_after(recipe, step):
    """Run a recipe up to a checkpoint, as if the power had gone there."""
    from prefopt.train import PreferenceTrainer

    class Gone(Exception):
        pass

    original = PreferenceTrainer._save_checkpoint

    def save(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.state.global_step == step:
            raise Gone

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Gone):
        patch.setattr(PreferenceTrainer, "_save_checkpoint", save)
        run_recipe(recipe)


def test_bad_rows_are_skipped_and_listed(content, base, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = (base / "rows.jsonl").read_bytes()
    long = {
        "prompt": [{"role": "user", "content": "why? " * 100}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    path.write_bytes(b'{"prompt": "\xff"}\n' + good + json.dumps({**long, "label": True}).encode() + b"\n")
    content["data"] |= {"path": str(path), "on_bad_row": "skip", "eval_fraction": 0.0}
    folder = run_recipe(make_recipe(content, {"training.max_steps": 1}))
    lines = (folder / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    bad = [json.loads(line) for line in lines]
    assert [(row["file"], row["line"]) for row in bad] == [(str(path), 1), (str(path), 22)]
    assert "is not UTF-8" in bad[0]["reason"] and "max_length is 128" in bad[1]["reason"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_runs_on_a_tiny_model(name, content, base, tmp_path):
    content["training"].pop("learning_rate")
    if load_recipe(name).data.path == "pairs.jsonl":
        content["data"]["path"] = str(base / "pairs.jsonl")
    overrides = {
        f"{section}.{key}": value
        for section, options in content.items()
        if section != "lora"
        for key, value in options.items()
    }
    recipe = load_recipe(
        name,
        overrides | {"model.dtype": "float32", "training.bf16": False, "training.max_steps": 2},
    )
    folder = run_recipe(recipe)
    assert (folder / "report.html").is_file()
    assert (folder / "adapter_model.safetensors").is_file() == (recipe.lora is not None)
    assert (folder / "model.safetensors").is_file() == (recipe.lora is None)


def test_a_reference_model_and_rows_of_their_own_for_evaluation(content, base, tmp_path):
    make_model("qwen3", 420, tmp_path / "reference", seed=1)
    content["model"]["ref_path"] = str(tmp_path / "reference")
    content["data"] |= {"eval_path": str(base / "rows.jsonl"), "eval_fraction": 0.0}
    folder = run_recipe(make_recipe(content, {"lora": None, "training.max_steps": 1}))
    first = next(entry for entry in logs(folder) if "rewards/chosen" in entry)
    assert abs(first["rewards/chosen"]) > 0.1  # another model is the reference from the first step on
    assert any("eval_loss" in entry for entry in logs(folder))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"training.extra": {"label_smoothing_factor": 0.1}},
            "label_smoothing_factor is 0.1; it smooths",
        ),
        (
            {"training.extra": {"weight_decy": 0.1}},
            "  training.extra.weight_decy is not an option; did you mean weight_decay",
        ),
        (
            {"training.extra": {"seed": 1}},
            "training.extra.seed has a place of its own: training.seed",
        ),
        (
            {"training.extra": {"max_length": 1}},
            "training.extra.max_length has a place of its own: data.max_length",
        ),
        ({"data.eval_path": "x.jsonl"}, "data.eval_path and data.eval_fraction are both set"),
        (
            {"data.eval_fraction": 0.0, "training.eval_strategy": "epoch"},
            "training.eval_strategy needs rows",
        ),
        ({"training.extra": {1: 2}}, "training.extra has keys that are not names"),
        ({"model.ref_path": "x"}, "model.ref_path with lora"),
        ({"model.ref_path": "x", "loss.method": "orpo"}, "orpo has no reference model; drop it"),
        ({"model.path": "./nowhere"}, "model.path is ./nowhere, which is not a folder"),
        (
            {"model.path": "someone/nothing"},
            "model.path: cannot load a tokenizer from someone/nothing",
        ),
        ({"lora.target_modules": ["no_such_layer"]}, "no_such_layer"),
        ({"training.lr_scheduler_type": "cosin"}, "cosin"),
    ],
)
def test_what_cannot_run_is_one_message_before_training(content, overrides, message):
    with pytest.raises(UserError) as error:
        run_recipe(make_recipe(content, overrides, name="r.yaml"))
    assert message in str(error.value) and "r.yaml" in str(error.value)
    assert not Path(content["training"]["output_dir"]).exists()


def test_pairs_are_wanted_where_the_method_learns_from_pairs(content):
    with pytest.raises(DataError, match=r"rows.jsonl has no pairs to train on; expected .*15 unpaired"):
        run_recipe(make_recipe(content, {"loss.method": "dpo"}))


def test_one_label_alone_is_refused(content, tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "label": True}) + "\n" for row in make_rows(True)),
        encoding="utf-8",
    )
    with pytest.raises(
        ValueError,
        match="has no undesirable rows among the .* to train on; kto learns from the contrast",
    ):
        run_recipe(make_recipe(content, {"data.path": str(path)}))


@pytest.mark.parametrize("method", METHODS)
def test_the_written_recipe_is_plain_yaml_that_says_the_same(method, content, tmp_path):
    recipe = make_recipe(content, {"loss.method": method})
    config = preference_config(recipe)
    path = write_recipe(recipe, config, tmp_path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert written["lora"]["r"] == 4 and written["loss"]["beta"] == config.beta
    again = load_recipe(path)
    assert preference_config(again).to_dict() == config.to_dict()
    assert again.loss.method == method and again.training.sampler == config.sampler


def test_the_table_of_methods_and_the_options_fit():
    assert get_args(MethodName) == tuple(METHODS)
    for one in dataclasses.fields(Loss):
        assert set(one.metadata["methods"] or ()) <= set(METHODS), one.name
    assert issubclass(PreferenceConfig, Loss)


def test_the_tables_of_options_in_the_docs_are_those_of_the_code():
    page = option_tables.PAGE.read_text(encoding="utf-8")
    assert option_tables.with_tables(page) == page, "run python tests/support/option_tables.py"


def test_off_in_yaml_is_off(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {path: m}\ndata: {path: d}\ntraining: {output_dir: o, use_cpu: true}\n"
        "loss: {method: enhanced_kto, shift: off, decision_weighting: off}\n",
        encoding="utf-8",
    )
    config = preference_config(load_recipe(path))
    assert (config.shift, config.decision_weighting, config.decision_clip) == ("off", "off", None)
    recipe = load_recipe(path, {"loss.shift": "ema", "loss.shift_start": "plateau"})
    assert preference_config(recipe).shift_bound == 0.5
    recipe = load_recipe(path, {"loss.decision_weighting": "prelec", "loss.decision_clip": [1, 3]})
    assert preference_config(recipe).decision_clip == (1.0, 3.0)
    with pytest.raises(UserError) as error:
        load_recipe(path, {"loss.decision_clip": [1], "loss.robust": "off"})
    assert "loss.decision_clip is [1]; expected a list of 2 numbers" in str(error.value)
    assert "loss.robust is 'off'; expected true or false" in str(error.value)
    with pytest.raises(UserError, match=r"loss\.gamma is 1\.0; method 'enhanced_kto' has no use"):
        preference_config(load_recipe(path, {"loss.gamma": 1}))


def test_a_model_cut_short_is_one_message(content, tmp_path):
    make_model("llama", len(make_tokenizer(tmp_path / "model")), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    content["model"]["path"] = str(tmp_path / "model")
    with pytest.raises(UserError, match="model.path: cannot load a causal language model from"):
        run_recipe(make_recipe(content))
