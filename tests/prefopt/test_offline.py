"""With a local model and local rows nothing reaches for the network, runs foreign code or asks on stdin."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt.cli import main
from prefopt.errors import UserError
from prefopt.models import from_pretrained
from prefopt.runs import find_run, load_model
from support.tiny_models import make_model, make_rows, make_tokenizer

ROOT = Path(__file__).parents[2]
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.slow
def test_local_files_need_no_network(tmp_path):
    found = [
        name
        for name, packages in (("nf4", ["bitsandbytes"]), ("kernels", ["bitsandbytes", "kernels"]))
        if all(map(find_spec, packages))
    ]
    env = {name: value for name, value in os.environ.items() if name not in OFFLINE}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "tests")))
    env["HF_HOME"] = str(tmp_path / "empty-cache")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "no_network.py", tmp_path, *found],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tried"] == []
    commands = ("train", "eval", "chat", "export", "report")
    assert result["codes"] == dict.fromkeys(commands, 0)


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    """A model whose architecture comes with it as Python code, and its rows."""
    folder = tmp_path_factory.mktemp("custom")
    tokenizer = make_tokenizer(folder / "model")
    make_model("llama", len(tokenizer), folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model" / "own.py").write_text(CODE, encoding="utf-8")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(True))
    return folder


@pytest.fixture
def no_stdin(monkeypatch):
    def asked(*_):
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("sys.stdin.readline", asked, raising=False)


def recipe_of(custom, folder, **model):
    recipe = {
        "model": {"path": str(custom / "model"), **model},
        "data": {"path": str(custom / "rows.jsonl")},
        "lora": {"r": 2},
        "training": {"output_dir": str(folder / "run"), "max_steps": 1, "use_cpu": True},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return str(path)


def test_a_model_with_custom_code_is_refused_with_the_option(custom, tmp_path, capsys, no_stdin):
    assert main(["train", recipe_of(custom, tmp_path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("prefopt: ") and "model.trust_remote_code to true" in said
    assert "Python code of its own" in said and not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("kind", [AutoConfig, AutoModelForCausalLM])
def test_every_auto_class_refuses_it(custom, kind, no_stdin):
    with pytest.raises(UserError, match="^cannot load it: .*model.trust_remote_code to true"):
        from_pretrained(kind, str(custom / "model"), "cannot load it")


def test_a_trusted_model_trains_and_its_run_loads_again(custom, tmp_path, no_stdin):
    assert main(["train", recipe_of(custom, tmp_path, trust_remote_code=True)]) == 0
    found = find_run(tmp_path / "run")
    assert found.trust_remote_code
    assert load_model(found).config.model_type == "own"
    recipe = tmp_path / "run" / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("trust_remote_code: true", "trust_remote_code: false"))
    with pytest.raises(UserError, match="model.trust_remote_code to true"):
        load_model(find_run(tmp_path / "run"))
