"""One writer a folder: a second one is refused with the holder's pid and host, a killed one is no hindrance."""

import json
import os
import socket
import subprocess
import sys

import pytest
import yaml

from prefopt.cli import main
from prefopt.errors import UserError
from prefopt.files import LOCK_NAME, is_unused, only_writer
from prefopt.recipe import make_recipe, run_recipe
from support.evaluate import make_run

HOLD = """
import sys, time
from pathlib import Path
from prefopt.files import only_writer
with only_writer(Path(sys.argv[1]), "--out"):
    print("held", flush=True)
    time.sleep(600)
"""
HERE = f"process {os.getpid()} on {socket.gethostname()}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of make_run, with the recipe that it was trained by."""
    return make_run(tmp_path_factory.mktemp("run"))


def test_a_killed_process_is_no_hindrance(tmp_path):
    folder = tmp_path / "runs" / "kto"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refused, only_writer(folder, "--out"):
            pass
        holder.kill()
    assert str(refused.value) == (
        f"--out {folder} is being written by process {holder.pid} on {socket.gethostname()}; wait until it ends, or "
        "choose another folder"
    )
    assert [one.name for one in folder.iterdir()] == [LOCK_NAME] and is_unused(folder)
    with only_writer(folder, "--out"):
        (folder / "file").touch()
    assert [one.name for one in folder.iterdir()] == ["file"] and not is_unused(folder)


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    with pytest.raises(KeyError), only_writer(tmp_path / "a" / "b", "--out"):
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with only_writer(tmp_path / "mine", "--out"):
        pass
    assert (tmp_path / "mine").is_dir()
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="--out .*file is a file; expected a folder"),
        only_writer(tmp_path / "file", "--out"),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["train", "RECIPE", "--training.output_dir", "OUT"], "training.output_dir"),
        (["train", "RECIPE", "--training.output_dir", "OUT", "--resume"], "training.output_dir"),
        (["eval", "RUN", "--suite", "preference", "--out", "OUT"], "--out"),
        (["compare", "RECIPE", "--methods", "kto,dpo", "--out", "OUT"], "--out"),
        (["demo", "--out", "OUT"], "--out"),
    ],
    ids=lambda words: "-".join(words[:1]) if isinstance(words, list) else "",
)
def test_every_command_that_fills_a_folder_is_refused(run, words, option, tmp_path, capsys):
    out = tmp_path / "out"
    places = {"RECIPE": run / "recipe.yaml", "OUT": out, "RUN": run}
    with only_writer(out, "--out"):
        before = (out / LOCK_NAME).read_bytes()
        assert main([str(places.get(word, word)) for word in words]) == 2
        assert [one.name for one in out.iterdir()] == [LOCK_NAME]
        assert (out / LOCK_NAME).read_bytes() == before
    captured = capsys.readouterr()
    assert f"{option} {out} is being written by {HERE}; wait until it ends" in captured.err
    assert captured.out == "" and captured.err.count("\n") == 1


def test_a_lock_that_was_left_does_not_make_the_folder_look_used(run, tmp_path):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["training"] |= {"output_dir": str(tmp_path / "run"), "max_steps": 1}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).write_text(f"1\n{socket.gethostname()}\n", encoding="utf-8")
    (tmp_path / "run" / f".run.json.partial-{_dead()}-{socket.gethostname()}").touch()
    folder = run_recipe(make_recipe(recipe | {"lora": {"r": 2}}))
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert [one.name for one in folder.iterdir() if one.name.startswith(".")] == []


def test_only_the_first_process_of_a_distributed_run_takes_the_lock(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["training"] |= {"output_dir": str(tmp_path / "run")}
    recipe["data"] |= {"path": "no.jsonl"}
    with (
        only_writer(tmp_path / "run", "--out"),
        pytest.raises(ValueError, match="data.path is no.jsonl, which does not exist"),  # so past the lock
    ):
        run_recipe(make_recipe(recipe))


def _dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
