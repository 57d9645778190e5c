"""S3 in 4 bits and S4's classifier from data to card and export, by the published commands with --tiny."""

import csv
import json

import pytest
from transformers import AutoModelForCausalLM

from prefopt.cli import main
from support.recipes_tiny import counts, train_tiny


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_s3_kto_on_a_base_in_four_bits(capsys):
    run = train_tiny("s3-r1-distill-kto-4bit", capsys)
    found = counts(run)["total"]
    assert (found["read"], found["kept"], found["dropped"]) == (
        481,
        480,
        {"repeated within its source": 1},
    )
    record = run.json("run.json")
    assert record["config"]["optim"] == "adamw_bnb_8bit" and run.own.model.quantization == "nf4"
    base = AutoModelForCausalLM.from_pretrained(run.own.model.path)
    # what is packed in 4 bits is counted by the numbers it stands for
    told = record["model"]["parameters"] - record["model"]["trainable"]
    assert told == sum(parameter.numel() for parameter in base.parameters())
    # R1-Distill's template opens an answer with a thought that no rendered row has
    assert record["data"]["train"]["prompt_cut"] == record["data"]["train"]["rows"]
    assert run.logs("loss")[0] == 0.5  # with the adapter at 0, in 4 bits too
    assert run.logs("rewards/margins")[-1] > 0.05
    assert "memory at its peak: " in run.printed
    in_training = run.logs("eval_rewards/margins")[-1]
    for quantization, same in ((None, True), ("none", False)):
        margin, evaluated = margin_of(run.folder, quantization)
        # bitsandbytes multiplies in bf16 in evaluation on some CPUs: 3e-4 here, and 7e-3 for whole weights
        assert (abs(margin - in_training) < 1e-3) == same
        assert any("weights without quantization" in one for one in evaluated["warnings"]) != same
    assert main(["export", str(run.folder), "--format", "merged-4bit"]) == 0
    config = json.loads((run.folder / "export" / "merged-4bit" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert main(["export", str(run.folder), "--format", "gguf"]) == 0


def margin_of(folder, quantization):
    """The held-out margin by `prefopt eval`, and the evaluation."""
    flags = [] if quantization is None else ["--quantization", quantization]
    assert main(["eval", str(folder), "--suite", "preference", *flags]) == 0
    suite = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["suites"]["preference"]
    (margin,) = (
        score["value"]
        for score in suite["scores"]
        if (score["task"], score["metric"], score["model"]) == ("rewards", "margin", "run")
    )
    return margin, suite


def test_s4_a_classifier_by_supervised_fine_tuning(capsys, tmp_path):
    run = train_tiny("s4-qwen3-mmlu-pro-sft", capsys)
    found = counts(run)["total"]
    # 14 fields of 18 questions, and one question twice; a fifth each for validation and test, rounded up
    assert (found["read"], found["used"]) == (14 * 18 + 1, 14 * 18)
    assert {name: split["rows"] for name, split in found["splits"].items()} == {
        "train": 151,
        "validation": 50,
        "test": 51,
    }
    losses = run.logs("loss")
    assert sum(losses[-5:]) < sum(losses[:5])
    assert len(run.logs("eval_loss")) >= 2  # one an epoch, and one at the end
    data = str(run.inputs / "data")
    assert main(["eval", str(run.folder), "--suite", "classify", "--data", data, "--limit", "20"]) == 0
    scores = json.loads((run.folder / "eval.json").read_text(encoding="utf-8"))
    assert "classify" in scores["suites"]
    out = tmp_path / "answers.csv"
    words = ["classify", str(run.folder), data, "--split", "test", "--out", str(out)]
    assert main(words) == 0
    with out.open(encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 51
    assert main(["export", str(run.folder), "--format", "merged"]) == 0
