"""What is needed to repeat a run: every option of every method, the data it was built from, and memory."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from prefopt.data.build.plan import make_plan
from prefopt.data.build.run import build
from prefopt.options import OPTIONS, in_force, options_of
from prefopt.report import write_report
from prefopt.report.facts import (
    TRAINING,
    format_value,
    main_settings,
    memory,
    model_settings,
    other_settings,
    resumes,
    source_table,
)
from prefopt.report.read import Run, read_run
from prefopt.train import PreferenceConfig
from prefopt.train.methods import METHODS

QUESTIONS = Path(__file__).parents[1] / "fixtures" / "eval" / "mmlu_pro.jsonl"


@pytest.mark.parametrize("method", METHODS)
def test_every_option_in_force_is_among_the_main_settings(method, tmp_path):
    config = PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, method=method).to_dict()
    found = main_settings(Run(tmp_path, record={"method": method, "config": config}))
    expected = in_force({"method": method})
    assert {name: found[name] for name in OPTIONS if name in found} == expected
    assert found["method"] == method and None not in found.values()
    rest = other_settings(Run(tmp_path, record={"config": config}))
    assert not rest.keys() & found.keys() and rest["output_dir"] == str(tmp_path)


def test_the_recipe_knows_every_option_of_every_method():
    assert set(OPTIONS) <= options_of("loss").keys()
    assert set(TRAINING) <= {option.name for option in fields(PreferenceConfig)}


def test_rows_in_a_step_are_those_of_all_processes():
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "max_steps": -1}
    found = main_settings(Run(Path("run"), record={"config": config, "world_size": 4}))
    assert found["rows or pairs in an optimizer step"] == 64 and "max_steps" not in found


def test_resumes_with_what_they_changed():
    rows = [
        {"at": "2026-01-02T03:04:05+00:00", "from_step": 0, "checkpoint": None, "changed": {}},
        {"at": "2026-01-02T04:04:05+00:00", "from_step": 4, "changed": {"training.max_steps": [4, 6]}},
    ]  # fmt: skip
    assert resumes(Run(Path("run"), record={"resumes": rows})) == [
        ["2026-01-02T03:04:05+00:00", "0", "nothing"],
        ["2026-01-02T04:04:05+00:00", "4", "training.max_steps: 4 to 6"],
    ]
    assert resumes(Run(Path("run"))) == []


def test_model_and_adapter_without_a_local_path():
    run = Run(
        Path("run"),
        record={"model": {"parameters": 968768, "softcap": None}, "reference": {"kind": "adapter off"}},
        adapter={"r": 16, "lora_dropout": 0.0, "use_dora": False, "base_model_name_or_path": "/x/y"},
        options={"model": {"path": "/x/y", "revision": "abc", "dtype": "float32"}},
    )  # fmt: skip
    assert model_settings(run) == {
        "model: parameters": 968768,
        "model: revision": "abc",
        "model: dtype": "float32",
        "reference model": "adapter off",
        "LoRA rank": 16,
        "LoRA dropout": 0.0,
    }


def test_memory_in_mebibytes_on_page_and_card(tmp_path):
    figures = {
        "before_bytes": 3 * 2**20,
        "peak_bytes": 2**31,
        "reserved_peak_bytes": 3 * 2**30,
        "after_bytes": None,
        "what": "allocated by torch",
        "device": "a GPU",
    }
    (tmp_path / "memory.json").write_text(json.dumps(figures), encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    run = read_run(tmp_path)
    assert memory(run) == {
        "before training": "3 MiB",
        "at the peak": "2,048 MiB (3,072 MiB reserved)",
        "of": "allocated by torch",
        "device": "a GPU",
    }
    assert ">2,048 MiB (3,072 MiB reserved)</td>" in page
    assert "| at the peak | 2,048 MiB (3,072 MiB reserved) |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "memory.json").write_text('{"device": "cpu"}', encoding="utf-8")
    assert memory(read_run(tmp_path)) == {}


def test_what_built_data_came_from(tmp_path):
    built = build(make_plan([f"mmlu-pro:{QUESTIONS}"], test=0.5, one_label=True), tmp_path / "data")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.json").write_text("{}", encoding="utf-8")
    (run_dir / "recipe.yaml").write_text(f"data: {{path: {built.folder}}}\n", encoding="utf-8")
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert source_table(read_run(run_dir))[1] == [["mmlu-pro", "mmlu-pro", "a local file", None, 28]]
    assert "answers made of them        28   28" in page
    card = (run_dir / "README.md").read_text(encoding="utf-8")
    assert "| mmlu-pro | mmlu-pro | a local file |  | 28 |" in card and str(tmp_path) not in card
    (built.folder / "manifest.json").write_text("{", encoding="utf-8")
    assert "manifest or the counts of the built data cannot be read" in read_run(run_dir).notes[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-06, "1e-06"), (float("nan"), "not a finite number"), ([0.5, 2.0], "0.5, 2"), ({}, "{}")],
)
def test_format_of_settings(value, text):
    assert format_value(value) == text
