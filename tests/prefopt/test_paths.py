"""A run folder works from any folder, and after its project has moved as a whole."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from prefopt.cli import main
from prefopt.paths import absolute_paths, path_from, paths_from
from prefopt.recipe import load_recipe
from prefopt.runs import find_run
from support.evaluate import write_lines
from support.tiny_models import make_model, make_rows, make_tokenizer

CONTENT = {
    "model": {"path": "models/x", "ref_path": None, "revision": None},
    "data": {"path": "rows.jsonl", "eval_path": "org/set", "plan": None, "chat_template": "dialogue"},
    "lora": None,
    "training": {"output_dir": "runs/kto", "seed": 3},
}  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The current folder, with what CONTENT names."""
    folder = tmp_path / "project"
    for name in ("models/x", "runs/kto", "dialogue"):
        (folder / name).mkdir(parents=True)
    (folder / "rows.jsonl").touch()
    monkeypatch.chdir(folder)
    return folder


def test_local_paths_become_absolute_and_names_stay(project, tmp_path, monkeypatch):
    stored = absolute_paths(CONTENT)
    assert stored == {
        "model": {"path": f"{project}/models/x", "ref_path": None, "revision": None},
        "data": CONTENT["data"] | {"path": f"{project}/rows.jsonl"},
        "lora": None,
        "training": {"output_dir": f"{project}/runs/kto", "seed": 3},
    }
    assert absolute_paths(stored) == stored
    again = {
        **CONTENT,
        "model": {"path": "../project/models/x", "ref_path": None, "revision": None},
    }
    assert absolute_paths(again) == stored
    monkeypatch.chdir(tmp_path)
    assert absolute_paths(CONTENT) != stored
    # a plan's data folder and a file that is missing are local, too; so is a plan's file
    data = {"path": "data/set", "plan": "mine.yaml", "eval_path": "no.jsonl"}
    assert absolute_paths({"data": data})["data"] == {
        "path": f"{tmp_path}/data/set",
        "plan": f"{tmp_path}/mine.yaml",
        "eval_path": f"{tmp_path}/no.jsonl",
    }


@pytest.mark.parametrize("absolute", [True, False])
def test_paths_are_found_after_a_move(project, tmp_path, monkeypatch, absolute):
    """Relative ones are those of runs of earlier versions."""
    stored = absolute_paths(CONTENT) if absolute else CONTENT
    (project / "rows.jsonl").write_text("kept", encoding="utf-8")
    moved = tmp_path / "elsewhere" / "deeper"
    moved.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.move(project, moved)
    found = paths_from(stored, Path("elsewhere/deeper/runs/kto"))
    assert found["model"]["path"] == f"{moved}/models/x"
    assert found["data"] == CONTENT["data"] | {"path": f"{moved}/rows.jsonl"}
    assert found["training"] == {"output_dir": f"{moved}/runs/kto", "seed": 3}
    # through a link to the run folder
    Path("latest").symlink_to(moved / "runs" / "kto")
    assert paths_from(stored, Path("latest"))["data"]["path"] == f"{moved}/rows.jsonl"


def test_what_is_where_it_was_stays_there_and_what_is_nowhere_stays_as_it_is(project, tmp_path):
    stored = absolute_paths(CONTENT)
    copied = tmp_path / "copied"
    shutil.copytree(project / "runs", copied / "runs")
    assert paths_from(stored, copied / "runs" / "kto")["model"] == stored["model"]
    shutil.rmtree(project / "models")
    assert paths_from(stored, copied / "runs" / "kto")["model"] == stored["model"]
    # nothing but the root in common: the one did not move with the other
    assert path_from("/nowhere/models", "/old/runs", tmp_path / "x") == "/nowhere/models"
    assert path_from("org/model", "/old/runs", project) == "org/model"


# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project whose run was trained by relative paths, one of which looks like a hub id."""
    folder = tmp_path_factory.mktemp("trained") / "project"
    make_model("llama", len(make_tokenizer(folder / "models" / "x")), folder / "models" / "x")
    write_lines(folder / "rows.jsonl", make_rows(True))
    recipe = {
        "model": {"path": "models/x"},
        "data": {"path": "rows.jsonl", "eval_fraction": 0.3, "max_length": 128},
        "lora": {"r": 2},
        "training": {
            "output_dir": "runs/kto",
            "use_cpu": True,
            "max_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
        },
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "mine.yaml"]) == 0
    return folder


@pytest.fixture(params=["elsewhere", "moved"])
def run(request, trained, tmp_path, monkeypatch):
    """The run folder, from another current folder or in a project that was moved there."""
    project = tmp_path / "new" / "place"
    monkeypatch.chdir(tmp_path)
    if request.param == "elsewhere":
        shutil.copytree(trained, project.parent / "copy")  # used in place, but each test has its own
        yield trained / "runs" / "kto"
        shutil.rmtree(trained)
        shutil.move(project.parent / "copy", trained)
        return
    hidden = trained.with_name("hidden")
    shutil.copytree(trained, project)
    trained.rename(hidden)
    yield project / "runs" / "kto"
    hidden.rename(trained)


def test_every_command_works_from_anywhere(run, tmp_path, capsys):
    project = run.parents[1]
    assert find_run(run).base == f"{project}/models/x"
    assert find_run(run / "checkpoint-1").base == f"{project}/models/x"
    assert main(["eval", str(run), "--suite", "preference", "--limit", "2"]) == 0
    scores = json.loads((run / "eval.json").read_text(encoding="utf-8"))["suites"]["preference"]
    assert {one["n"] for one in scores["scores"]} == {2}
    assert {one["name"] for one in scores["data"].values()} == {"rows.jsonl"}
    words = ["--labels", "Jupiter is the largest planet.,No.", "--out", "answers.csv"]
    assert main(["classify", str(run), str(project / "rows.jsonl"), *words]) == 0
    assert len(list(csv.DictReader((tmp_path / "answers.csv").open(encoding="utf-8")))) == 20
    assert main(["export", str(run), "--format", "merged", "--out", "merged"]) == 0
    assert main(["report", str(run)]) == 0
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert str(tmp_path) not in card and str(project) not in card


def test_training_goes_on_from_the_runs_own_recipe(run, capsys):
    words = ["train", str(run / "recipe.yaml"), "--training.max_steps", "2"]
    assert main(words) == 2
    assert f"training.output_dir {run} is not empty" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert max(json.loads(line)["step"] for line in lines) == 2
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == f"{run.parents[1]}/models/x"


def test_what_is_not_found_is_named_with_the_option_that_replaces_it(trained, tmp_path, monkeypatch, capsys):
    run = tmp_path / "deep" / "down" / "kto"  # the run alone
    shutil.copytree(trained / "runs" / "kto", run)
    base, rows = trained / "models" / "x", trained / "rows.jsonl"
    hidden = trained.with_name("hidden")
    trained.rename(hidden)
    monkeypatch.chdir(tmp_path)

    def said(*words: str) -> str:
        assert main(list(words)) == 2
        return capsys.readouterr().err

    try:
        evaluated = ("eval", str(run), "--suite", "preference")
        assert f"the base model {base} of {run} is not there; name" in said(*evaluated)
        assert "with --base" in said("chat", str(run))
        evaluated += ("--base", str(hidden / "models" / "x"))
        assert f"no file or folder {rows}; name the rows by --data" in said(*evaluated)
        assert main([*evaluated, "--data", str(hidden / "rows.jsonl"), "--limit", "2"]) == 0
        capsys.readouterr()
        train = ("train", str(run / "recipe.yaml"), "--resume")
        assert f"model.path is {base}, which is not a folder" in said(*train)
        train += ("--model.path", str(hidden / "models" / "x"))
        assert f"data.path is {rows}, which does not exist; name the rows by --data.path" in said(*train)
        train += ("--data.path", str(hidden / "rows.jsonl"))
        assert main([*train, "--max_steps", "3"]) == 0
    finally:
        hidden.rename(trained)


def test_an_exported_adapter_names_no_path_of_this_machine(trained, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(trained / "runs/kto"), "--format", "adapter", "--out", str(out)]) == 0
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "x"
    texts = [one.read_text(encoding="utf-8") for one in out.iterdir() if one.suffix in (".json", ".md")]
    assert len(texts) > 3 and not any(str(trained) in text for text in texts)


def test_a_recipe_beside_a_run_is_read_as_it_is(trained, monkeypatch):
    assert load_recipe(trained / "mine.yaml").training.output_dir == "runs/kto"
