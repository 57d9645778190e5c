"""The benchmarks through lm-evaluation-harness on local files: its numbers, ours, and the models' own logits."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.data import DataError
from prefopt.errors import UserError
from prefopt.evaluate import EvalRequest, evaluate_run
from prefopt.evaluate.harness import MMLU_MINI, ask, prepare
from prefopt.evaluate.subject import load_subject
from support.evaluate import CONTEXT, FIXTURES, make_run, write_lines

pytest.importorskip("lm_eval", reason="lm-evaluation-harness, the extra [eval], is not installed")

SUBJECTS = ("anatomy", "virology")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two models drawn apart: a random adapter would hardly change which letter is the likeliest."""
    return make_run(tmp_path_factory.mktemp("weights"), "weights")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Questions of every benchmark; of MMLU two subjects, with questions of one number."""
    folder = tmp_path_factory.mktemp("tasks")
    for file in FIXTURES.glob("*_*.jsonl"):
        shutil.copy(file, folder)
    for subject in SUBJECTS:
        rows = [{"question": f"{n}?", "choices": [str(n + k) for k in range(4)], "answer": n % 4} for n in range(100)]
        write_lines(folder / f"mmlu_{subject}_test.jsonl", rows)
        write_lines(folder / f"mmlu_{subject}_dev.jsonl", rows[:5])
    return folder


@pytest.fixture(scope="module")
def suite(run, tasks, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    path = evaluate_run(EvalRequest(run=run, suite="benchmarks", tasks_dir=tasks, out=out))
    assert sorted(file.name for file in out.iterdir()) == ["eval.json", "eval_summary.csv", "plots"]
    return json.loads(path.read_text(encoding="utf-8"))["suites"]["benchmarks"]


def scores(suite, task, metric) -> dict:
    return {one["model"]: one for one in suite["scores"] if one["task"].startswith(task) and one["metric"] == metric}


@torch.no_grad()
def right(model, tokenizer, rows, dev, subject) -> list[bool]:
    """Whether the likeliest of " A" to " D" is the answer, from the logits and a prompt written out here."""

    def shown(row, answer):
        options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
        return f"{row['question']}\n{options}\nAnswer:" + (f" {'ABCD'[row['answer']]}" if answer else "")

    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    head += "\n\n".join(shown(row, True) for row in dev) + "\n\n"
    hits = []
    for row in rows:
        prompt = tokenizer(head + shown(row, False)).input_ids
        logps = []
        for letter in "ABCD":
            ids = tokenizer(f"{head}{shown(row, False)} {letter}").input_ids
            assert ids[: len(prompt)] == prompt and len(ids) <= CONTEXT
            logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            logps.append(sum(logp[at - 1, ids[at]].item() for at in range(len(prompt), len(ids))))
        hits.append(max(range(4), key=logps.__getitem__) == row["answer"])
    return hits


def test_mmlu_mini_asks_its_questions_and_scores_them_right(suite, run, tasks):
    tokenizer = AutoTokenizer.from_pretrained(run)
    expected = {"base": {}, "run": {}}
    for who, path in (("base", run.parent / "base"), ("run", run)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for subject in SUBJECTS:
            lines = (tasks / f"mmlu_{subject}_test.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            asked = [rows[place] for place in MMLU_MINI[subject]]
            expected[who][subject] = right(model, tokenizer, asked, rows[:5], subject)
    assert expected["base"] != expected["run"]  # a mix-up of the two would show
    found = scores(suite, "MMLU-mini (2 of 57 subjects)", "acc")
    for who, by_subject in expected.items():
        assert found[who]["value"] == pytest.approx(sum(map(sum, by_subject.values())) / 20)
        for subject, hits in by_subject.items():
            tasks_found = suite["details"]["benchmarks"]["mmlu"]["tasks"]
            assert tasks_found[f"mmlu_{subject}"][who] == pytest.approx(sum(hits) / 10)
    assert found["run"]["chance"] == 0.25 and found["run"]["n_shot"] == 5
    # files in the schema of a published set may hold anything, so they do not go by its id
    assert suite["data"]["MMLU-mini (2 of 57 subjects)"] == {
        "name": "MMLU-mini, from local files",
        "hub": None,
        "split": "test",
        "revision": None,
    }


def test_values_and_errors_are_those_of_lm_evaluation_harness(suite, run, tasks):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    subject = load_subject(run)
    asked = prepare(tasks, None)
    for name, title, metrics in (
        ("hellaswag", "HellaSwag", ("acc", "acc_norm")),
        ("truthfulqa_mc", "TruthfulQA MC2", ("acc",)),
    ):
        with subject.running("run") as model:
            own = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=subject.tokenizer, batch_size=4, device="cpu"),
                tasks=list(asked[name].tasks.values()),
                task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
                bootstrap_iters=100,
            )["results"][asked[name].benchmark.task]  # fmt: skip
        for metric in metrics:
            ours = scores(suite, title, "mc2" if title.endswith("MC2") else metric)["run"]
            assert ours["value"] == pytest.approx(float(own[f"{metric},none"]), abs=1e-6)
            if metric != "acc" or title == "HellaSwag":  # a share: lm-eval's error has a formula too
                assert ours["stderr"] == pytest.approx(own[f"{metric}_stderr,none"], abs=1e-9)
    chance = (2 / 4 + 1 / 3 + 1 / 5 + 2 / 3) / 4  # true answers among all, question by question
    assert scores(suite, "TruthfulQA MC2", "mc2")["run"]["chance"] == pytest.approx(chance)


def test_base_and_run_are_shown_the_same_prompts(run, tasks):
    subject, asked = load_subject(run), prepare(tasks, None)
    shown = []
    for who in ("base", "run", "base"):
        with subject.running(who) as model:
            answers = ask(model, subject.tokenizer, asked["hellaswag"], limit=3, batch_size=4)
        shown.append([(one["question"], one["prompt"]) for one in answers.questions["hellaswag"]])
    assert shown[0] == shown[1] == shown[2] and len(shown[0]) == 3


def test_a_limit_takes_the_first_of_the_list(run, tasks, tmp_path):
    request = EvalRequest(run=run, suite="benchmarks", tasks_dir=tasks, limit=2, out=tmp_path)
    suite = json.loads(evaluate_run(request).read_text(encoding="utf-8"))["suites"]["benchmarks"]
    counts = {one["task"]: one["n"] for one in suite["scores"]}
    assert counts == {
        "HellaSwag": 2,
        "TruthfulQA MC2": 2,
        "MMLU-mini (2 of 57 subjects)": 4,
    }


def test_an_interrupted_evaluation_goes_on(run, tasks, tmp_path, monkeypatch, caplog):
    import prefopt.evaluate.benchmarks as benchmarks

    real, asked = benchmarks.ask, []

    def interrupted(model, tokenizer, one, **options):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(one.benchmark.title)
        return real(model, tokenizer, one, **options)

    monkeypatch.setattr(benchmarks, "ask", interrupted)
    request = EvalRequest(run=run, suite="benchmarks", tasks_dir=tasks, limit=2, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(request)
    assert [file.name for file in tmp_path.iterdir()] == [".eval.partial.json"]
    monkeypatch.setattr(benchmarks, "ask", lambda *a, **k: asked.append("more") or real(*a, **k))
    path = evaluate_run(request)
    assert asked == ["HellaSwag", "HellaSwag", "TruthfulQA MC2", "more", "more", "more"]
    assert not (tmp_path / ".eval.partial.json").exists()
    whole = evaluate_run(EvalRequest(run=run, suite="benchmarks", tasks_dir=tasks, limit=2, out=tmp_path / "whole"))
    first, second = (
        json.loads(one.read_text(encoding="utf-8"))["suites"]["benchmarks"]["scores"] for one in (path, whole)
    )
    assert first == second


def test_what_is_missing_is_said_before_a_model_is_loaded(tmp_path, tasks, monkeypatch):
    import prefopt.evaluate.run as module

    monkeypatch.setattr(module, "load_subject", lambda *_: pytest.fail("a model was loaded"))
    folder = tmp_path / "run"
    folder.mkdir()
    adapter = {"base_model_name_or_path": "owner/model"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")

    def said(**options) -> str:
        with pytest.raises((UserError, DataError)) as error:
            evaluate_run(EvalRequest(run=folder, suite="benchmarks", **options))
        return str(error.value)

    # the tests' environment has no hub
    assert "Rowan/hellaswag) are not here and could not be fetched; connect to the network" in said()
    assert "is not a folder" in said(tasks_dir=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no questions; expected files such as hellaswag_train.jsonl" in said(tasks_dir=tmp_path / "empty")
    copy = shutil.copytree(tasks, tmp_path / "copy")
    (copy / "hellaswag_train.jsonl").unlink()
    assert "expected beside it hellaswag_train, hellaswag_validation" in said(tasks_dir=copy)
    (copy / "hellaswag_validation.jsonl").unlink()
    rows = (copy / "mmlu_anatomy_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "mmlu_anatomy_test.jsonl").write_text("".join(rows[:50]), encoding="utf-8")
    assert "mmlu_anatomy has 50 test questions, and MMLU-mini asks for number" in said(tasks_dir=copy)
    (copy / "mmlu_anatomy_test.jsonl").write_text("".join(rows[:3]) + "{\n", encoding="utf-8")
    assert "mmlu_anatomy_test.jsonl:4: is not JSON" in said(tasks_dir=copy)
    write_lines(copy / "truthfulqa_mc_validation.jsonl", [{"question": "Why?"}])
    assert "truthfulqa_mc_validation.jsonl has no column mc2_targets" in said(tasks_dir=copy)
    assert not (folder / "eval.json").exists()
