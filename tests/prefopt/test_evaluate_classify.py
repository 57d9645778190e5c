"""Classification of a run: likelihoods against the model's own logits, counts against counting by hand, bad rows."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.data import DataError
from prefopt.data.build.convert.mmlu_pro import ASK_CATEGORY, CATEGORIES
from prefopt.data.build.plan import make_plan
from prefopt.data.build.run import build
from prefopt.errors import UserError
from prefopt.evaluate import EvalRequest, evaluate_run
from prefopt.evaluate.classify import judged, read_questions
from support.evaluate import FIXTURES, make_run, write_lines

QUESTIONS = FIXTURES / "mmlu_pro.jsonl"
NONE = len(CATEGORIES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two models drawn apart: a random adapter would hardly change which name is the likeliest."""
    return make_run(tmp_path_factory.mktemp("weights"), "weights")


def request(run, tmp_path, data=QUESTIONS, **options):
    return EvalRequest(run=run, suite="classify", data=str(data), out=tmp_path, **options)


@torch.no_grad()
def likeliest(model, tokenizer, question: str) -> str:
    asked = f"<|im_start|>user\n{ASK_CATEGORY.format(question=question)}<|im_end|>\n<|im_start|>assistant\n"
    start = len(tokenizer(asked, add_special_tokens=False).input_ids)
    found = {}
    for name in CATEGORIES:
        ids = tokenizer(f"{asked}{name}<|im_end|>\n", add_special_tokens=False, return_tensors="pt")
        logp = model(**ids).logits[0].double().log_softmax(-1)
        targets = ids.input_ids[0, start:]
        found[name] = logp[start - 1 : -1].gather(1, targets[:, None]).sum().item()
    return max(found, key=found.get)


def test_likelihoods_against_the_logits(run, tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run)
    models = {
        who: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for who, path in (("base", run.parent / "base"), ("run", run))
    }
    suite = json.loads(evaluate_run(request(run, tmp_path, limit=5)).read_text(encoding="utf-8"))
    suite = suite["suites"]["classify"]
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()[:5]]
    expected = {"base": np.zeros((NONE, NONE + 1)), "run": np.zeros((NONE, NONE + 1))}
    for row in rows:
        right = CATEGORIES.index(row["category"])
        for who, model in models.items():
            said = likeliest(model, tokenizer, row["question"])
            expected[who][right, CATEGORIES.index(said)] += 1
    assert not np.array_equal(expected["base"], expected["run"])  # a mix-up would show
    for who, matrix in expected.items():
        assert np.array_equal(suite["details"]["confusion"][who]["likelihood"], matrix), who
    assert np.sum(suite["details"]["confusion"]["run"]["generated"]) == 5
    for name in suite["pictures"]:
        head = (tmp_path / name).read_bytes()[:200]
        assert head.startswith(b"\x89PNG") or b"<?xml" in head
    assert {f"plots/eval_confusion_{way}.png" for way in ("likelihood", "generated")} <= set(suite["pictures"])
    said = capsys.readouterr().out
    assert re.search(r"^category +n +base, likelihood +base, generated +run, likelihood", said, re.M)
    assert "Only the first 5 rows were used." in said


def test_counts_by_hand():
    law, math, cs = (CATEGORIES.index(name) for name in ("law", "math", "computer science"))
    right = np.array([law, law, math, cs, cs, cs])
    found = {
        "base": {
            "likelihood": np.array([law, math, math, math, math, math]),
            "generated": np.array([NONE] * 6),
            "texts": list("abcdef"),
        },
        "run": {
            "likelihood": np.array([law, law, math, cs, cs, math]),
            "generated": np.array([law, NONE, math, cs, cs, cs]),
            "texts": list("uvwxyz"),
        },
    }
    results = judged(right, found)
    values = {(one.metric, one.model): one.value for one in results.scores}
    assert values["accuracy, likelihood", "base"] == pytest.approx(2 / 6)
    assert values["accuracy, likelihood", "run"] == pytest.approx(5 / 6)
    assert values["accuracy, likelihood", "change"] == pytest.approx(3 / 6)
    assert values["accuracy, generated", "base"] == 0.0
    assert values["accuracy, generated", "run"] == pytest.approx(5 / 6)
    assert all(one.chance == 1 / 14 for one in results.scores if one.model != "change")
    table = {row["category"]: row for row in results.details["categories"]}
    assert list(table) == ["computer science", "law", "math"]
    assert table["computer science"] == {
        "category": "computer science",
        "n": 3,
        "base, likelihood": 0.0,
        "base, generated": 0.0,
        "run, likelihood": pytest.approx(2 / 3),
        "run, generated": 1.0,
    }
    matrix = np.array(results.details["confusion"]["run"]["generated"])
    assert matrix.shape == (14, 15) and matrix.sum() == 6
    assert (matrix[law, law], matrix[law, NONE], matrix[cs, cs], matrix[math, math]) == (1, 1, 3, 1)
    assert "always saying computer science would score 0.500 here" in results.how[0]
    assert results.warnings[0] == "16.7 % of the run's generated answers give none of the names."
    assert results.warnings[1].startswith("There are no questions of biology, business")


def test_a_built_folder_is_read_like_the_published_rows(run, tmp_path):
    plan = make_plan([f"mmlu-pro:{QUESTIONS}"], test=0.5, one_label=True)
    built = build(plan, tmp_path / "built")
    published = read_questions(request(run, tmp_path))
    asked = {
        message[-1]["content"]: CATEGORIES[place]
        for message, place in zip(published.prompts, published.right, strict=True)
    }
    assert len(asked) == 28 and set(asked.values()) == set(CATEGORIES)
    half = read_questions(request(run, tmp_path, built.folder))
    assert 0 < len(half.prompts) < 28
    for message, place in zip(half.prompts, half.right, strict=True):
        assert asked[message[-1]["content"]] == CATEGORIES[place]


def test_names_behind_a_space_in_text_rows(run, tmp_path):
    rows = [{"prompt": "Q: 2 + 2?\nField:", "completion": " math", "label": True}]
    questions = read_questions(request(run, tmp_path, write_lines(tmp_path / "t.jsonl", rows)))
    assert (questions.chat, questions.lead) == (False, " ")
    path = evaluate_run(request(run, tmp_path, tmp_path / "t.jsonl"))
    scores = json.loads(path.read_text(encoding="utf-8"))["suites"]["classify"]["scores"]
    assert all(one["stderr"] is None for one in scores)  # one question has no spread


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "completion": "maths", "label": True},
            ":1: completion is 'maths'; expected",
        ),
        ({"question": "a", "category": "maths"}, "category is 'maths'; expected one of"),
        ({"question": "a", "category": "math"} | {"options": []}, None),
    ],
)
def test_rows_that_are_none(run, tmp_path, row, message):
    data = write_lines(tmp_path / "rows.jsonl", [row])
    needed = {"question_id": 1, "options": [], "answer": "A", "answer_index": 0}
    if "question" in row:
        write_lines(data, [row | needed])
    if message is None:
        assert len(read_questions(request(run, tmp_path, data)).prompts) == 1
        return
    with pytest.raises(DataError) as error:
        read_questions(request(run, tmp_path, data))
    assert message in str(error.value)


def test_data_must_be_named(run):
    with pytest.raises(UserError, match="--data is missing: questions with their category"):
        evaluate_run(EvalRequest(run=run, suite="classify"))
