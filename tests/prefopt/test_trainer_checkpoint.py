"""Checkpoints: whole or absent, verified before a run resumes from one, rotated, and the best one found again."""

import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import prefopt.train.checkpoint as checkpoints
from prefopt.errors import RunError
from prefopt.train.checkpoint import MANIFEST, PARTIAL, CheckpointError, newest_whole, problem_of
from support.tiny_models import make_rows
from support.trainer import make_trainer, make_world, train

OPTIONS = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "linear",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run of four steps, with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(make_trainer(world, folder, **OPTIONS))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if "checkpoint" in path.name}


def test_the_manifest_has_every_file_with_its_size_and_digest(finished):
    checkpoint = finished / "checkpoint-4"
    files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    found = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != MANIFEST}
    assert files == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in found.items()
    }
    expected = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"}
    assert expected | {"trainer_state.json", "prefopt_state.json"} <= set(files)
    assert problem_of(checkpoint) is None
    assert names(finished) == {"checkpoint-2", "checkpoint-4"}


def test_every_file_that_is_missing_cut_or_changed_is_named(run):
    checkpoint = run / "checkpoint-4"
    for path in sorted(checkpoint.iterdir()):
        if path.name == MANIFEST:
            continue
        content = path.read_bytes()
        path.unlink()
        assert problem_of(checkpoint) == f"{path.name} is missing"
        path.write_bytes(content[:-1])
        expected = f"{path.name} has {len(content) - 1} bytes; expected {len(content)}"
        assert problem_of(checkpoint) == expected
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        changed = f"{path.name} has changed since it was saved (its sha256 differs)"
        assert problem_of(checkpoint) == changed
        path.write_bytes(content)
    assert problem_of(checkpoint) is None
    (checkpoint / MANIFEST).write_text('{"files"', encoding="utf-8")
    assert problem_of(checkpoint).startswith(f"{MANIFEST} cannot be read (")


@pytest.mark.parametrize("files", ["{}", "[1]", '{"optimizer.pt": {}}', '{"trainer_state.json": {"bytes": 1}}', "3"])
def test_a_manifest_that_lists_nothing_is_not_trusted(run, files):
    (run / "checkpoint-4" / MANIFEST).write_text(f'{{"files": {files}}}', encoding="utf-8")
    assert problem_of(run / "checkpoint-4") == (
        f"{MANIFEST} cannot be read (it does not list the files of a checkpoint with sizes and digests)"
    )
    assert newest_whole(run) == run / "checkpoint-2"


def test_without_a_manifest_files_have_to_be_there_and_open(run):
    """As Trainer and earlier versions saved them; a cut file is found by its format."""
    checkpoint = run / "checkpoint-4"
    (checkpoint / MANIFEST).unlink()
    assert problem_of(checkpoint) is None
    for name in ("optimizer.pt", "scheduler.pt", "model.safetensors", "prefopt_state.json"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        assert problem_of(checkpoint).startswith(f"{name} ")
        (checkpoint / name).write_bytes(content)
    (checkpoint / "optimizer.pt").unlink()
    assert "optimizer.pt are missing" in problem_of(checkpoint)


def test_resume_takes_the_newest_whole_checkpoint_and_says_which_it_passed_over(run, caplog):
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    (run / PARTIAL / "checkpoint-6").mkdir(parents=True)
    assert newest_whole(run) == run / "checkpoint-2"
    message = "passed over checkpoint-4: optimizer.pt is missing; resuming from checkpoint-2"
    assert message in caplog.text
    (run / "checkpoint-2" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        newest_whole(run)
    size = json.loads((run / "checkpoint-2" / MANIFEST).read_text())["files"]["scheduler.pt"]
    assert str(error.value) == (
        f"{run} has no whole checkpoint to resume from (checkpoint-4: optimizer.pt is missing; checkpoint-2: "
        f"scheduler.pt has 0 bytes; expected {size['bytes']}); remove them to start from the beginning"
    )
    shutil.rmtree(run / "checkpoint-2")
    shutil.rmtree(run / "checkpoint-4")
    assert newest_whole(run) is None


def test_a_trainer_refuses_a_damaged_checkpoint_before_it_writes(world, run):
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    trainer = make_trainer(world, run, **OPTIONS)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 cannot be .*: optimizer\.pt is missing"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    with pytest.raises(CheckpointError, match=r"checkpoint-3 cannot be .*: there is no such folder"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
        make_trainer(world, run.with_name("empty"), **OPTIONS).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_manifest_is_resumed_with_a_warning(world, run, caplog):
    (run / "checkpoint-4" / MANIFEST).unlink()
    (run / "checkpoint-4" / "trainer_state.json").unlink()  # the file that used to be written last
    (run / "checkpoint-2" / MANIFEST).unlink()
    resumed = make_trainer(world, run, **OPTIONS)
    train(resumed, resume_from_checkpoint=True)
    assert f"checkpoint-2 has no {MANIFEST}: prefopt did not save it, or an earlier" in caplog.text
    assert f"checkpoint-4: {MANIFEST} and trainer_state.json are missing" in caplog.text
    assert problem_of(run / "checkpoint-4") is None  # saved again


def test_a_run_with_all_its_steps_takes_no_further_one(world, run):
    saved = torch.load(run / "checkpoint-4" / "optimizer.pt")["state"][0]["step"]
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    again = make_trainer(world, run, **OPTIONS)
    train(again, resume_from_checkpoint=True)
    assert again.state.global_step == 4 and saved == 4
    assert again.optimizer.state_dict()["state"][0]["step"] == 4
    assert (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:-1] == lines[:-1]
    # the last line has the times of the call, and the mean loss of the whole run
    last, first = (json.loads(text)["train_loss"] for text in (lines[-1], _last_line(run)))
    losses = [json.loads(line)["loss"] for line in lines[:-1]]
    assert last == first == pytest.approx(sum(losses) / 4, rel=1e-12)


def _last_line(run: Path) -> str:
    return (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]


def test_the_best_checkpoint_has_its_final_path_and_outlives_rotation(world, tmp_path):
    options = OPTIONS | {
        "save_steps": 1,
        "eval_dataset": make_rows(True)[:6],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 0.5,  # far too large: the first step is the best
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "save_total_limit": 2,
    }
    trainer = make_trainer(world, tmp_path / "run", **options)
    train(trainer)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses)) + 1
    path = tmp_path / "run" / f"checkpoint-{best}"
    assert best < 4 and trainer.state.best_model_checkpoint == str(path)
    assert names(tmp_path / "run") == {f"checkpoint-{best}", "checkpoint-4"}
    for checkpoint in (path, tmp_path / "run" / "checkpoint-4"):
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        assert state["best_model_checkpoint"] == str(path)
        assert problem_of(checkpoint) is None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_a_checkpoint_that_is_saved_again_replaces_the_old_one(world, run):
    (run / "checkpoint-4" / "old.txt").write_text("of the earlier run", encoding="utf-8")
    train(make_trainer(world, run, **OPTIONS), resume_from_checkpoint=str(run / "checkpoint-2"))
    assert names(run) == {"checkpoint-2", "checkpoint-4"}
    assert not (run / "checkpoint-4" / "old.txt").exists()
    assert problem_of(run / "checkpoint-4") is None


@pytest.mark.parametrize("where", ["torch.save", "manifest"])
def test_a_full_disk_leaves_the_checkpoint_before_it(world, tmp_path, monkeypatch, where):
    run = tmp_path / "run"
    if where == "torch.save":  # its own error, in its own words
        save = torch.save

        def full(content, path, *args, **kwargs):
            if "checkpoint-4" in str(path) and "scheduler" in str(path):
                raise RuntimeError("PytorchStreamWriter failed writing file data.pkl: write failed")
            save(content, path, *args, **kwargs)

        monkeypatch.setattr(torch, "save", full)
    else:
        sync = checkpoints._sync

        def full(path):
            if path.match("checkpoint-4/" + MANIFEST):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            sync(path)

        monkeypatch.setattr(checkpoints, "_sync", full)
    trainer = make_trainer(world, run, **OPTIONS)
    with pytest.raises(RunError) as error:
        train(trainer)
    monkeypatch.undo()
    message = str(error.value)
    assert message.startswith(f"{run / 'checkpoint-4'} could not be saved (") and "\n" not in message
    assert message.endswith("; the last one is checkpoint-2. Check the free space, then resume the run")
    assert names(run) == {"checkpoint-2"}
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    resumed = make_trainer(world, run, **OPTIONS)
    train(resumed, resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and names(run) == {"checkpoint-2", "checkpoint-4"}
