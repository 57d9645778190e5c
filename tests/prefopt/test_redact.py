"""Secrets among the options of a run reach none of its files."""

import copy
import json
import pickle

import pytest
import torch
import yaml

from prefopt.cli import main
from prefopt.compare.plan import Plan, settings_of
from prefopt.recipe import make_recipe
from prefopt.redact import is_secret, redacted
from prefopt.report import write_report
from prefopt.train import PreferenceConfig
from support.tiny_models import make_model, make_rows, make_tokenizer

SECRET = "sEcReT-v4lu3"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("hub_token", "push_to_hub_token", "token", "HF_TOKEN")),
        *((name, True) for name in ("api_key", "apikey", "apiKey", "WANDB-API-KEY", "secret_key")),
        *((name, True) for name in ("password", "db_password", "client_secret", "clientSecret")),
        *((name, False) for name in ("pad_token", "eos_token", "bos_token", "image_token")),
        *((name, False) for name in ("max_new_tokens", "num_tokens", "token_indices", "tokenizer")),
        *((name, False) for name in ("include_num_input_tokens_seen", "key", "monkey", "secretary")),
        (3, False),
    ],
)
def test_names_of_secrets(name, secret):
    assert is_secret(name) is secret


def test_secrets_are_dropped_at_any_depth_and_urls_lose_their_user():
    given = {
        "hub_token": SECRET,
        "use_auth_token": True,
        "token": None,
        "nested": [{"api_key": SECRET, "kept": 1.5}, ("a", "https://me:pw@host:8/x?y=1@2")],
        "mail": "me@host",
    }
    assert redacted(given) == {
        "use_auth_token": True,
        "token": None,
        "nested": [{"kept": 1.5}, ("a", "https://host:8/x?y=1@2")],
        "mail": "me@host",
    }


def test_a_pickled_configuration_has_no_token_and_the_live_one_keeps_it(tmp_path):
    config = PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, hub_token=SECRET, beta=0.3)
    text = pickle.dumps(config)
    again = pickle.loads(text)
    assert SECRET.encode() not in text
    assert SECRET not in repr(config)
    for copied in (copy.copy(config), copy.deepcopy(config)):
        assert (copied.hub_token, copied.beta) == (SECRET, 0.3) and copied is not config
    assert (config.hub_token, again.hub_token, again.beta) == (SECRET, None, 0.3)


def test_a_comparison_keeps_no_secret():
    content = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}}
    content["training"] = {"output_dir": "run", "extra": {"hub_token": SECRET, "adam_beta1": 0.8}}
    plan = Plan(recipe=make_recipe(content), methods=("kto",), sequences=2, steps=1)
    assert settings_of(plan, {})["training.extra"] == {"adam_beta1": 0.8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with checkpoints, whose options held secrets."""
    folder = tmp_path_factory.mktemp("secrets")
    make_model("llama", len(make_tokenizer(folder / "model")), folder / "model")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(True))
    recipe = {
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "rows.jsonl"), "eval_fraction": 0.3},
        "lora": {"r": 2},
        "training": {"output_dir": str(folder / "run"), "use_cpu": True, "save_strategy": "steps"},
    }
    recipe["data"]["chat_template_kwargs"] = {"api_key": SECRET, "eos_token": "<|im_end|>"}
    recipe["training"] |= {"max_steps": 2, "save_steps": 1, "logging_steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    extra = {"hub_token": SECRET, "run_name": f"https://me:{SECRET}@host/run"}
    words = ["train", str(folder / "recipe.yaml"), "--training.extra", json.dumps(extra)]
    assert main(words) == 0
    return folder / "run"


def files_with(folder, text):
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and text.encode() in path.read_bytes()
    ]


def test_no_file_of_a_run_has_a_secret(run):
    names = {path.name for path in run.rglob("*")}
    assert {"report.html", "README.md", "recipe.yaml", "run.json", "training_args.bin"} <= names
    assert (run / "checkpoint-1" / "training_args.bin").is_file()
    assert files_with(run, SECRET) == []
    saved = torch.load(run / "training_args.bin", weights_only=False)
    assert saved.hub_token is None and saved.run_name == "https://host/run"
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["training"]["extra"] == {"run_name": "https://host/run"}
    assert recipe["data"]["chat_template_kwargs"] == {"eos_token": "<|im_end|>"}


def test_a_report_drops_the_secrets_of_an_older_folder(run, tmp_path):
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    text = recipe.replace("extra:\n", f"extra:\n    hub_token: {SECRET}\n")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["config"]["hub_token"] = SECRET
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert text != recipe
    write_report(tmp_path)
    assert files_with(tmp_path, SECRET) == ["recipe.yaml", "run.json"]
    assert "chat_template_kwargs" in (tmp_path / "report.html").read_text(encoding="utf-8")
