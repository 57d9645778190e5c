"""Held-out preferences of a run: every number against the models' own logits in fp64, and what is said of bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.data import DataError, load_rows, split_by_group
from prefopt.data.collate import pair_mismatched
from prefopt.errors import UserError
from prefopt.evaluate import EvalRequest, evaluate_run
from prefopt.evaluate.subject import load_subject
from prefopt.generation import generate
from support.evaluate import BETA, make_run, write_lines
from support.tiny_models import CHATML, ROWS, make_rows, make_tokenizer

# Two fp32 forward passes of a random two-layer model, summed over up to 60 tokens of about 10 nats each: rounding of
# some 1e-6 a token. A token more or less would change a sum by nats.
NATS = 2e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    """eval.json's suite of all rows, with pairs among them, and the folder."""
    out = tmp_path_factory.mktemp("out")
    rows = make_rows(True)
    pair = {
        "prompt": [{"role": "user", "content": "Which month comes after May?"}],
        "chosen": [{"role": "assistant", "content": "June."}],
        "rejected": [{"role": "assistant", "content": "A Thursday."}],
    }
    data = write_lines(out / "rows.jsonl", [*rows[:6], pair])
    request = EvalRequest(run=run, suite="preference", data=str(data), out=out, rule="language", max_new_tokens=6)
    path = evaluate_run(request)
    return json.loads(path.read_text(encoding="utf-8"))["suites"]["preference"], out


def value(suite, metric, model="run"):
    (one,) = [s for s in suite["scores"] if s["metric"] == metric and s["model"] == model]
    return one["value"]


@torch.no_grad()
def logp(model, prompt_ids, completion_ids) -> float:
    """Of a completion, from the model's logits in fp64."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
    at = range(len(prompt_ids), ids.shape[1])
    return sum(logits[place - 1, ids[0, place]].item() for place in at)


@pytest.fixture(scope="module")
def models(run):
    def base():
        return AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32).eval()

    return {"base": base(), "run": PeftModel.from_pretrained(base(), run).eval()}


def ids(tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Of a chat of one question, written out by hand."""
    asked = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer(f"{asked}{answer}<|im_end|>\n", add_special_tokens=False).input_ids
    length = len(tokenizer(asked, add_special_tokens=False).input_ids)
    return whole[:length], whole[length:]


def test_every_number_against_the_logits(found, models, run):
    suite, _ = found
    tokenizer = AutoTokenizer.from_pretrained(run)
    texts = [*ROWS[:6], ("Which month comes after May?", "June.", True)]
    texts.append(("Which month comes after May?", "A Thursday.", False))
    tokens = [ids(tokenizer, prompt, answer) for prompt, answer, _ in texts]
    up = np.array([label for *_, label in texts])
    logps = {who: np.array([logp(model, *row) for row in tokens]) for who, model in models.items()}
    rewards = BETA * (logps["run"] - logps["base"])
    assert abs(rewards).max() > 0.1  # the two models differ, so that a mix-up would show
    assert value(suite, "margin") == pytest.approx(rewards[up].mean() - rewards[~up].mean(), abs=NATS)
    wins = [float(a > b) for a in rewards[up] for b in rewards[~up]]
    assert value(suite, "accuracy, all") == pytest.approx(np.mean(wins))
    assert value(suite, "accuracy, pairs") == float(rewards[6] > rewards[7])
    lengths = np.array([len(answer) for _, answer in tokens])
    for who in ("base", "run"):
        for name, side in (("desirable", up), ("undesirable", ~up)):
            whole = logps[who][side]
            assert value(suite, f"{name}, per answer", who) == pytest.approx(whole.mean(), abs=NATS)
            assert value(suite, f"{name}, per token", who) == pytest.approx(whole.sum() / lengths[side].sum(), abs=NATS)
    change = (logps["run"] - logps["base"])[up].sum() / lengths[up].sum()
    assert value(suite, "desirable, per token", "change") == pytest.approx(change, abs=NATS)
    # one prompt has two rows, so partners lie two back
    partners = pair_mismatched([0, 1, 2, 3, 4, 5, 6, 6])
    mixed = [(tokens[i][0], tokens[j][1]) for i, j in enumerate(partners)]
    kl = np.mean([logp(models["run"], *row) - logp(models["base"], *row) for row in mixed])
    assert value(suite, "KL, mismatched") == pytest.approx(kl, abs=NATS)


def test_sampled_answers_are_judged_and_their_kl_is_that_of_their_tokens(found, models, run):
    suite, _ = found
    samples = suite["details"]["samples"]
    assert [one["prompt"] for one in samples] == [
        *(prompt for prompt, *_ in ROWS[:6]),
        "Which month comes after May?",
    ]
    for when, model in (("before", "base"), ("after", "run")):
        passed = np.mean([one[f"{when}_ok"] for one in samples])
        assert value(suite, "pass the rule", model) == pytest.approx(passed)
    wins = np.mean([(1 + one["after_ok"] - one["before_ok"]) / 2 for one in samples])
    assert value(suite, "wins") == pytest.approx(wins)
    subject = load_subject(run)
    prompts = [ids(subject.tokenizer, one["prompt"], "")[0] for one in samples]
    with subject.running("run") as model:
        made = generate(
            model, prompts, pad_token_id=0, eos_token_ids=[3], max_new_tokens=6, batch_size=8,
            temperature=1.0, seed=0,
        )  # fmt: skip
    texts = subject.tokenizer.batch_decode(made, skip_special_tokens=True)
    assert [text.strip() for text in texts] == [one["after"] for one in samples]
    rows = list(zip(prompts, made, strict=True))
    kl = np.mean([logp(models["run"], *row) - logp(models["base"], *row) for row in rows])
    assert value(suite, "KL, own answers") == pytest.approx(kl, abs=NATS)


def test_generation_samples_the_whole_distribution_and_ends(run):
    subject = load_subject(run)
    prompts = [[5, 6, 7], [8]]
    shared = {"pad_token_id": 0, "max_new_tokens": 5, "batch_size": 2}
    with subject.running("base") as model:
        model.generation_config.top_k = 1  # a model's own settings must not decide
        greedy = generate(model, prompts, eos_token_ids=[], temperature=None, **shared)
        sampled = generate(model, prompts, eos_token_ids=[], temperature=1.0, seed=1, **shared)
        again = generate(model, prompts, eos_token_ids=[], temperature=1.0, seed=1, **shared)
        alone = generate(model, prompts[1:], eos_token_ids=[], temperature=None, **shared)
        ends = generate(model, prompts, eos_token_ids=[greedy[0][1]], temperature=None, **shared)
        model.generation_config.top_k = 50
    assert greedy != sampled == again
    assert alone == greedy[1:]  # the padding of a longer neighbour changes nothing
    assert ends[0] == greedy[0][: greedy[0].index(greedy[0][1]) + 1]


def test_the_recipes_own_split_is_the_default_and_trained_prompts_are_noticed(run, tmp_path, capsys):
    loaded = load_rows(run.parent / "rows.jsonl")
    held_out = split_by_group(loaded, 0.4, 3)[1]
    content = evaluate_run(EvalRequest(run=run, suite="preference", out=tmp_path))
    suite = json.loads(content.read_text(encoding="utf-8"))["suites"]["preference"]
    assert suite["details"]["rows"]["rows"] == len(held_out.rows)
    assert not any("trained on" in sentence for sentence in suite["warnings"])
    data = str(run.parent / "rows.jsonl")
    evaluate_run(EvalRequest(run=run, suite="preference", data=data, limit=9, out=tmp_path))
    seen = len(set(loaded.rows["group"][:9]) - set(held_out.rows["group"]))
    assert 0 < seen < 9
    said = capsys.readouterr().out
    assert f"{seen} of 9 prompts were trained on, so this is not a held-out evaluation." in said
    assert "Only the first 9 rows were used." in said


def test_a_limit_keeps_the_last_pair_whole(run, tmp_path):
    pairs = [{"prompt": f"Count to {n}.", "chosen": "One, two.", "rejected": "No."} for n in range(3)]
    data = write_lines(tmp_path / "pairs.jsonl", pairs)
    request = EvalRequest(run=run, suite="preference", data=str(data), limit=3, out=tmp_path)
    suite = json.loads(evaluate_run(request).read_text(encoding="utf-8"))["suites"]["preference"]
    assert suite["details"]["rows"]["rows"] == 4
    (pairs,) = [one for one in suite["scores"] if one["metric"] == "accuracy, pairs"]
    assert pairs["n"] == 2


def test_a_run_of_all_weights_and_one_without_a_change(tmp_path):
    run = make_run(tmp_path, "weights")
    data = str(tmp_path / "rows.jsonl")
    asked = {"suite": "preference", "data": data, "limit": 6}
    path = evaluate_run(EvalRequest(run=run, **asked))
    suite = json.loads(path.read_text(encoding="utf-8"))["suites"]["preference"]
    assert suite["model"]["kind"] == "weights" and value(suite, "margin") != 0
    same = evaluate_run(EvalRequest(run=run, base=str(run), out=tmp_path / "same", **asked))
    suite = json.loads(same.read_text(encoding="utf-8"))["suites"]["preference"]
    assert value(suite, "margin") == value(suite, "KL, mismatched") == 0.0
    assert value(suite, "accuracy, all") == 0.5
    assert any("0.000 is indistinguishable from 0" in said for said in suite["warnings"])
    (run / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="which is not known; give it with --base"):
        evaluate_run(EvalRequest(run=run, **asked))


def test_rows_of_one_label_have_no_margin(run, tmp_path):
    data = write_lines(tmp_path / "up.jsonl", [row for row in make_rows(True) if row["label"]][:4])
    path = evaluate_run(EvalRequest(run=run, suite="preference", data=str(data), out=tmp_path))
    suite = json.loads(path.read_text(encoding="utf-8"))["suites"]["preference"]
    assert {one["metric"] for one in suite["scores"]} == {
        "KL, mismatched",
        "desirable, per answer",
        "desirable, per token",
    }
    assert any("All rows have the same label" in sentence for sentence in suite["warnings"])


def spoiled(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_a_folder_without_what_is_needed(run, tmp_path):
    with pytest.raises(UserError, match="there is no run folder"):
        load_subject(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no trained model"):
        load_subject(tmp_path)
    copy = spoiled(run, tmp_path)
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="an adapter_config.json but no adapter_model.safetensors"):
        load_subject(copy)


def test_a_base_that_is_gone_and_one_that_does_not_fit(run, tmp_path):
    copy = spoiled(run, tmp_path)
    adapter = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = str(tmp_path / "moved")
    (copy / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    with pytest.raises(UserError, match="moved of .* is not there; name its folder or hub id with --base"):
        load_subject(copy)
    assert load_subject(copy, str(run.parent / "base")).kind == "adapter"
    (copy / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="does not fit the base model"):
        load_subject(copy, str(run.parent / "base"))


def test_an_unfinished_run_is_said_to_be_one(run, tmp_path):
    copy = spoiled(run, tmp_path)
    (copy / "run.json").write_text('{"status": "running"}', encoding="utf-8")
    (warning,) = load_subject(copy).warnings
    assert "training is running, so this may be an unfinished model" in warning
    (copy / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="run.json cannot be read"):
        load_subject(copy)


def test_rows_that_cannot_be_used(run, tmp_path):
    data = write_lines(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b", "label": 1}])
    with pytest.raises(DataError, match="label is 1; expected true or false"):
        evaluate_run(EvalRequest(run=run, suite="preference", data=str(data), out=tmp_path))
    copy = spoiled(run, tmp_path)
    (copy / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="held out no rows; name a file"):
        evaluate_run(EvalRequest(run=copy, suite="preference", base=str(run.parent / "base")))
    assert not (copy / "eval.json").exists() and not (tmp_path / "eval.json").exists()


def test_the_template_is_the_one_written_out_here(tmp_path):
    assert make_tokenizer(tmp_path).chat_template == CHATML


def test_null_in_a_recipe_is_not_the_default(run, tmp_path):
    copy = spoiled(run, tmp_path)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["data"]["max_length"] = recipe["loss"]["beta"] = None
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    subject = load_subject(copy)
    assert subject.option("data", "max_length", 7) is None
    assert subject.option("loss", "beta", 7) == BETA  # run.json knows it
    assert subject.option("loss", "gamma", 7) == 7
