"""The command line: help without the heavy imports, one message for what is wrong, exit codes."""

import json
import re
import subprocess
import sys

import pytest

import prefopt
import prefopt_kernels
from prefopt.cli import build_parser, main
from prefopt.options import SECTIONS, options_of
from support.tiny_models import make_model, make_rows, make_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model("llama", len(make_tokenizer(folder / "model")), folder / "model")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(True))
    return folder


@pytest.fixture
def recipe(base, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: {base / 'model'}}}\n"
        f"data: {{path: {base / 'rows.jsonl'}, max_length: 128}}\n"
        "lora: {r: 2}\n"
        f"training: {{output_dir: {tmp_path / 'run'}, use_cpu: true, max_steps: 2, logging_steps: 1}}\n",
        encoding="utf-8",
    )
    return path


def test_help_needs_no_heavy_import():
    code = (
        "import sys\n"
        "from prefopt.cli import main\n"
        "for words in (['--help'], ['train', '--help'], ['train', '--list'], ['data', 'build', '--help']):\n"
        "    try:\n"
        "        assert main(words) == 0\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_path_env())
    assert done.returncode == 0, done.stderr
    assert "train a tiny model on embedded data, in minutes" in " ".join(done.stdout.split())


def _path_env():
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_help_of_train_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for section in SECTIONS:
        for name in options_of(section):
            assert f"--{section}.{name} " in text
    assert "inverse temperature, 1/nats; for ipo the paper's tau (default: 0.1; simpo 2)" in text
    assert "passes over the data (default: 1.0)" in text
    assert "the run folder (required)" in text


def test_version_is_that_of_the_kernels(capsys):
    assert prefopt.__version__ == prefopt_kernels.__version__
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"prefopt {prefopt.__version__}"


def test_train_takes_overrides_and_ends_with_the_report(recipe, tmp_path, capsys):
    run = tmp_path / "7"  # a name that YAML would read as a number
    words = [
        "train",
        str(recipe),
        "--training.max_steps",
        "1",
        "--loss.beta=0.5",
        "--training.output_dir",
        str(run),
    ]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "report.html")
    config = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
    assert config["beta"] == 0.5 and config["max_steps"] == 1


def test_list_names_the_recipes_with_a_sentence_each(capsys):
    assert main(["train", "--list"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\ns0-qwen3-kto +KTO with a LoRA adapter on Qwen3-0.6B, from Ultra", text)


def test_a_used_run_folder_needs_resume_and_keeps_the_traceback_of_a_failure(recipe, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the device is lost")

    run = recipe.parent / "run"
    assert main(["train", str(recipe)]) == 0
    assert main(["train", str(recipe)]) == 2
    assert "is not empty; choose another folder, or continue the run with --resume" in capsys.readouterr().err
    words = ["train", str(recipe), "--resume", "--training.max_steps", "3"]
    with monkeypatch.context() as patch:
        patch.setattr("prefopt.train.PreferenceTrainer.train", fail)
        assert main(words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    path = run / "traceback.txt"
    assert error == f"prefopt: RuntimeError: the device is lost (traceback: {path})"
    assert "in fail" in path.read_text(encoding="utf-8")
    assert main(words) == 0 and not path.exists()
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert max(json.loads(line)["step"] for line in lines) == 3


def test_all_problems_of_file_and_command_line_come_together(recipe, capsys):
    recipe.write_text(recipe.read_text(encoding="utf-8") + "losss: {}\n", encoding="utf-8")
    words = [
        "train",
        str(recipe),
        "--loss.betta",
        "2",
        "--training.sede=1",
        "--training.seed",
        "x",
        "--lora",
        "3",
    ]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert sorted(captured.err.removeprefix("prefopt: ").splitlines()) == [
        f"{recipe}: losss is unknown; did you mean loss?",
        "command line: lora is 3; expected null or {}, and only for lora",
        "command line: loss.betta is unknown; did you mean loss.beta?",
        "command line: training.sede is unknown; did you mean training.seed?",
        "command line: training.seed is 'x'; expected a whole number",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "missing.yaml"], "there is no recipe missing.yaml"),
        (["train", "missing.yaml", "--resum"], "--resum is unknown; did you mean --resume?"),
        (["train", "missing.yaml", "--tny"], "--tny is unknown; did you mean --tiny?"),
        (["train", "--list", "--rsume"], "--rsume is unknown; did you mean --resume?"),
        (
            ["train", "s0-qwen-kto"],
            "there is no recipe s0-qwen-kto (did you mean s0-qwen3-kto?); expected a .yaml file, or a name that "
            "`prefopt train --list` shows",
        ),
        (["train", "s3"], "there is no recipe s3 (did you mean s3-r1-distill-kto-4bit?)"),
        (["train", "missing.yaml", "--tiny"], "there is no recipe missing.yaml"),
        (["train", "missing.yaml", "--loss.beta", "["], "loss.beta is '['; expected a YAML value"),
        (["report", "nowhere"], "nowhere is not a run folder: it has no run.json"),
        (["report", "nowhere", "--fast"], "--fast is unknown"),
        (["demo", "--sed", "1"], "--sed is unknown; did you mean --seed?"),
        (["data", "check", "missing.jsonl"], "there is no file missing.jsonl"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("prefopt: ")
    assert "Traceback" not in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("words", [["trane"], ["train"], ["demo", "--seed", "one"]])
def test_wrong_words_exit_with_the_usage(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "usage: prefopt" in capsys.readouterr().err


def test_bad_rows_stop_before_training(recipe, base, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_bytes((base / "rows.jsonl").read_bytes() + b'{"prompt": "a", "completion": "b", "label": 1}\n')
    assert main(["train", str(recipe), "--data.path", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}:21: label is 1; expected true or false" in error and "1 of 21 rows" in error
    assert not (tmp_path / "run").exists()
    assert main(["train", str(recipe), "--data.path", str(path), "--data.on_bad_row", "skip"]) == 0
    listed = (tmp_path / "run" / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in listed] == [21]


def test_traceback_is_shown_on_request(capsys):
    assert main(["report", "nowhere", "--traceback"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.rstrip().endswith("it has no run.json")


def test_an_interrupt_says_so(recipe, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("prefopt.recipe.run_recipe", interrupted)
    assert main(["train", str(recipe)]) == 130
    assert (
        capsys.readouterr().err
        == "prefopt: interrupted; the same command with --resume continues from the last checkpoint, if there is one\n"
    )


# ---------------------------------------------------------------- data check


def test_data_check_counts_and_shows_what_is_scored(base, capsys):
    assert main(["data", "check", str(base / "rows.jsonl"), "--model", str(base / "model")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"desirable +11 \(55\.0%\)\n +undesirable +9 \(45\.0%\)", text)
    assert "max_length 1024 cuts 0 of 20 answers (0 of " in text
    prompt, scored = text.split("prompt, not scored:")[1].split("scored, ")
    assert "Which planet is the largest?<|im_end|>" in prompt and "<|im_start|>assistant" in prompt
    assert re.search(r"Jupiter is the largest planet\.<\|im_end\|>\\n", scored.replace("│", ""))
    assert "│" in scored and "Which planet" not in scored


def test_data_check_shows_truncation_and_bad_rows(base, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((base / "rows.jsonl").read_bytes() + b"{}\n\n" + b'{"prompt": "x"}\n' * 11)
    assert main(["data", "check", str(path), "--model", str(base / "model"), "--max-length", "33"]) == 1
    text = capsys.readouterr().out
    # every bad row is listed: 12 that cannot be read, and 3 that are too long
    assert re.search(r"^bad rows +15$", text, re.MULTILINE) and "blank lines    1" in text
    assert text.count("max_length is 33: no room for an answer") == 3
    assert f"{path}:21: field 'prompt' is missing" in text
    assert all(f"{path}:{line}: " in text for line in range(23, 34))
    assert "cut off by max_length, 1 tokens:\n    \\n" in text


def test_arabic_pieces_are_whole_characters(base, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "ما لون السماء؟", "completion": " زرقاء 😀", "label": True}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert main(["data", "check", str(path), "--model", str(base / "model")]) == 0
    text = capsys.readouterr().out
    assert "\ufffd" not in text and "زرقاء 😀<|im_end|>" in text.replace("│", "")
    assert "kto and apo_zero need rows of both labels" in text


def test_data_check_names_a_model_that_is_not_there(base, capsys):
    assert main(["data", "check", str(base / "rows.jsonl"), "--model", "no/model"]) == 2
    assert "cannot read the configuration of a model from no/model" in capsys.readouterr().err


def test_every_command_has_a_line_of_help():
    text = build_parser().format_help()
    for command in (
        "demo",
        "train",
        "data",
        "report",
        "eval",
        "export",
        "chat",
        "classify",
    ):
        assert re.search(rf"\n +{command} +[a-z]", text)
