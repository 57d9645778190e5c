"""SIGTERM ends a command as Ctrl-C does: cleaned up, one line, exit code 143."""

import os
import signal
import subprocess
import sys

import pytest

from prefopt.cli import main
from prefopt.cli.exit import Terminated, sigterm_raises
from prefopt.files import only_writer, temporary

FORK = """
import multiprocessing, sys, time
from pathlib import Path
from prefopt.cli.exit import sigterm_raises

def work():
    print("works", flush=True)
    time.sleep(600)

with sigterm_raises():
    try:
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        time.sleep(0.2)
        child.terminate()
        child.join()
        print(child.exitcode, flush=True)
    finally:
        print("cleaned up", flush=True)
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\ntraining: {output_dir: run}\n", encoding="utf-8")
    return path


def test_train_is_cleaned_up_and_names_resume(recipe, tmp_path, monkeypatch, capsys):
    def killed(*_, **__):
        with only_writer(tmp_path / "run", "--out"), temporary(tmp_path / "run" / "x") as scratch:
            scratch.touch()
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")

    monkeypatch.setattr("prefopt.recipe.run_recipe", killed)
    assert main(["train", str(recipe)]) == 143
    error = capsys.readouterr().err
    assert (
        error
        == "prefopt: terminated; the same command with --resume continues from the last checkpoint, if there is one\n"
    )
    assert list(tmp_path.iterdir()) == [recipe]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_code_that_goes_on_after_ctrl_c_ends_and_the_cleanup_is_not_interrupted():
    done = []
    with pytest.raises(Terminated) as end, sigterm_raises():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            pytest.fail("went on")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(1)
    assert end.value.code == 143 and done == [1]


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with sigterm_raises():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_worker_ends_at_once():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}
    done = subprocess.run([sys.executable, "-c", FORK], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["works", str(-signal.SIGTERM), "cleaned up"], done.stderr
