"""S0, S1 and S2 from data to card and export, each by the command that runs the real one, with --tiny."""

import json

import pytest
from transformers import AutoTokenizer

from prefopt.cli import main
from prefopt.data import load_rows, tokenize_rows
from prefopt.recipe import load_recipe
from prefopt.recipe.run import preference_config
from support.recipes_tiny import counts, train_tiny


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def scored(run, row=0):
    """Prompt and scored answer of a training row, as the run's own tokenizer and template render them."""
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    loaded = load_rows(run.own.data.path, split="train")
    rows = tokenize_rows(loaded, tokenizer, max_length=None, chat_template_kwargs=run.own.data.chat_template_kwargs)
    ids = rows.dataset[row]
    return tokenizer.decode(ids["prompt_ids"]), tokenizer.decode(ids["completion_ids"])


def test_s0_kto_on_qwen3(capsys):
    run = train_tiny("s0-qwen3-kto", capsys)
    # 240 pairs, one of them with equal scores; two answers a pair
    found = counts(run)["sources"]["ultrafeedback_binarized"]
    assert (found["read"], found["used"], found["kept"]) == (240, 239, 478)
    assert found["left_out"] == {"both scores are equal": 1}
    trained, held_out = (found["splits"][name]["rows"] for name in ("train", "validation"))
    data = run.json("run.json")["data"]
    assert (data["train"]["rows"], data["eval"]["rows"]) == (trained, held_out)
    assert run.json("summary.json")["n"] == held_out
    # policy and reference are one model before the first step, and 16 times sigmoid(0) / 16 is exact
    assert run.logs("loss")[0] == 0.5 and run.logs("rewards/margins")[-1] > 0.05
    prompt, answer = scored(run)
    # Qwen3 with thinking off: the empty thought stands in the prompt and is not scored
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert answer.endswith("<|im_end|>\n") and "think" not in answer
    assert main(["export", str(run.folder), "--format", "adapter"]) == 0
    assert (run.folder / "export" / "adapter" / "adapter_model.safetensors").is_file()


def test_s1_enhanced_kto_on_three_sources_in_turn(capsys):
    run = train_tiny("s1-smollm2-enhanced-kto", capsys)
    found = counts(run)
    # 80 pairs a source, one of which each converter leaves out; a tree of oasst1 has three messages
    assert [found["sources"][name]["read"] for name in ("hh-rlhf", "shp", "oasst1")] == [
        80,
        80,
        240,
    ]
    assert {one["groups"] for one in found["sources"].values()} == {79}
    assert found["total"]["kept"] == 3 * 2 * 79
    config = run.json("run.json")["config"]
    assert (config["shift"], config["loss_aversion"], config["odds_weight"]) == ("off", 2.25, 0.1)
    prompt, answer = scored(run)
    # the base model has no template: that of the recipe is saved with the run
    assert prompt.startswith("Human: ") and prompt.endswith("\n\nAssistant:")
    assert answer.startswith(" ") and answer.endswith("<|endoftext|>")
    assert main(["export", str(run.folder), "--format", "merged"]) == 0
    assert (run.folder / "export" / "merged" / "model.safetensors").is_file()
    # the shift is present and off: one override turns it on
    overrides = {"loss.shift": "ema", "loss.main_bound": None, "loss.odds_bound": None}
    shifted = preference_config(load_recipe(run.folder / "recipe.yaml", overrides))
    assert (shifted.shift, shifted.shift_bound) == ("ema", 0.5)


def test_s2_arabic_answers_and_a_method_of_pairs_on_the_same_rows(capsys):
    run = train_tiny("s2-arabic-qwen-kto", capsys)
    found = counts(run)["total"]
    assert found["left_out"]["another language"] > 0 and found["dropped"] == {
        "in another language": found["answers"] - found["kept"]
    }
    rows = load_rows(run.own.data.path, split="train").rows
    assert all("\u0600" < text[0]["content"].strip(" «")[0] < "\u06ff" for text in rows["prompt"])
    assert main(["export", str(run.folder), "--format", "gguf", "--quant", "f16"]) == 0
    assert list((run.folder / "export" / "gguf").glob("*.gguf"))
    capsys.readouterr()
    # dpo, beside which the published comparison put kto, learns from the same folder
    words = ["train", str(run.folder / "recipe.yaml"), "--loss.method", "dpo"]
    for option in ("desirable_weight", "undesirable_weight", "kl_estimator", "kl_rows"):
        words += [f"--loss.{option}", "null"]
    words += ["--training.sampler", "null", "--training.max_steps", "2"]
    assert main([*words, "--training.output_dir", "dpo"]) == 0
    assert "building" not in capsys.readouterr().out
    data = json.loads((run.folder.parents[1] / "dpo" / "run.json").read_text("utf-8"))["data"]
    split = found["splits"]["train"]
    # each tree has one prompt with one good and at most one bad answer
    assert data["train"]["pairs"] == data["train"]["paired_by_prompt"] == split["undesirable"]
    assert data["train"]["without_pair"] == split["desirable"] - split["undesirable"]
