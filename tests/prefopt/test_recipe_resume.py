"""`--resume`: the same experiment or a refusal, nothing for a finished run, and folders that can be used again."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

import prefopt.recipe.run
import prefopt.report.write
from prefopt.errors import UserError
from prefopt.recipe import load_recipe, make_recipe, run_recipe
from prefopt.train import PreferenceTrainer
from prefopt.train.checkpoint import CheckpointError
from support.kill_campaign import make_base, make_recipe_file, result_of
from support.tiny_models import make_rows


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    """Plots take longer than all the rest of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefopt.report.write, "drawable", lambda run: [])
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(folder)
    return folder


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A recipe of 4 steps that has run to its end, with a checkpoint at 2 and 4."""
    recipe = make_recipe_file(base, tmp_path_factory.mktemp("whole") / "of", "kto", max_steps=4)
    run_recipe(load_recipe(recipe))
    return recipe


@pytest.fixture
def recipe(whole, tmp_path):
    """A copy of it, run folder included, at its own place."""
    folder = Path(shutil.copytree(whole.parent, tmp_path / "copy"))
    content = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    content["training"]["output_dir"] = str(folder / "run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / "recipe.yaml"


def resume(recipe: Path, **overrides: object) -> Path:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return run_recipe(load_recipe(recipe, dotted), resume=True)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "budget",
    [
        {},
        {"training__max_steps": 3},
        {"training__max_steps": -1, "training__num_train_epochs": 0.5},  # 2 of 4 steps an epoch
        {"training__max_steps": -1, "training__num_train_epochs": 1.0},
    ],
)
def test_a_finished_run_is_left_as_it_is(recipe, caplog, budget):
    run = recipe.with_name("run")
    before = contents(run)
    assert record_of(run)["steps"] == {"planned": 4, "per_epoch": 4, "done": 4}
    assert resume(recipe, **budget) == run
    assert contents(run) == before
    assert f"{run}: training is finished (step 4); nothing is changed" in caplog.text


def test_half_an_epoch_is_finished_too(base, tmp_path):
    recipe = make_recipe_file(base, tmp_path / "half", "kto", max_steps=-1, num_train_epochs=0.4)
    run = run_recipe(load_recipe(recipe))
    assert record_of(run)["steps"] == {"planned": 2, "per_epoch": 4, "done": 2}
    before = contents(run)
    resume(recipe)
    assert contents(run) == before


def test_a_finished_run_without_checkpoints_cannot_be_made_longer(recipe):
    run = recipe.with_name("run")
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = contents(run)
    with pytest.raises(UserError, match="is finished and has no checkpoint to continue from"):
        resume(recipe, training__max_steps=6)
    assert contents(run) == before


def test_what_is_not_budget_logging_saving_or_evaluation_is_refused(recipe):
    run = recipe.with_name("run")
    before = contents(run)
    with pytest.raises(UserError) as error:
        resume(
            recipe,
            loss__beta=0.2,
            loss__method="apo_zero",
            loss__kl_estimator=None,
            training__seed=7,
            training__max_steps=6,
            training__extra={"adam_beta1": 0.8, "run_name": "again"},
            data__max_length=None,
            lora=None,
        )
    assert str(error.value).splitlines() == [
        f"{recipe}: --resume continues the run in {run}, but the recipe differs from its recipe.yaml:",
        "  data.max_length: 128 in the run, null now",
        *[line for line in str(error.value).splitlines() if line.startswith("  lora: {")],
        '  loss.method: "kto" in the run, "apo_zero" now',
        "  loss.beta: 0.1 in the run, 0.2 now",
        '  loss.kl_estimator: "window" in the run, null now',
        '  loss.kl_rows: "all" in the run, null now',
        "  training.seed: 42 in the run, 7 now",
        "  training.extra.adam_beta1: null in the run, 0.8 now",
        "Set these options back, or start a new run in another folder",
    ]
    assert "null now" in str(error.value).splitlines()[2]
    assert contents(run) == before


def test_the_same_path_in_other_words_is_the_same(recipe, base, monkeypatch, caplog):
    monkeypatch.chdir(base)
    resume(recipe, model__path="./model", data__path="rows.jsonl")
    assert "nothing is changed" in caplog.text


def test_rows_that_changed_under_their_path_are_refused(whole, tmp_path):
    rows = make_rows(True)
    content = yaml.safe_load(whole.read_text(encoding="utf-8"))
    content["data"]["path"] = str(tmp_path / "rows.jsonl")
    content["training"] |= {"output_dir": str(tmp_path / "run"), "max_steps": 2}
    write_rows(tmp_path / "rows.jsonl", rows)
    run = run_recipe(make_recipe(content))
    before = contents(run)
    rows[3]["label"] = not rows[3]["label"]
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as error:
        run_recipe(make_recipe(content, {"training.max_steps": 4}), resume=True)
    assert "the rows of data.path, or the tokenizer that encodes them, have changed (" in str(error.value)
    assert contents(run) == before


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_longer_budget_goes_on_and_is_written_down(recipe, caplog):
    run = resume(recipe, training__max_steps=6, training__logging_steps=1)
    assert "the run now has 6 steps instead of 4: from here on the learning rate follows" in (caplog.text)
    record = record_of(run)
    (row,) = record["resumes"]
    assert row.pop("at").endswith("+00:00")
    changed = {"training.max_steps": [4, 6], "training.logging_steps": [3, 1]}
    assert row == {"from_step": 4, "checkpoint": "checkpoint-4", "changed": changed}
    assert record["steps"]["done"] == 6 and record["complete"] is True
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logs = [json.loads(line) for line in lines]
    assert [log["step"] for log in logs if "loss" in log] == [3, 5, 6]
    # linear, of 6 steps: the schedule of 4 steps would have ended at 0
    rates = [log["learning_rate"] for log in logs if log.get("step") in (5, 6) and "loss" in log]
    assert rates == pytest.approx([1e-3 * 2 / 6, 1e-3 * 1 / 6])
    assert sum("train_runtime" in log for log in logs) == 1  # that of the shorter run is gone
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Training was resumed" in page and "training.max_steps: 4 to 6" in page
    stored = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    assert stored["training"]["max_steps"] == 6
    resume(recipe, training__max_steps=8)
    assert [row["from_step"] for row in record_of(run)["resumes"]] == [4, 6]


@pytest.mark.parametrize("at", ["_write_summary", "write_report", "PreferenceTrainer.save_model"])
def test_a_run_that_stopped_after_its_last_step_only_finishes(whole, tmp_path, monkeypatch, at):
    expected = result_of(whole.with_name("run"))
    content = yaml.safe_load(whole.read_text(encoding="utf-8"))
    content["training"]["output_dir"] = str(tmp_path / "run")

    def gone(*args, **kwargs):
        if kwargs.get("_internal_call") or (len(args) > 2 and args[2] is True):
            return save(*args, **kwargs)  # of a checkpoint
        raise KeyboardInterrupt

    save = PreferenceTrainer.save_model
    owner, name = (PreferenceTrainer, "save_model") if "." in at else (prefopt.recipe.run, at)
    monkeypatch.setattr(owner, name, gone)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(make_recipe(content))
    monkeypatch.undo()
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "eval_lo')  # as if killed in the middle of a line
    forbid_steps(monkeypatch)
    run_recipe(make_recipe(content), resume=True)
    assert result_of(tmp_path / "run") == expected


def forbid_steps(monkeypatch) -> None:
    def step(*_, **__):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(PreferenceTrainer, "training_step", step)


def test_a_folder_whose_start_failed_is_used_again_without_resume(whole, tmp_path, monkeypatch):
    content = yaml.safe_load(whole.read_text(encoding="utf-8"))
    content["training"]["output_dir"] = str(tmp_path / "run")
    wrong = copy.deepcopy(content)
    wrong["data"] |= {"on_bad_row": "skip", "path": str(tmp_path / "rows.jsonl")}
    write_rows(tmp_path / "rows.jsonl", [*make_rows(True), {"prompt": "no answer"}])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        forbid_steps(patch)
        run_recipe(make_recipe(wrong))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"run.json", "recipe.yaml", "bad_rows.jsonl", "memory.json", "metrics.jsonl"}
    run = run_recipe(make_recipe(content))
    assert not (run / "bad_rows.jsonl").exists()  # of the start that failed
    assert result_of(run) == result_of(whole.with_name("run"))
    assert "resumes" not in record_of(run)
    with pytest.raises(UserError, match="is not empty; choose another"):
        run_recipe(make_recipe(content))


def test_a_run_without_a_whole_checkpoint_is_left_as_it_is(recipe):
    run = recipe.with_name("run")
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "scheduler.pt").unlink()
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"checkpoint-4: scheduler\.pt is missing; checkpoint-2"):
        resume(recipe, training__max_steps=6)
    assert contents(run) == before


def test_a_folder_with_something_else_is_not_resumed(whole, tmp_path):
    content = yaml.safe_load(whole.read_text(encoding="utf-8"))
    content["training"]["output_dir"] = str(tmp_path)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"has no recipe\.yaml, so there is no run to resume"):
        run_recipe(make_recipe(content), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
