"""What would stop a run later is refused before a model or data is loaded, with its dotted key."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.errors import UserError
from prefopt.recipe import make_recipe, run_recipe
from prefopt.recipe.models import check_targets
from prefopt.recipe.run import preference_config


@pytest.fixture
def content(tmp_path, monkeypatch):
    def loaded(*_):
        pytest.fail("a tokenizer was loaded before the recipe was checked")

    monkeypatch.setattr("prefopt.recipe.run.load_tokenizer", loaded)
    (tmp_path / "model").mkdir()
    row = {"prompt": "a", "completion": "b", "label": True}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return {
        "model": {"path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "lora": {},
        "training": {"output_dir": str(tmp_path / "run"), "use_cpu": True},
    }


def extra(**options):
    return {"training.extra": options}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # names
        (
            {"training.optim": "adamw"},
            "training.optim is 'adamw', which transformers does not have; did you mean adamw_torch?",
        ),
        (
            {"training.lr_scheduler_type": "cosin"},
            "training.lr_scheduler_type is 'cosin', which transformers does not have; did you mean cosine?",
        ),
        (
            {"training.report_to": "wand"},
            "training.report_to has 'wand', which transformers does not have; did you mean wandb?",
        ),
        (
            {"training.report_to": "neptune"},
            "training.report_to has neptune, which is not installed: pip install neptune, or leave it out",
        ),
        (
            {"lora.target_modules": "((("},
            "lora.target_modules is '(((', which is no regular expression: missing ), unterminated subpattern",
        ),
        ({"data.chat_template_kwargs": {1: 2}}, "data.chat_template_kwargs has the key 1; expected names"),
        (
            {"data.chat_template_kwargs": {"tokenize": False}},
            "data.chat_template_kwargs has tokenize, which is set for every row; leave it out",
        ),
        # optimizer and scheduler
        ({"training.optim": "grokadamw"}, "training.optim is grokadamw: Please install grokadamw"),
        ({"training.optim": "galore_adamw"}, "training.optim is galore_adamw: You need to install `galore_torch`"),
        (extra(optim_args="x"), "training.optim is adamw_torch_fused: not enough values to unpack"),
        (
            {"training.lr_scheduler_type": "cosine_with_min_lr"},
            "training.lr_scheduler_type is cosine_with_min_lr: One of min_lr or min_lr_rate should be set",
        ),
        (
            {"training.lr_scheduler_type": "warmup_stable_decay"},
            "training.lr_scheduler_type is warmup_stable_decay: get_wsd_schedule() missing",
        ),
        (
            extra(lr_scheduler_kwargs={"x": 1}),
            "training.extra.lr_scheduler_kwargs is {'x': 1}, which linear refuses: get_linear_schedule_with_warmup()",
        ),
        (
            {"training.lr_scheduler_type": "cosine", **extra(lr_scheduler_kwargs={"num_cycles": "a"})},
            "training.extra.lr_scheduler_kwargs is {'num_cycles': 'a'}, which cosine refuses",
        ),
        # further options of TrainingArguments
        (extra(adam_beta1=2), "training.extra.adam_beta1 is 2; expected a number at least 0 and below 1"),
        (extra(adam_beta2="x"), "training.extra.adam_beta2 is 'x'; expected a number"),
        (extra(adam_epsilon=-1), "training.extra.adam_epsilon is -1; expected a number at least 0"),
        (extra(dataloader_num_workers=-1), "training.extra.dataloader_num_workers is -1; expected a number at least 0"),
        (extra(dataloader_num_workers=1.5), "training.extra.dataloader_num_workers is 1.5; expected a whole number"),
        (
            extra(dataloader_prefetch_factor=2),
            "training.extra.dataloader_prefetch_factor is 2: --dataloader_prefetch_factor can only be set when",
        ),
        (extra(logging_strategy="x"), "training.extra.logging_strategy is 'x'; expected one of no, steps, epoch"),
        (extra(log_level="loud"), "training.extra.log_level is 'loud'; expected one of "),
        (extra(use_cache=3), "training.extra.use_cache is 3; expected true or false"),
        (extra(parallelism_config={}), "training.extra.parallelism_config is {}; expected null"),
        (extra(push_to_hub=True), "training.extra.push_to_hub is not an option: nothing is uploaded here"),
        (extra(tf32=True), "training.extra.tf32 is True: --tf32 requires Ampere"),
        (
            extra(accelerator_config={"x": 1}),
            "training.extra.accelerator_config.x is unknown; expected some of split_batches, ",
        ),
        (
            extra(accelerator_config={"even_batchs": 1}),
            "training.extra.accelerator_config.even_batchs is unknown; did you mean even_batches?",
        ),
        (
            extra(accelerator_config={"gradient_accumulation_kwargs": {"a": 1}}),
            "training.extra.accelerator_config.gradient_accumulation_kwargs.a is unknown",
        ),
        (
            extra(accelerator_config="no.json"),
            "training.extra.accelerator_config is 'no.json'; expected keys with values or a .json file",
        ),
        (
            extra(dataloader_persistent_workers=True),
            "training.extra has options of the data loader that it refuses: persistent_workers option needs",
        ),
        (
            {"training.gradient_checkpointing": True, **extra(gradient_checkpointing_kwargs={"x": 1})},
            "training.extra.gradient_checkpointing_kwargs is {'x': 1}: Identity.forward() got an unexpected keyword",
        ),
        # the device
        ({"training.fp16": True}, "training.fp16 is true on a CPU, which would train in float32"),
        # files
        ({"data.path": "gone.jsonl"}, "data.path is gone.jsonl, which does not exist"),
        ({"data.path": "x" * 300 + ".jsonl"}, "data.path is " + "x" * 300),
        ({"data.eval_path": "gone.parquet"}, "data.eval_path is gone.parquet, which does not exist"),
        ({"data.plan": "gone.yaml", "data.path": "built"}, "data.plan: there is no plan gone.yaml"),
        (
            {"data.chat_template": "gone.jinja"},
            "data.chat_template is 'gone.jinja'; expected dialogue or a .jinja file",
        ),
        ({"data.chat_template": "/"}, "data.chat_template is '/': Is a directory"),
        ({"model.path": "/gone"}, "model.path is /gone, which is not a folder"),
        ({"model.path": "/" + "x" * 300}, "model.path is '/" + "x" * 55 + "...: File name too long"),
        ({"model.ref_path": "/gone", "lora": None}, "model.ref_path is /gone, which is not a folder"),
        (
            {"training.output_dir": "/dev/null/run"},
            "training.output_dir is /dev/null/run, but /dev/null is a file; expected a folder",
        ),
        (
            extra(reference_cache_dir="/dev/null/x"),
            "training.extra.reference_cache_dir is /dev/null/x, but /dev/null is a file",
        ),
        ({"training.output_dir": "x" * 300}, "training.output_dir cannot be written: File name too long"),
    ],
)
def test_a_run_is_refused_before_any_work(content, overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        run_recipe(make_recipe(content, overrides, name="r.yaml"))
    assert str(error.value).startswith(f"r.yaml: {message}")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("training.output_dir", "a\0b", "text in UTF-8 without NUL"),
        ("model.path", "\ud800", "text in UTF-8 without NUL"),
        ("data.max_length", 10**30, "a whole number of at most 64 bits or null"),
        ("training.seed", 2**32, "a number at least 0 and below 4294967296"),
        ("training.num_train_epochs", 10**30, "a number of at most 64 bits"),
    ],
)
def test_values_that_no_library_can_hold(content, key, value, expected):
    with pytest.raises(UserError) as error:
        make_recipe(content, {key: value}, name="r.yaml")
    assert f"{key} is " in str(error.value) and str(error.value).endswith(f"; expected {expected}")


def test_a_run_folder_without_write_permission(content, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError) as error:
        run_recipe(make_recipe(content, name="r.yaml"))
    expected = f"training.output_dir is {tmp_path / 'run'}, but {tmp_path} cannot be written to"
    assert str(error.value) == f"r.yaml: {expected}"


def test_the_source_of_a_plan_is_looked_for_before_the_model(content, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("sources: [mine=gone.jsonl]\n", encoding="utf-8")
    overrides = {"data.plan": str(plan), "data.path": str(tmp_path / "built")}
    with pytest.raises(UserError, match="^r.yaml: data.plan: there is no file gone.jsonl, which is "):
        run_recipe(make_recipe(content, overrides, name="r.yaml"))


def test_extra_options_have_the_types_of_training_arguments(content):
    overrides = extra(
        adam_epsilon="1e-7",  # YAML reads it as text
        logging_strategy=False,  # and no as false
        lr_scheduler_kwargs={"num_cycles": 0.25},
        accelerator_config={"non_blocking": True},
        dataloader_num_workers=2,
        dataloader_prefetch_factor=4,
    )
    config = preference_config(make_recipe(content, {"training.lr_scheduler_type": "cosine", **overrides}))
    assert config.adam_epsilon == 1e-7 and config.logging_strategy == "no"
    assert config.lr_scheduler_kwargs == {"num_cycles": 0.25}
    assert config.accelerator_config.non_blocking is True
    assert (config.dataloader_num_workers, config.dataloader_prefetch_factor) == (2, 4)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop", "adafactor", "adagrad"])
@pytest.mark.parametrize("scheduler", ["constant", "linear", "polynomial", "inverse_sqrt"])
def test_what_transformers_can_make_is_accepted(content, optim, scheduler):
    chosen = {"training.optim": optim, "training.lr_scheduler_type": scheduler}
    config = preference_config(make_recipe(content, chosen))
    assert (config.optim, config.lr_scheduler_type) == (optim, scheduler)


def test_a_problem_of_the_loss_is_not_given_the_adapters_key(content):
    """alpha is an option of enhanced_kto and of LoRA."""
    with pytest.raises(UserError, match=r"  loss\.alpha is 2\.0; expected a number above 0 and"):
        preference_config(make_recipe(content, {"loss.method": "enhanced_kto", "loss.alpha": 2}, name="r.yaml"))


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=1, num_key_value_heads=1, **sizes))


def test_layers_of_an_adapter_are_those_of_the_model(model):
    linear = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    expected = f"expected all-linear or a list of some of {linear}"
    for targets, problem in (
        ("q_proj", "is 'q_proj', a pattern that is no layer's whole name"),
        (["q_proj", "nope"], "is 'nope', which no layer has"),
        (".*norm", "is '.*norm', which matches model.layers.0.input_layernorm, a LlamaRMSNorm"),
        (["self_attn"], "is 'self_attn', which matches model.layers.0.self_attn, a LlamaAttention"),
    ):
        with pytest.raises(UserError) as error:
            check_targets(model, targets, "r.yaml: lora.target_modules")
        assert str(error.value) == f"r.yaml: lora.target_modules {problem}; {expected}"
    for targets in ("all-linear", ["q_proj", "embed_tokens"], r".*\.(k|v)_proj"):
        check_targets(model, targets, "lora.target_modules")
