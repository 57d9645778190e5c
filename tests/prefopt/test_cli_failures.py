"""No traceback reaches a user: one sentence, exit code 2 for input and 1 for the rest, the traceback in a file."""

import io
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from prefopt.cli import main
from prefopt.train import NonFiniteError

RECIPE = "model: {path: m}\ndata: {path: d.jsonl}\ntraining: {output_dir: run}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a recipe, in which the run is whatever a test makes of ``run_recipe``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def fails_with(monkeypatch, error):
    def run(*_, **__):
        raise error

    monkeypatch.setattr("prefopt.recipe.run_recipe", run)


def os_error(number: int, name: str | None) -> OSError:
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("the first line\nthe second"), "RuntimeError: the first line"),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError (traceback: "),
        (ValueError("y" * 5_000), "ValueError: " + "y" * 985 + "..."),
        (os_error(28, "run/model.safetensors"), "No space left on device: 'run/model.safetensors'"),
        (os_error(5, None), "Input/output error"),
        (NonFiniteError("step 3: the loss is nan.", 3, [1]), "step 3: the loss is nan."),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "out of memory: CUDA out of memory.; use smaller batches (training.per_device_train_batch_size, or "
            "--batch-size), a smaller data.max_length, or training.gradient_checkpointing true",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "out of memory: DefaultCPUAllocator: can't allocate memory; use smaller batches",
        ),
    ],
)
def test_what_fails_is_one_sentence_and_exit_code_1(error, message, here, monkeypatch, capsys):
    fails_with(monkeypatch, error)
    assert main(["train", "r.yaml"]) == 1
    captured = capsys.readouterr()
    (path,) = (here / "temp").iterdir()
    assert captured.err.startswith(f"prefopt: {message}") and captured.out == ""
    assert captured.err.endswith(f" (traceback: {path})\n") and captured.err.count("\n") == 1
    text = path.read_text(encoding="utf-8")
    assert text.startswith("Traceback (most recent call last):") and str(error) in text


@pytest.mark.parametrize("words", [["--traceback", "train"], ["train", "--traceback"]])
def test_the_traceback_is_shown_on_request(words, here, monkeypatch, capsys):
    fails_with(monkeypatch, RuntimeError("a reason"))
    assert main([*words, "r.yaml"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("prefopt: RuntimeError: a reason\n")
    assert not list((here / "temp").iterdir())


def test_the_traceback_goes_to_a_run_folder_in_use_and_leaves_an_empty_one_empty(here, monkeypatch, capsys):
    from prefopt.errors import traceback_in

    run = here / "run"
    run.mkdir()

    def train(*_, **__):
        with traceback_in(run):
            raise RuntimeError("a reason")

    monkeypatch.setattr("prefopt.recipe.run_recipe", train)
    assert main(["train", "r.yaml"]) == 1
    assert not list(run.iterdir()) and len(list((here / "temp").iterdir())) == 1
    (run / "run.json").write_text("{}", encoding="utf-8")
    assert main(["train", "r.yaml"]) == 1
    assert capsys.readouterr().err.endswith(f"(traceback: {run / 'traceback.txt'})\n")
    assert "RuntimeError: a reason" in (run / "traceback.txt").read_text(encoding="utf-8")
    with traceback_in(run):  # the next start
        assert [path.name for path in run.iterdir()] == ["run.json"]


def test_a_traceback_that_cannot_be_written_is_no_second_failure(here, monkeypatch, capsys):
    fails_with(monkeypatch, os_error(28, None))
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(os_error(28, None)))
    assert main(["train", "r.yaml"]) == 1
    assert capsys.readouterr().err == (
        "prefopt: No space left on device (traceback: not written; --traceback shows it)\n"
    )


def test_a_long_message_is_bounded(here, capsys):
    keys = "".join(f"key{number}: {'v' * 90}\n" for number in range(500))
    (here / "r.yaml").write_text(keys + f'? "{"k" * 900}{"k" * 90}"\n: 1\n', encoding="utf-8")
    assert main(["train", "r.yaml"]) == 2
    error = capsys.readouterr().err
    assert len(error) < 5_000 and error.endswith("... and 464 more lines\n")


@pytest.mark.parametrize("words", [[], ["data"]])
def test_a_group_of_commands_alone_prints_its_help(words, capsys):
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(" ".join(["usage: prefopt", *words])) and captured.err == ""


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["study", "bco-stability", "--quick"], "python -m studies.bco_stability"),
        (["bench-inference", "--help"], "python -m benchmarks.inference"),
    ],
)
def test_a_moved_command_names_its_successor(words, command, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert command in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_python_m_prefopt_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prefopt", "train", "--list"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("prefopt", run_name="__main__")
    assert end.value.code == 0 and "kto-lora" in capsys.readouterr().out


def test_a_reader_that_has_left_is_no_failure(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["train", "--list"]) == 141
    assert capsys.readouterr().err == ""


def test_a_full_disk_behind_stdout_is_a_failure(here, monkeypatch, capsys):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["train", "--list"]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err.startswith("prefopt: No space left on device (traceback: ")


def test_a_terminal_that_is_not_utf_8_gets_escapes(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    monkeypatch.setattr("prefopt.cli.train.recipe_list", lambda: "é ق \udcff")
    assert main(["train", "--list"]) == 0
    assert buffer.getvalue() == b"\\xe9 \\u0642 \\udcff\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected a name or a path, got ''"),
        ("a\0b", "expected a name or a path, got 'a\\x00b'"),
        ("x" * 5_000, f"'{'x' * 57}'...: File name too long"),
    ],
)
def test_a_path_that_cannot_be_one(text, reason, capsys):
    for words in (["report", text], ["demo", "--out", text], ["chat", text]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith(f": {reason}")


def test_an_empty_value_is_not_the_default(capsys):
    """As a shell makes of a variable that is not set."""
    assert main(["train", "kto-lora", "--beta", ""]) == 2
    assert "beta is empty; expected a value, or null for the default" in capsys.readouterr().err


def test_options_before_the_command(capsys):
    assert main(["--resume", "train", "kto-lora"]) == 2
    assert "--resume is unknown here; options come after the command" in capsys.readouterr().err


def test_no_message_moves_the_cursor(tmp_path, capsys):
    path = tmp_path / "a\x1b[2Jb.jsonl"
    assert main(["data", "check", str(path)]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error and r"a\x1b[2Jb.jsonl" in error


# ---------------------------------------------------------------- missing packages


def test_without_the_extra_train_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for name in ("describe", "read", "sources"):
        monkeypatch.delitem(sys.modules, f"prefopt.data.{name}", raising=False)
    assert main(["data", "inspect", "rows.jsonl"]) == 2
    assert capsys.readouterr().err == (
        "prefopt: the package datasets is not installed, and prefopt needs it; run "
        "pip install '.[train]' in a checkout of prefopt-kernels\n"
    )


def test_the_help_too_needs_pyyaml_and_says_so():
    code = "import sys; sys.modules['yaml'] = None; from prefopt.cli import main; sys.exit(main([]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("prefopt: the package yaml is not installed, and prefopt needs it")
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------- spellings of options


def recipe_from(monkeypatch, words):
    found = []
    monkeypatch.setattr("prefopt.recipe.run_recipe", lambda recipe, resume: found.append(recipe) or Path("run"))
    assert main(["train", *words]) == 0
    return found[0]


def test_a_bare_name_is_the_option_of_its_section(here, monkeypatch):
    recipe = recipe_from(
        monkeypatch,
        ["--beta", "0.2", "r.yaml", "--learning-rate=1e-3", "--max_steps", "7", "--lora-r", "4"]
        + ["--warmup_ratio", "0.1", "--eval-fraction", "0.25"],
    )
    assert recipe.loss.beta == 0.2 and recipe.data.eval_fraction == 0.25
    assert recipe.training.learning_rate == 1e-3 and recipe.training.max_steps == 7
    assert recipe.lora.r == 4 and recipe.training.warmup_steps == 0.1


def test_dashes_and_underscores_are_the_same(here, monkeypatch):
    words = ["r.yaml", "--loss.kl-estimator", "ema", "--data.max-length=77", "--save_strategy=no"]
    recipe = recipe_from(monkeypatch, [*words, "--training.per-device_train-batch-size", "3"])
    assert recipe.loss.kl_estimator == "ema" and recipe.data.max_length == 77
    assert recipe.training.save_strategy == "no"
    assert recipe.training.per_device_train_batch_size == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alpha", "3"], "--alpha is ambiguous; expected --lora.alpha or --loss.alpha"),
        (["--path=x"], "--path is ambiguous; expected --model.path or --data.path"),
        (["--learning-rte", "1"], "--learning-rte is unknown; did you mean --learning-rate?"),
        (["--max_prompt_length", "9"], "max_prompt_length is not an option: a prompt is never cut"),
        (["--beta", "x"], "loss.beta is 'x'; expected a number or null"),
        (
            ["--training.adam_beta1", "0.8"],
            "training.adam_beta1 is unknown; options of transformers.TrainingArguments without a key here go into "
            "training.extra",
        ),
    ],
)
def test_a_name_that_is_none_leads_to_the_right_one(words, message, here, capsys):
    assert main(["train", "r.yaml", *words]) == 2
    assert capsys.readouterr().err.startswith(f"prefopt: command line: {message}")
