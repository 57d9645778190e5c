"""The demo: its text and rule, its folder, and that a model does learn by it, on three seeds."""

import copy
import json
import random
import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.data import load_rows, tokenize_rows
from prefopt.data.toy.rows import (
    LANGUAGES,
    bad_answer,
    good_answer,
    pair_rows,
    split_questions,
    unpaired_rows,
)
from prefopt.data.toy.rule import is_about, judge, language, topic_of
from prefopt.data.toy.text import CLOSERS, EVASIVE, OPENERS, QUESTIONS, RUDE, TOPICS
from prefopt.demo import run, run_demo
from prefopt.demo.model import build_model, build_tokenizer
from prefopt.demo.sampling import sample_answers
from prefopt.errors import UserError
from prefopt.train.methods import METHODS, PAIRS

EGG, EGG_AR = "How do I boil an egg?", "كيف يمكنني سلق البيض؟"
TIP, TIP_AR = TOPICS["en"][1].tips[0], TOPICS["ar"][1].tips[0]

# ---- text and rule ----


def test_each_tip_is_about_its_own_topic_only():
    for lang in LANGUAGES:
        phrases = (*OPENERS[lang], *CLOSERS[lang], *RUDE[lang], *EVASIVE[lang])
        for topic in TOPICS[lang]:
            about = [tip for other in TOPICS[lang] for tip in other.tips if is_about(tip, topic)]
            assert about == list(topic.tips)
            assert not any(is_about(phrase, topic) for phrase in phrases)


def test_both_languages_have_the_same_topics_and_as_many_questions():
    assert len(TOPICS["en"]) == len(TOPICS["ar"]) and len(QUESTIONS["en"]) == len(QUESTIONS["ar"])
    for lang in LANGUAGES:
        for topic in TOPICS[lang]:
            for question in QUESTIONS[lang]:
                text = question.format(do=topic.do)
                assert language(text) == lang and topic_of(text) == topic


def test_good_answers_pass_and_bad_ones_do_not():
    rng = random.Random(0)
    for question in [question for side in split_questions(0) for question in side]:
        for _ in range(5):
            assert judge(question.text, good_answer(question, rng)).ok
            assert not judge(question.text, bad_answer(question, rng)).ok


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        (EGG, f"Gladly! {TIP}", ""),
        (EGG_AR, f"بكل سرور! {TIP_AR}", ""),
        (EGG, f"  Gladly! {TIP}\n", ""),
        (EGG, f"بكل سرور! {TIP_AR}", "language"),
        (EGG_AR, f"Gladly! {TIP}", "language"),
        (EGG, "", "language"),
        (EGG, f"Gladly! {TIP} Stop wasting my time.", "rude"),
        (EGG_AR, f"بكل سرور! {TIP_AR} لا تضيع وقتي.", "rude"),
        (EGG, "It depends.", "evasive"),
        (EGG, TIP, "not courteous"),
        (EGG, "Gladly! Wash the rice, add two cups of water for each cup.", "topic"),
        (EGG, f"Gladly! {TIP[:-1]}", "unfinished"),
    ],
)
def test_rule(question, answer, reason):
    first = judge(question, answer)
    assert first.reason == reason and first.ok == (reason == "")
    assert all(judge(question, answer) == first for _ in range(3))


def test_rule_refuses_a_question_that_is_not_the_demos():
    with pytest.raises(ValueError, match=r"one of the demo's.*got 'How tall is it\?'"):
        judge("How tall is it?", "Gladly! It is tall.")


# ---- rows ----


def test_held_out_questions_are_never_seen_and_every_topic_is():
    seen, held_out = split_questions(3)
    assert len(seen) == 384 and len(held_out) == 192
    assert not {question.text for question in seen} & {question.text for question in held_out}
    for side, count in ((seen, 8), (held_out, 4)):
        topics = [(question.lang, question.topic) for question in side]
        assert {topics.count(topic) for topic in topics} == {count} and len(set(topics)) == 48
    assert split_questions(3) == (seen, held_out) != split_questions(4)


def test_rows_have_the_promised_share_of_thumbs_up():
    seen, _ = split_questions(0)
    rows = unpaired_rows(seen, 3, 0.4, "x", 0)
    assert len(rows) == 1152 and sum(row["label"] for row in rows) == round(0.4 * 1152)
    assert rows == unpaired_rows(seen, 3, 0.4, "x", 0) != unpaired_rows(seen, 3, 0.4, "x", 1)


def test_a_pair_is_an_answer_that_passes_and_one_that_does_not():
    seen, _ = split_questions(0)
    rows = pair_rows(seen, "x", 0)
    assert len(rows) == len(seen) and rows == pair_rows(seen, "x", 0) != pair_rows(seen, "x", 1)
    for row in rows:
        question, chosen, rejected = (row[key][0]["content"] for key in row)
        assert judge(question, chosen).ok and not judge(question, rejected).ok
    assert sorted(row["prompt"][0]["content"] for row in rows) == sorted(q.text for q in seen)


# ---- model and samples ----


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_an_answer_ends_with_its_end_of_turn_token(tmp_path, tokenizer):
    """A token after it would be the same in every row: KTO could learn that one instead of the answers."""
    rows = unpaired_rows(split_questions(0)[0][:20], 1, 0.5, "x", 0)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    encoded = tokenize_rows(load_rows(file), tokenizer, max_length=run.MAX_LENGTH).dataset
    for row, completion in zip(rows, encoded["completion_ids"], strict=True):
        assert completion[-1] == tokenizer.eos_token_id
        assert completion.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(completion[:-1]) == row["completion"][0]["content"]


def test_longest_row_fits(tokenizer):
    longest = max(
        len(tokenizer(text).input_ids)
        for lang in LANGUAGES
        for topic in TOPICS[lang]
        for text in (*topic.tips, *(one.format(do=topic.do) for one in QUESTIONS[lang]))
    )
    assert 3 * longest < run.MAX_LENGTH  # question, tip, and less than another for opening and end


def test_samples_follow_their_seed_and_leave_the_random_state(tokenizer):
    model = build_model(tokenizer, 0)
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        sample_answers(model, tokenizer, [EGG, EGG_AR], seed=seed, max_new_tokens=8) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected) and model.training
    assert len(first) == 2 and first == again != other


# ---- folder ----


def test_only_a_demos_folder_is_replaced(tmp_path):
    for marker in (None, "{}", "[", '["demo"]'):
        if marker is not None:
            (tmp_path / "demo.json").write_text(marker, encoding="utf-8")
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "mine.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(UserError, match="has files in it that are not a demo's"):
            run_demo(tmp_path, 0)
        assert (tmp_path / "data" / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_a_file_and_a_wrong_seed_are_refused(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        run_demo(tmp_path / "file", 0)
    with pytest.raises(UserError, match="--seed is -1; expected a number from 0"):
        run_demo(tmp_path / "new", -1)
    with pytest.raises(UserError, match="--method is 'ppo'; expected one of kto, "):
        run_demo(tmp_path / "new", 0, "ppo")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("existed", [True, False])
def test_an_interrupted_demo_leaves_nothing(tmp_path, monkeypatch, existed):
    out = tmp_path / "demo"
    if existed:
        (out / "run").mkdir(parents=True)
        (out / "run" / "report.html").write_text("old", encoding="utf-8")
        (out / "demo.json").write_text('{"prefopt": "demo"}', encoding="utf-8")
        (out / "notes.txt").write_text("mine", encoding="utf-8")
    threads = torch.get_num_threads()

    def interrupt(*arguments, **options):
        assert (out / "data" / "train.jsonl").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "supervised_fine_tune", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(out, 0)
    assert torch.get_num_threads() == threads
    left = [path.name for path in out.iterdir()] if out.exists() else []
    assert left == (["notes.txt"] if existed else [])


# ---- the whole ----

FINE_TUNED: dict[int, dict] = {}  # weights by seed: most of a demo's time, and the same for every method


@pytest.fixture
def fine_tune_once(monkeypatch):
    """The short fine-tune of a seed runs once; whoever comes later takes its weights."""
    original = run.supervised_fine_tune

    def once(model, tokenizer, rows, *, seed, epochs):
        if seed not in FINE_TUNED:
            original(model, tokenizer, rows, seed=seed, epochs=epochs)
            FINE_TUNED[seed] = copy.deepcopy(model.state_dict())
        model.load_state_dict(FINE_TUNED[seed])

    monkeypatch.setattr(run, "supervised_fine_tune", once)


def shares_of(report) -> tuple[float, float]:
    """Thumbs-up answers before and after."""
    summary = json.loads((report.parent / "summary.json").read_text(encoding="utf-8"))
    return summary["before"], summary["after"]


@pytest.mark.slow  # about a minute each
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (1, 2))])
def test_the_demo_learns(tmp_path, monkeypatch, fine_tune_once, seed, capsys):
    monkeypatch.chdir(tmp_path)
    report = run_demo("demo", seed)
    samples = json.loads((report.parent / "samples.json").read_text(encoding="utf-8"))
    summary = json.loads((report.parent / "summary.json").read_text(encoding="utf-8"))
    shares = {}
    for side in ("before", "after"):
        ups = [judge(sample["prompt"], sample[side]).ok for sample in samples]
        assert ups == [sample[f"{side}_ok"] for sample in samples]
        shares[side] = sum(ups) / len(ups)
        assert summary[side] == shares[side]
    assert summary["n"] == len(samples) == 192
    assert 0.25 <= shares["before"] <= 0.6
    assert shares["after"] - shares["before"] >= 0.20  # what issue 2 asks of the demo

    told = capsys.readouterr().out
    assert f"before {shares['before']:6.1%}" in told and re.search("[\u0621-\u064a]", told)
    page = report.read_text(encoding="utf-8")
    assert "This is a toy" in page and "The answers became better" in page
    assert 'dir="auto">' + samples[0]["prompt"] in page
    for name in ("adapter_model.safetensors", "metrics.jsonl", "README.md", "recipe.yaml", "plots"):
        assert (report.parent / name).exists()

    if seed == 0:  # the adapter, from another folder, by what stands in it alone
        other = tmp_path / "elsewhere"
        other.mkdir()
        monkeypatch.chdir(other)
        config = json.loads((tmp_path / "demo/run/adapter_config.json").read_text(encoding="utf-8"))
        base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
        model = PeftModel.from_pretrained(base, tmp_path / "demo/run")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "demo/run")
        questions = [sample["prompt"] for sample in samples]
        again = sample_answers(model, tokenizer, questions, seed=seed)
        ok = sum(judge(*pair).ok for pair in zip(questions, again, strict=True)) / len(again)
        assert ok - shares["before"] >= 0.20
        assert not re.search(r"base_model: ", (tmp_path / "demo/run/README.md").read_text("utf-8"))


@pytest.mark.slow  # about twenty seconds each, after the demo of seed 0
@pytest.mark.parametrize("method", ["dpo", "sft", pytest.param("enhanced_kto", marks=pytest.mark.nightly)])
def test_the_demo_learns_by_other_methods(tmp_path, fine_tune_once, method, capsys):
    report = run_demo(tmp_path / "demo", 0, method)
    before, after = shares_of(report)
    assert after - before >= 0.20  # the bar of the main job
    title = METHODS[method].title
    assert f"{title} demo" in report.read_text(encoding="utf-8")
    assert f"3/4 {title} on " in capsys.readouterr().out
    config = json.loads((report.parent / "run.json").read_text(encoding="utf-8"))["config"]
    assert config["method"] == method
    rows = (tmp_path / "demo/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    assert ("chosen" in json.loads(rows[0])) == (METHODS[method].data == PAIRS)
