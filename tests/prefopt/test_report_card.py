"""The model card: metadata that the hub accepts, and nothing that only this machine knows."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from prefopt.report.facts import hub_id
from prefopt.report.metadata import metadata
from prefopt.report.page import card
from prefopt.report.read import Run, sections
from prefopt.report.summary import summarize

RECIPE = "model:\n  path: Qwen/Qwen3-0.6B\ndata:\n  path: trl-lib/kto-mix-14k\n"
LORA = {"base_model_name_or_path": "Qwen/Qwen3-0.6B", "r": 16}


def a_run(recipe=RECIPE, **parts):
    return Run(Path("run"), recipe=recipe, options=sections(recipe), **parts)


def test_adapter_of_a_hub_model():
    run = a_run(record={"method": "kto"}, adapter=LORA)
    assert metadata(run).to_dict() == {
        "base_model": "Qwen/Qwen3-0.6B",
        "base_model_relation": "adapter",
        "datasets": ["trl-lib/kto-mix-14k"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["kto", "preference-optimization", "prefopt", "lora"],
    }


def test_full_fine_tune_of_a_hub_model():
    found = metadata(a_run(record={"method": "apo_zero"})).to_dict()
    assert found["base_model_relation"] == "finetune" and found["library_name"] == "transformers"
    assert found["tags"] == ["apo-zero", "preference-optimization", "prefopt"]


@pytest.mark.parametrize("recipe", ["", "model: [", "model: 3\n", "model:\n  path: /models/mine\n"])
def test_a_local_model_is_not_named(recipe):
    run = a_run(recipe, adapter={"base_model_name_or_path": "/models/mine"})
    assert not {"base_model", "license"} & metadata(run).to_dict().keys()
    assert "/models/mine" not in card(run, summarize(run))


def test_local_files_are_no_datasets():
    recipe = "data:\n  path: data/rows.jsonl\n"
    assert "datasets" not in metadata(a_run(recipe)).to_dict()


def test_a_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("mine/model") == "mine/model"
    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert hub_id("mine/model") is None


def test_the_hub_library_reads_the_block_back():
    run = a_run(
        record={"method": "kto", "versions": {"torch": "2.13.0"}},
        adapter=LORA,
        summary={"title": "عنوان: *star* <b>"},
        samples=[{"prompt": "كيف؟", "before": "<script>", "after": "بكل سرور!\n\n# no heading"}],
    )
    text = card(run, summarize(run))
    read = ModelCard(text)
    assert read.data.base_model == "Qwen/Qwen3-0.6B" and read.data.library_name == "peft"
    assert yaml.safe_load(text.split("---")[1]) == metadata(run).to_dict()
    assert "# عنوان: \\*star\\* &lt;b&gt;" in text
    assert '<p dir="auto"><b>Question:</b> كيف؟</p>' in text
    assert "<script>" not in text and "\n# no heading" not in text
