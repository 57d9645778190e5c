"""`prefopt compare` end to end: real runs, continuing, and refusals."""

import csv
import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from prefopt.cli import main
from prefopt.compare.measure import Job, measure
from prefopt.compare.plan import Plan
from prefopt.compare.subprocess_run import FAILED, LOG, REFUSED, _exit_reason, run_in_subprocess
from prefopt.compare.summary import TOO_FEW
from prefopt.errors import RunError, UserError
from prefopt.recipe import load_recipe
from support.tiny_models import make_model, make_rows, make_tokenizer
from support.trainer import make_pairs

STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, pairs, unpaired rows and a recipe of DPO."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer(folder / "base")
    make_model("qwen3", len(tokenizer), folder / "base")
    write_lines(folder / "pairs.jsonl", make_pairs(20))
    write_lines(folder / "rated.jsonl", make_rows(True))
    recipe = {
        "model": {"path": str(folder / "base")},
        "data": {"path": str(folder / "pairs.jsonl"), "eval_fraction": 0.3, "max_length": 96},
        "lora": {"r": 4},
        "loss": {"method": "dpo", "beta": 0.3, "label_smoothing": 0.1},
        "training": {
            "output_dir": str(folder / "unused"),
            "learning_rate": 1e-3,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "use_cpu": True,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def write_lines(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def start(world: Path, out: Path, *words: str, methods: str = "kto,dpo") -> int:
    recipe = str(world / "recipe.yaml")
    return main(["compare", recipe, "--methods", methods, "--out", str(out), *words])


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    """Two methods, a run each: the first in a subprocess, the second in this process, which is faster."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        runners = {"kto": run_in_subprocess, "dpo": measure}
        patch.setattr("prefopt.compare.run.run_in_subprocess", lambda job, on_step: runners[job.method](job, on_step))
        assert start(world, out, "--runs", "1") == 0
    return out


def content_of(out: Path) -> dict:
    return json.loads((out / "compare.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_two_methods_see_the_same_tokens_from_the_same_start(compared):
    content = content_of(compared)
    kto, dpo = content["runs"]
    assert (kto["method"], dpo["method"], content["status"]) == ("kto", "dpo", "finished")
    assert kto["tokens_in_all"] == dpo["tokens_in_all"] > 0
    assert kto["sequences_in_all"] == dpo["sequences_in_all"] > 0
    # policy and reference are one model in the first step
    assert kto["losses"][0] == pytest.approx(0.5, abs=1e-4)
    assert dpo["losses"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert dpo["losses"][1] < dpo["losses"][0]
    base = [score_of(run, "desirable, per token", "base") for run in (kto, dpo)]
    assert base[0] == base[1] < 0  # the same held-out rows under the same model
    assert min(kto["peak_bytes"], dpo["peak_bytes"]) > 2**27  # torch alone is more
    assert content["methods"]["kto"]["left_out"] == ["loss.label_smoothing 0.1"]


@pytest.mark.slow
def test_all_files_are_written_without_figures_of_time(compared):
    rows = list(csv.DictReader((compared / "compare.csv").open(encoding="utf-8", newline="")))
    assert [row["method"] for row in rows] == ["base", "kto", "dpo"]
    assert {row["step_ms"] for row in rows[1:]} == {TOO_FEW} == {row["efficiency"] for row in rows[1:]}
    assert all(float(row["accuracy"]) in (0, 0.2, 0.4, 0.6, 0.8, 1) for row in rows[1:])
    for name in ("compare.md", "report.html"):
        text = (compared / name).read_text(encoding="utf-8")
        assert "left out for it: loss.label_smoothing 0.1 (KTO)." in text.replace("\\_", "_") and TOO_FEW in text
    plots = {one.name for one in (compared / "plots").iterdir()}
    assert {"compare_cost.png", "compare_learning.svg", "compare_accuracy.png"} <= plots
    assert "compare_step_ms.png" not in plots
    assert (compared / "runs" / "kto-42" / "metrics.jsonl").stat().st_size > 0


@pytest.mark.slow
def test_a_second_start_runs_only_what_is_missing(world, compared, monkeypatch, capsys):
    before = content_of(compared)
    asked = []
    real = before["runs"]

    def instead(job, on_step):
        """As if it had run: the first round's numbers again; interrupted at the second method."""
        asked.append((job.method, job.seed))
        assert content_of(compared)["status"] == "unfinished"
        assert not (compared / "report.html").exists()  # of fewer runs than are asked for now
        if job.method == "dpo" and len(asked) == 2:
            raise KeyboardInterrupt
        return next(run for run in real if run["method"] == job.method) | {"seed": job.seed}

    monkeypatch.setattr("prefopt.compare.run.run_in_subprocess", instead)
    assert start(world, compared, "--runs", "2") == 130
    assert [(run["method"], run["seed"]) for run in content_of(compared)["runs"]] == [
        ("kto", 42), ("dpo", 42), ("kto", 43),
    ]  # fmt: skip
    assert start(world, compared, "--runs", "2") == 0
    assert asked == [("kto", 43), ("dpo", 43), ("dpo", 43)]
    assert content_of(compared)["runs"][:2] == before["runs"]
    assert start(world, compared, "--runs", "2") == 0 and len(asked) == 3
    assert "2 runs of each method (seed 42, 43)" in capsys.readouterr().out
    assert (compared / "report.html").exists()
    # another recipe, or other methods, cannot go on here
    assert start(world, compared, "--runs", "2", "--loss.beta", "0.2") == 2
    assert "other settings (loss.beta)" in capsys.readouterr().err
    assert start(world, compared, "--runs", "2", methods="dpo,kto") == 2
    assert "other settings (methods)" in capsys.readouterr().err
    assert len(asked) == 3


def score_of(run: dict, metric: str, model: str) -> float:
    return next(score["value"] for score in run["scores"] if (score["metric"], score["model"]) == (metric, model))


def test_an_unchanged_model_scores_as_its_base(world, tmp_path):
    # All weights are trained, so the base is loaded again; bf16 wraps what is trained, and not the base.
    overrides = {"lora": None, "training.learning_rate": 1e-12, "training.bf16": True}
    recipe = load_recipe(world / "recipe.yaml", overrides)
    plan = Plan(recipe, ("dpo", "sft"), 4, STEPS)
    run = measure(Job(plan, "sft", 42, tmp_path / "sft-42"), lambda: None)
    base, trained = (score_of(run, "desirable, per token", who) for who in ("base", "run"))
    # a step of 1e-12 is far below the last bit of any weight; rounding in bf16 would show at 1e-3
    assert trained == pytest.approx(base, abs=1e-6) and base < -1
    assert score_of(run, "margin", "run") == pytest.approx(0, abs=1e-5)
    assert run["sequences_in_all"] == 15  # the desirable answers of all pairs, 4 + 4 + 4 + 3


def test_a_loss_that_is_not_finite_is_a_result(world, tmp_path):
    recipe = load_recipe(world / "recipe.yaml", {"training.learning_rate": 1e30})
    plan = Plan(recipe, ("kto", "dpo"), 4, STEPS)
    steps = []
    run = measure(Job(plan, "dpo", 43, tmp_path / "dpo-43"), lambda: steps.append(1))
    assert "scores" not in run and len(steps) < STEPS
    assert "step 2" in run["stopped"] and (run["method"], run["seed"]) == ("dpo", 43)


def test_a_run_that_fails_names_its_log(world, tmp_path):
    recipe = load_recipe(world / "recipe.yaml", {"model.path": str(tmp_path / "gone")})
    job = Job(Plan(recipe, ("kto", "dpo"), 4, STEPS), "kto", 42, tmp_path / "kto-42")
    with pytest.raises(UserError, match="kto, seed 42: .*gone, which is not a folder.*; see .*log"):
        run_in_subprocess(job, lambda: None)
    assert "Traceback" in (tmp_path / "kto-42" / LOG).read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "error"), [(REFUSED, UserError), (FAILED, RunError)])
def test_bad_input_and_other_failures_raise_different_errors(kind, error, tmp_path, monkeypatch):
    class Child:
        """A process that sends one message."""

        exitcode = 0

        def __init__(self, target, args):
            self.connection = args[-1]

        def start(self):
            self.connection.send((kind, "a reason"))

        def join(self):
            pass

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Child)
    monkeypatch.setattr("multiprocessing.get_context", lambda _: context)
    plan = Plan(load_recipe("kto-lora"), ("kto", "dpo"), 4, STEPS)
    job = Job(plan, "kto", 42, tmp_path)
    with pytest.raises(error, match=f"^kto, seed 42: a reason; see {tmp_path / LOG}$"):
        run_in_subprocess(job, lambda: None)


def test_exit_reasons():
    assert _exit_reason(-9) == "its process was killed, most likely for lack of memory"
    assert _exit_reason(1) == "its process ended with code 1"


@pytest.mark.slow
def test_the_published_comparison_from_plan_to_page(tmp_path, monkeypatch):
    """S2 with --tiny: Arabic rows are built, paired by prompt, and used by rated, paired and SFT methods."""
    monkeypatch.setattr("prefopt.compare.run.run_in_subprocess", measure)  # in this process, which is faster
    out = tmp_path / "s2"
    words = ["compare", "s2-arabic-qwen-kto", "--tiny", "--runs", "1", "--out", str(out)]
    assert main([*words, "--methods", "kto,dpo,sft", "--training.max_steps", "2"]) == 0
    content = content_of(out)
    tokens = {run["method"]: run["tokens_in_all"] for run in content["runs"]}
    assert tokens["kto"] == tokens["dpo"] > tokens["sft"] > 0
    assert content["rows"]["paired_by_prompt"] == content["rows"]["train"] > 50
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "s2-arabic-qwen-kto --tiny: a trial of the whole way" in page
    assert "42 rows have no partner of the other label" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "kto,dop"], "--methods has 'dop'; expected some of kto, "),
        (["--methods", "kto,dop"], "did you mean dpo?"),
        (["--methods", "kto"], "--methods is kto; expected two or more to compare"),
        (["--methods", "kto,dpo,kto"], "--methods has kto twice; --runs repeats every method"),
        (["--methods", "kto,dpo", "--runs", "0"], "--runs is 0; expected a number from 1"),
        (["--methods", "kto,dpo", "--out", "FILE"], "FILE is a file; expected a folder"),
        (["--methods", "kto,dpo", "--out", "OTHER"], "has files in it that are not a comparison's"),
        (["--methods", "kto,dpo", "--run", "2"], "--run is unknown; did you mean --runs?"),
        (["--methods", "kto,dpo", "--loss.betta", "2"], "did you mean loss.beta?"),
        (["--methods", "kto,sft", "--loss.method", "kto", "--loss.label_smoothing", "null",
          "--training.per_device_train_batch_size", "3"], "expected an even number of rows"),
        (["--methods", "kto,dpo", "--data.eval_fraction", "0"], "add --data.eval_fraction 0.1"),
        (["--methods", "kto,dpo", "--data.path", "no.jsonl"], "no.jsonl"),
        (["--methods", "kto,dpo,ipo", "--data.path", "RATED"], "for dpo, ipo: "),
    ],
)  # fmt: skip
def test_bad_arguments_give_one_message_and_exit_code_2(world, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("", encoding="utf-8")
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "thesis.txt").write_text("", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    words = [str(world / "rated.jsonl") if word == "RATED" else word for word in words]
    assert main(["compare", str(world / "recipe.yaml"), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert captured.out == "" and sorted(tmp_path.rglob("*")) == before


def test_help_and_refusals_need_no_heavy_import(tmp_path):
    code = (
        "import sys\n"
        "from prefopt.cli import main\n"
        "try:\n"
        "    main(['compare', '--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert main(['compare', 'nowhere.yaml', '--methods', 'kto,dop']) == 2\n"
        "assert main(['compare', 'nowhere.yaml', '--methods', 'kto,dpo']) == 2\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    path = os.environ | {"PYTHONPATH": ":".join(one for one in sys.path if one)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "there is no recipe nowhere.yaml" in done.stderr
