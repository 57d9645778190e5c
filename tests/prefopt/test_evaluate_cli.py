"""`prefopt eval` as a user meets it: help, one sentence and exit code 2 for what is wrong, results and pictures."""

import csv
import json
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from prefopt.cli import main
from support.evaluate import FIXTURES, make_run

QUESTIONS = str(FIXTURES / "mmlu_pro.jsonl")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("adapter"))


def test_help_and_refusals_need_no_heavy_import(tmp_path):
    code = (
        "import sys\n"
        "from prefopt.cli import main\n"
        "try:\n"
        "    main(['eval', '--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert main(['eval', 'nowhere', '--suite', 'benchmarks', '--rule', 'demo']) == 2\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'lm_eval'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    path = {"PYTHONPATH": ":".join(one for one in sys.path if one)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--rule belongs to the suite preference, not to benchmarks" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--suite", "preference"], "there is no run folder nowhere"),
        (["nowhere", "--suite", "benchmarks", "--limi", "3"], "--limi is unknown; did you mean --limit?"),
        ([".", "--suite", "classify", "--data", "x"], ". holds no trained model"),
        (["RUN", "--suite", "classify"], "--data is missing: questions with their category"),
        (["RUN", "--suite", "classify", "--data", "no.jsonl"], "there is no file no.jsonl"),
        (["RUN", "--suite", "preference", "--rule", "nice"], "--rule is 'nice'; expected demo"),
        (["RUN", "--suite", "preference", "--out", "FILE"], "is a file; expected a folder"),
        (["RUN", "--suite", "preference", "--data", "no.jsonl"], "there is no file no.jsonl"),
        (["RUN", "--suite", "preference", "--data", QUESTIONS], "mmlu_pro.jsonl:1: field 'prompt' is"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_message_and_exit_code_2_before_a_model_is_loaded(
    run, words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prefopt.evaluate.run.load_subject", lambda *_: pytest.fail("loads"))
    (tmp_path / "FILE").write_text("", encoding="utf-8")
    before = sorted(run.iterdir())
    assert main(["eval", *(str(run) if word == "RUN" else word for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert message in captured.err
    assert sorted(run.iterdir()) == before


def test_two_suites_in_one_run_folder(run, capsys):
    assert main(["eval", str(run), "--suite", "preference", "--limit", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "eval.json")
    assert main(["eval", str(run), "--suite", "classify", "--data", QUESTIONS, "--limit", "2"]) == 0
    content = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    assert list(content["suites"]) == ["preference", "classify"]
    for suite in content["suites"].values():
        assert suite["model"] == {
            "kind": "adapter",
            "base": str(run.parent / "base"),
            "method": "kto",
            "quantization": "none",
        }
        assert suite["settings"]["limit"] in (2, 4) and suite["versions"]["torch"]
        for picture in suite["pictures"]:
            assert (run / picture).stat().st_size > 1000
    with (run / "eval_summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(suite["scores"]) for suite in content["suites"].values())
    assert {row["suite"] for row in rows} == {"preference", "classify"}
    assert {row["at_chance"] for row in rows} <= {"True", "False"}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert ">Held-out preferences</h3>" in page and ">Classification</h3>" in page
    own = [row for row in rows if row["model"] == "run"]
    index = ModelCard.load(run / "README.md").data.eval_results
    assert [one.metric_value for one in index] == [round(float(row["value"]), 6) for row in own]
    assert {one.dataset_type for one in index} == {"rows.jsonl", "mmlu_pro.jsonl"}


def test_without_lm_evaluation_harness_the_extra_is_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    words = ["eval", str(run), "--suite", "benchmarks", "--tasks-dir", str(FIXTURES), "--out"]
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "pip install '.[eval]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
