"""Evaluations on page and card: base, run and chance, and metadata that loads again."""

import json
import math
import re

import pytest
from huggingface_hub import ModelCard
from matplotlib.backends.backend_agg import FigureCanvasAgg
from peft import LoraConfig, get_peft_model

from prefopt.demo.model import build_model, build_tokenizer
from prefopt.report import write_report
from prefopt.report.facts import commands
from prefopt.report.figures import figure
from prefopt.report.read import read_run
from prefopt.report.score import Score, suite_of

TASK = {"task": "HellaSwag", "metric": "acc_norm", "n_shot": 10, "unit": "share"}


def score(model, value, chance, spread=0.04, **labels):
    one = Score(
        model=model, value=value, stderr=spread / 2, low=value - spread, high=value + spread,
        n=600, chance=chance, **(TASK | labels),
    )  # fmt: skip
    return one.as_dict()


BENCHMARKS = {
    "scores": [
        score("base", 0.251, 0.25),
        score("run", 0.264, 0.25),
        score("change", 0.013, 0.0),
        score("base", 0.39, 0.41, task="TruthfulQA MC2", metric="mc2", n_shot=0),
        score("run", 0.486, 0.41, task="TruthfulQA MC2", metric="mc2", n_shot=0),
        score("change", 0.096, 0.0, task="TruthfulQA MC2", metric="mc2", n_shot=0),
    ],
    "how": ["Through <lm-evaluation-harness>."],
    "warnings": ["HellaSwag, acc_norm: 0.264 is indistinguishable from chance (0.250)."],
    "data": {
        "HellaSwag": {"name": "HellaSwag", "hub": "Rowan/hellaswag", "split": "validation"},
        "TruthfulQA MC2": {"name": "TruthfulQA, from local files", "hub": None, "split": None},
    },
    "settings": {"batch_size": 8, "seed": 0},
    "details": {"lm_eval": "0.4.13"},
}
CLASSIFY = {
    "scores": [
        score("base", 0.5, 0.5, task="classification", metric="accuracy, likelihood", n_shot=None),
        score("run", 0.9, 0.5, task="classification", metric="accuracy, likelihood", n_shot=None),
    ],
    "how": [],
    "warnings": [],
    "data": {"classification": {"name": "rows.jsonl", "hub": None}},
    "settings": {"data": "/home/someone/rows.jsonl", "limit": 4, "seed": 0},
    "details": {
        "names": ["law", "math", "no name"],
        "confusion": {"run": {"likelihood": [[2, 0, 0], [0, 1, 1]]}},
        "categories": [{"category": "law", "n": 2, "base, likelihood": 0.5, "run, likelihood": 1.0}],
        "samples": [{"right": "law", "base": "<math>", "run": "القانون"}],
    },
}  # fmt: skip


def make_run(folder):
    files = {
        "run.json": {"status": "finished", "method": "kto", "config": {"beta": 0.1}},
        "eval.json": {"format": 1, "suites": {"benchmarks": BENCHMARKS, "classify": CLASSIFY}},
        "adapter_config.json": {"base_model_name_or_path": "Qwen/Qwen3-0.6B", "r": 16},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n', encoding="utf-8")
    (folder / "recipe.yaml").write_text("data: {path: /home/someone/x.jsonl}\n", encoding="utf-8")
    return folder


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path)


@pytest.fixture
def run_without_plots(run_dir):
    (run_dir / "eval.json").unlink()
    (run_dir / "metrics.jsonl").write_text("", encoding="utf-8")
    return run_dir


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run with its report, for tests that only read."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


def rows_of(page: str) -> list[list[str]]:
    """The cells of every line of every table."""
    lines = re.findall(r"<tr>(.*?)</tr>", page)
    return [[re.sub("<[^>]*>", "", one) for one in re.findall(r"<t[hd].*?</t[hd]>", line)] for line in lines]


def test_tables_have_base_run_errors_chance_and_verdict(reported):
    page = (reported / "report.html").read_text(encoding="utf-8")
    rows = rows_of(page)
    head = ["", "before training", "trained", "change", "chance", "n", "in words"]
    expected = [
        ["HellaSwag, 10-shot: acc_norm", "0.251 ± 0.020", "0.264 ± 0.020", "+0.013 ± 0.020"]
        + ["0.250", "600", "indistinguishable from chance; no clear change"],
        ["TruthfulQA MC2, 0-shot: mc2", "0.390 ± 0.020", "0.486 ± 0.020", "+0.096 ± 0.020"]
        + ["0.410", "600", "above chance; a clear change"],
        ["classification: accuracy, likelihood", "0.500 ± 0.020", "0.900 ± 0.020", ""]
        + ["0.500", "600", "above chance"],
    ]
    for line in [head, *expected]:
        assert line in rows
    assert ["law", "2", "0.500", "1.000"] in rows
    assert "0.264 is indistinguishable from chance (0.250)" in page
    assert "Through &lt;lm-evaluation-harness&gt;." in page and "&lt;math&gt;" in page
    card = (reported / "README.md").read_text(encoding="utf-8")
    for line in expected:
        plain = [cell.replace("_", "\\_") for cell in line]
        assert f"| {' | '.join(plain)} |" in card


def test_pictures_of_every_suite_as_files_and_in_the_page(reported):
    page = (reported / "report.html").read_text(encoding="utf-8")
    names = ["eval_benchmarks", "eval_classify", "eval_confusion_likelihood"]
    card = (reported / "README.md").read_text(encoding="utf-8")
    for name in names:
        assert (reported / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](plots/{name}.png)" in card
    assert page.count("<svg") == 1 + len(names)  # and the loss
    svg = (reported / "plots" / "eval_benchmarks.svg").read_text(encoding="utf-8")
    assert all(f">{word}<" in svg for word in ("before training", "trained", "chance"))
    matrix = (reported / "plots" / "eval_confusion_likelihood.svg").read_text(encoding="utf-8")
    assert "75.0 % right" in matrix and ">no name<" in matrix


def test_the_hub_library_reads_the_runs_scores_alone(reported):
    found = ModelCard.load(reported / "README.md").data.eval_results
    by_dataset = {one.dataset_type: one for one in found}
    assert {name: one.metric_value for name, one in by_dataset.items()} == {
        "Rowan/hellaswag": 0.264,
        "TruthfulQA, from local files": 0.486,
        "rows.jsonl": 0.9,
    }
    hellaswag = by_dataset["Rowan/hellaswag"]
    assert (hellaswag.task_type, hellaswag.metric_type) == ("text-generation", "acc_norm")
    assert hellaswag.dataset_args == {"num_few_shot": 10, "lm_eval": "0.4.13"}
    assert hellaswag.dataset_split == "validation"
    assert hellaswag.metric_name.endswith("standard error 0.0200, chance 0.2500, n 600")
    local = by_dataset["rows.jsonl"]
    assert local.task_type == "text-classification"
    assert local.dataset_name == "rows.jsonl, the first 4 of each task"


def test_no_local_path_in_the_card(reported):
    card = (reported / "README.md").read_text(encoding="utf-8")
    assert "/home/someone" not in card and str(reported) not in card
    assert commands(read_run(reported)) == [
        "prefopt train RUN/recipe.yaml --training.output_dir NEW_RUN",
        "prefopt eval NEW_RUN --suite benchmarks",
        "prefopt eval NEW_RUN --suite classify --data rows.jsonl --limit 4",
    ]


def test_a_card_that_was_changed_by_hand_is_kept(run_without_plots, caplog):
    card = run_without_plots / "README.md"
    card.write_text("my own words\n", encoding="utf-8")
    write_report(run_without_plots)
    ours = card.read_bytes()
    assert (run_without_plots / "README.edited.md").read_text(encoding="utf-8") == "my own words\n"
    assert "README.md was changed by hand; it is kept as README.edited.md" in caplog.text
    write_report(run_without_plots)  # unchanged
    card.write_bytes(ours.replace(b"\n", b"\r\n"))  # other line ends only
    write_report(run_without_plots)
    assert card.read_bytes() == ours and not (run_without_plots / "README.edited-2.md").exists()
    changed = ours.replace(b"## ", b"## My ", 1)
    card.write_bytes(changed)
    write_report(run_without_plots)
    assert card.read_bytes() == ours and (run_without_plots / "README.edited-2.md").read_bytes() == changed


def test_the_unfilled_card_of_peft_is_not_kept(run_without_plots):
    model = get_peft_model(build_model(build_tokenizer(), seed=0), LoraConfig(target_modules=["q_proj"]))
    model.create_or_update_model_card(str(run_without_plots))
    assert "[More Information Needed]" in (run_without_plots / "README.md").read_text(encoding="utf-8")
    write_report(run_without_plots)
    assert not list(run_without_plots.glob("README.edited*"))
    form = (run_without_plots / "README.md").read_text(encoding="utf-8")
    assert "[More Information Needed]" not in form


def test_arabic_is_right_to_left_with_joined_letters(run_dir):
    task, question, answer = "إجابات مولّدة", "كيف أسلق البيض؟", "ضع البيض في ماء بارد."
    suite = {
        "scores": [score("run", 0.9, 0.5, task=task, metric="نجاح", n_shot=None)],
        "how": ["بقاعدة اللغة"],
        "details": {"samples": [{"prompt": question, "before": "", "after": answer}]},
    }
    text = json.dumps({"format": 1, "suites": {"preference": suite}}, ensure_ascii=False)
    (run_dir / "eval.json").write_text(text, encoding="utf-8")
    page = write_report(run_dir).read_bytes().decode("utf-8")
    for one in (f"{task}: نجاح", question, answer, "بقاعدة اللغة"):
        assert re.search(f'<[a-z]+[^>]* dir="auto"[^>]*>{re.escape(one)}</', page), one
    svg = (run_dir / "plots" / "eval_preference.svg").read_bytes().decode("utf-8")
    card = (run_dir / "README.md").read_bytes().decode("utf-8")
    assert task in svg and f"| {task}: نجاح |" in card
    assert not re.search("[\u00d8\u00d9][\u0080-\u00bf]|\ufffd", page + svg + card)  # mojibake
    with figure(3, 3) as (made, axes):
        joined, apart = (
            axes.text(0, 0, letters).get_window_extent(FigureCanvasAgg(made).get_renderer()).width
            for letters in ("ببب", "ب\u200cب\u200cب")
        )
    assert joined < 0.9 * apart  # letters that are not joined are drawn in their wide forms


def test_a_broken_suite_is_named_and_left_out(run_dir):
    details = CLASSIFY["details"] | {"confusion": {"run": {"likelihood": [[1]]}}, "samples": [7]}
    classify = CLASSIFY | {"details": details}
    broken = {"benchmarks": {"scores": [{"task": "x"}]}, "classify": classify, "preference": 3}
    text = json.dumps({"format": 1, "suites": broken})
    (run_dir / "eval.json").write_text(text, encoding="utf-8")
    page = write_report(run_dir).read_text(encoding="utf-8")
    for name in ("benchmarks", "preference"):
        assert f"The suite {name} of eval.json cannot be read and was left out." in page
    assert [suite.name for suite in read_run(run_dir).suites] == ["classify"]


def test_null_interval_ends_are_infinite():
    entry = {"scores": [score("run", 1.0, 0.5) | {"stderr": None, "low": None, "high": None}]}
    (one,) = suite_of("x", entry).scores
    assert (one.low, one.high, one.at_chance) == (-math.inf, math.inf, True)
