"""The benchmark suite without lm-evaluation-harness: what is made of answers, and the list of MMLU-mini."""

import hashlib

import numpy as np
import pytest

from prefopt.evaluate.benchmarks import Finished, judged
from prefopt.evaluate.harness import BENCHMARKS, MMLU_MINI, Answers


def test_mmlu_mini_is_the_list_that_its_rule_gives():
    assert len(MMLU_MINI) == 57 and list(MMLU_MINI) == sorted(MMLU_MINI)

    def place(subject: str, row: int) -> str:
        return hashlib.sha256(f"mmlu-mini 1|{subject}|{row}".encode()).hexdigest()

    for subject, rows in MMLU_MINI.items():
        assert rows == sorted(sorted(range(100), key=lambda row: place(subject, row))[:10]), subject


def question(number: int, chance: float = 0.25, **metrics: float) -> dict:
    return {"metrics": metrics, "chance": chance, "question": f"q{number}", "prompt": f"p{number}"}


def answers(name: str, hits: list[float], chance: float = 0.25, cut: int = 0) -> Answers:
    """One task's answers; a second metric, if the benchmark has one, is never right."""
    first, *others = BENCHMARKS[name].metrics
    rest = dict.fromkeys(others, 0.0)
    task = BENCHMARKS[name].task + ("virology" if name == "mmlu" else "")
    return Answers({task: [question(n, chance, **{first: hit}, **rest) for n, hit in enumerate(hits)]}, cut)


def test_every_benchmark_has_base_run_change_error_and_chance():
    base, run = [1.0] * 10 + [0.0] * 30, [1.0] * 30 + [0.0] * 10
    masses = {"base": [0.2, 0.3, 0.4], "run": [0.3, 0.5, 0.9]}
    results = judged(
        {
            "hellaswag": {"base": answers("hellaswag", base), "run": answers("hellaswag", run)},
            "truthfulqa_mc": {who: answers("truthfulqa_mc", one, chance=0.4) for who, one in masses.items()},
        },
        None,
        0,
    )
    by_name = {(one.task, one.metric, one.model): one for one in results.scores}
    assert len(by_name) == len(results.scores) == 9
    hellaswag = by_name["HellaSwag", "acc_norm", "run"]
    assert (hellaswag.value, hellaswag.chance, hellaswag.n_shot, hellaswag.n) == (
        0.75,
        0.25,
        10,
        40,
    )
    assert by_name["HellaSwag", "acc_norm", "change"].value == 0.5
    assert by_name["HellaSwag", "acc_norm", "base"].at_chance and not hellaswag.at_chance
    assert by_name["HellaSwag", "acc", "run"].value == 0.0
    mc2 = by_name["TruthfulQA MC2", "mc2", "run"]
    assert mc2.value == pytest.approx(np.mean(masses["run"])) and mc2.chance == pytest.approx(0.4)
    change = by_name["TruthfulQA MC2", "mc2", "change"]
    assert change.value == pytest.approx(np.mean(masses["run"]) - np.mean(masses["base"]))
    assert change.stderr > 0 and change.low < change.value < change.high
    assert results.warnings == ["No questions were given for MMLU-mini."]
    details = results.details["benchmarks"]["hellaswag"]
    assert details["questions"] == 40
    assert details["tasks"]["hellaswag"] == {"base": 0.25, "run": 0.75, "n": 40}
    text = "".join(f"q{n}" for n in range(40))
    assert details["questions_sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_part_of_mmlu_is_not_called_mmlu_mini_and_limits_are_said():
    results = judged({"mmlu": {"run": answers("mmlu", [1.0, 0.0], cut=3)}}, 2, 0)
    assert {one.task for one in results.scores} == {"MMLU-mini (1 of 57 subjects)"}
    assert [one.model for one in results.scores] == ["run"]  # no base is known
    cut, limited, missing = results.warnings
    assert "3 prompts with their answers are longer than the model's context" in cut
    assert "Only the first 2 questions of each task were asked" in limited
    assert missing == "No questions were given for HellaSwag, TruthfulQA MC2."


def test_finished_parts_are_kept_for_the_same_evaluation_alone(tmp_path):
    path = tmp_path / "new" / "partial.json"
    kept = answers("hellaswag", [1.0, 0.0], cut=1)
    Finished(path, "a").add("hellaswag base", kept)
    again = Finished(path, "a")
    assert again.get("hellaswag base") == kept and again.get("hellaswag run") is None
    assert Finished(path, "b").get("hellaswag base") is None
    path.write_text("{", encoding="utf-8")
    assert Finished(path, "a").get("hellaswag base") is None
    again.remove()
    assert not path.exists()
