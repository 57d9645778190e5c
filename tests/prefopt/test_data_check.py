"""`prefopt data check`: repetitions, contradictions, evaluation questions, and which tokens a template has scored."""

import importlib.resources
import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from prefopt.cli import main
from prefopt.data import DataError, load_rows, tokenize_rows
from prefopt.data.check import check
from prefopt.data.overlap import leaks, read_questions, twins, words
from prefopt.data.scored import not_in_row, scored_tokens, template_notes
from support.tiny_models import CHATML, EOS, make_rows, make_tokenizer

TEMPLATES = importlib.resources.files("trl") / "chat_templates"
END = "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizers")
    for name in ("qwen3", "deepseek_r1_distill"):
        tokenizer = make_tokenizer(made / name)
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        if name == "deepseek_r1_distill":
            tokenizer.add_special_tokens({"eos_token": END})
        tokenizer.save_pretrained(made / name)
    make_tokenizer(made / "chatml")
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


@pytest.fixture
def chat(tmp_path):
    return write(tmp_path / "chat.jsonl", *make_rows(True))


def write(path, *rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def rated(prompt, completion, label=True):
    return {"prompt": prompt, "completion": completion, "label": label}


def prepared(folder, name, rows, **kwargs):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    loaded = load_rows(rows)
    tokenized = tokenize_rows(loaded, tokenizer, max_length=None, chat_template_kwargs=kwargs)
    return loaded, tokenized, tokenizer


def parts(shown):
    """The prompt and the scored tokens as `scored_tokens` shows them, without the marks between tokens."""
    prompt, scored = shown.replace("│", "").split("\n  scored, ")
    return prompt, scored


# ---------------------------------------------------------------- the tokens that are scored


def test_qwen3_scores_an_empty_thought_unless_the_prompt_has_it(folder):
    rows = make_rows(True)
    loaded, tokenized, tokenizer = prepared(folder, "qwen3", rows)
    prompt, scored = parts(scored_tokens(tokenized, tokenizer))
    assert "<|im_start|>assistant" in prompt and "think" not in prompt
    assert "<think>\\n\\n</think>\\n\\nJupiter is the largest planet.<|im_end|>\\n" in scored
    notes = template_notes(loaded, tokenized, tokenizer)
    assert "scored before the answer in 20 of 20 rows: '<think>\\n\\n</think>\\n\\n'" in notes[0]
    assert "{enable_thinking: false}" in notes[0]

    loaded, tokenized, tokenizer = prepared(folder, "qwen3", rows, enable_thinking=False)
    prompt, scored = parts(scored_tokens(tokenized, tokenizer))
    assert "<think>" in prompt and "<think>" not in scored
    assert not any("before" in one for one in template_notes(loaded, tokenized, tokenizer))
    assert not_in_row(loaded, tokenized, tokenizer, 0, {"enable_thinking": False}) == ""


def test_r1_distills_prompt_is_no_beginning_of_the_row(folder):
    loaded, tokenized, tokenizer = prepared(folder, "deepseek_r1_distill", make_rows(True))
    assert tokenized.counts["prompt_cut"] == 20
    lost = not_in_row(loaded, tokenized, tokenizer)
    assert lost.replace("│", "").splitlines()[1].strip() == "<think>\\n"
    assert "this row does not contain it: the model sees it in generation only" in lost
    # what is shown is what is trained on: neither the prompt nor the scored part has it
    row = tokenized.dataset[0]
    whole = tokenizer.apply_chat_template([*loaded.rows[0]["prompt"], *loaded.rows[0]["completion"]], tokenize=False)
    assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"]) == whole
    assert "<think>" not in whole
    shown = scored_tokens(tokenized, tokenizer, 0, lost)
    prompt, scored = parts(shown)
    assert "left out, " in prompt and "left out, " not in scored
    assert scored.endswith(f"Jupiter is the largest planet.{END}")
    assert template_notes(loaded, tokenized, tokenizer) == []  # its turn ends with its EOS token


def test_r1_distill_deletes_a_thought_and_that_is_said(folder):
    rows = make_rows(True)
    rows[0]["completion"] = [{"role": "assistant", "content": "<think>Hm.</think>Jupiter."}]
    loaded, tokenized, tokenizer = prepared(folder, "deepseek_r1_distill", rows)
    assert "Hm." not in scored_tokens(tokenized, tokenizer)
    (note,) = template_notes(loaded, tokenized, tokenizer)
    assert note.startswith("in 1 of 20 rows the template does not render the answer as it is")


def test_a_scored_token_behind_the_end_of_turn_is_named(folder):
    loaded, tokenized, tokenizer = prepared(folder, "chatml", make_rows(True))
    (note,) = template_notes(loaded, tokenized, tokenizer)
    assert note.startswith(f"scored after the end of turn {EOS!r} in 20 of 20 rows: '\\n' (1 token)")
    assert "shortcut" in note
    assert tokenized.dataset[0]["completion_ids"][-2] == tokenizer.eos_token_id  # it is really so
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "<|im_end|>")
    tokenized = tokenize_rows(loaded, tokenizer, max_length=None)
    assert template_notes(loaded, tokenized, tokenizer) == []


def test_a_turn_without_an_end_and_another_eos_are_said(folder):
    loaded, _, tokenizer = prepared(folder, "chatml", make_rows(True))
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "\n")
    tokenized = tokenize_rows(loaded, tokenizer, max_length=None)
    assert template_notes(loaded, tokenized, tokenizer) == [
        "in 20 of 20 rows no end-of-turn token is scored: they do not teach the model to stop"
    ]
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|start|>"
    tokenized = tokenize_rows(loaded, tokenizer, max_length=None)
    notes = template_notes(loaded, tokenized, tokenizer)
    assert notes[-1].startswith(
        "20 of 20 rows end their turn with '<|im_end|>', but the tokenizer's EOS token is '<|start|>'"
    )


def test_text_ends_in_eos_and_a_merge_over_the_border_is_shown(folder):
    loaded, tokenized, tokenizer = prepared(folder, "chatml", make_rows(False))
    assert template_notes(loaded, tokenized, tokenizer) == []
    assert not_in_row(loaded, tokenized, tokenizer) == ""
    text = "Jupiter is the largest planet."
    whole = tokenizer(text).input_ids
    cut, alone = next(
        (end, ids) for end in range(9, len(text)) if (ids := tokenizer(text[:end]).input_ids) != whole[: len(ids)]
    )
    loaded, tokenized, tokenizer = prepared(folder, "chatml", [rated(text[:cut], text[cut:])])
    lost = not_in_row(loaded, tokenized, tokenizer)
    row = tokenized.dataset[0]
    assert row["prompt_ids"] + row["completion_ids"] == [*whole, tokenizer.eos_token_id]
    gone = len(alone) - len(row["prompt_ids"])
    assert gone > 0 and lost.startswith(f"  left out, {gone} tokens of the prompt alone:\n")
    assert "becomes other tokens, which are scored" in lost


def test_the_command_shows_one_row_under_the_template(folder, chat, capsys):
    given = ["data", "check", str(chat), "--tokenizer", str(folder / "qwen3"), "--row", "2"]
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "what is scored, row 2 (desirable)" in text and "note: scored before the answer" in text
    assert main([*given, "--template", "{enable_thinking: false}"]) == 0
    assert "scored before" not in capsys.readouterr().out
    assert main([*given, "--template", "thinking"]) == 2
    assert "--template is 'thinking'; expected {NAME: VALUE}" in capsys.readouterr().err
    given = ["data", "check", str(chat), "--tokenizer", str(folder / "deepseek_r1_distill")]
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "in 20 rows the template renders the prompt differently" in text
    assert "left out, " in text and "<｜Assistant｜>" in text
    text_rows = write(chat.parent / "text.jsonl", *make_rows(False))
    given = ["data", "check", str(text_rows), "--tokenizer", str(folder / "chatml")]
    assert main(given) == 0
    assert "the tokenizer's chat template is not used" in capsys.readouterr().out
    assert main([*given, "--as-chat"]) == 0
    text = capsys.readouterr().out
    assert "<|im_start|>user" in text and "template is not used" not in text
    given = ["data", "check", str(chat), "--tokenizer", str(folder / "deepseek_r1_distill")]
    assert main([*given, "--row", "20"]) == 2
    assert "row is 20; expected 0 to 19" in capsys.readouterr().err


def test_truncation_is_counted_by_label(folder, chat):
    text = check(chat, tokenizer=str(folder / "chatml"), max_length=40).text
    loaded, tokenized, _ = prepared(folder, "chatml", make_rows(True))
    sizes = [(len(row["prompt_ids"]), len(row["completion_ids"]), row["label"]) for row in tokenized.dataset]
    cut = [label for prompt, answer, label in sizes if prompt < 40 < prompt + answer]
    assert 0 < sum(cut) < len(cut)  # the case is really there
    assert f"of these {sum(cut)} desirable and {len(cut) - sum(cut)} undesirable" in text


# ---------------------------------------------------------------- repetitions and contradictions


def test_twins_by_line(tmp_path, capsys):
    path = write(
        tmp_path / "rows.jsonl",
        rated("Hi", "Hello"),
        rated("hi ", "hello"),
        rated("ما لونه؟", "أحمر", False),
        rated("ما لونه؟", "أحمـر", True),
        rated("Hi", "Bye", False),
    )
    assert twins(load_rows(path)) == ({1: 0}, {2: 3, 3: 2})
    assert main(["data", "check", str(path)]) == 1
    text = capsys.readouterr().out
    assert f"repeated rows\n  {path}:2 (desirable): repeats line 1\n" in text
    assert (
        "contradictory rows\n"
        f"  {path}:3 (undesirable): line 4 has the same answer with the other label\n"
        f"  {path}:4 (desirable): line 3 has the same answer with the other label\n"
    ) in text
    assert text.endswith("bad rows             0\nrepeated rows        1\ncontradictory rows   2\n")


def test_every_row_to_mend_is_listed(tmp_path, folder, capsys):
    """Of 60 rows 15 are broken, 15 repeat another one, 14 contradict each other and one is too long."""
    rows = [rated(f"Question {i}?", "Yes.") for i in range(15)]
    rows += [rated(f"question {i}?", "yes.") for i in range(15)]
    rows += [rated(f"Label {i // 2}?", "Yes.", bool(i % 2)) for i in range(14)]
    rows += [rated(f"Empty {i}?", "") for i in range(15)]
    rows += [rated("long " * 200, "Yes.")]
    path = write(tmp_path / "rows.jsonl", *rows)
    given = [
        "data",
        "check",
        str(path),
        "--tokenizer",
        str(folder / "chatml"),
        "--max-length",
        "64",
    ]
    assert main(given) == 1
    text = capsys.readouterr().out
    for line in range(45, 60):
        assert f"  {path}:{line}: completion is empty\n" in text
    for line in range(16, 31):
        assert f"  {path}:{line} (desirable): repeats line {line - 15}\n" in text
    for line in range(31, 45):
        label, other = ("desirable", line - 1) if line % 2 == 0 else ("undesirable", line + 1)
        assert f"  {path}:{line} ({label}): line {other} has the same answer" in text
    assert f"  {path}:60: prompt has " in text
    assert text.endswith("bad rows             16\nrepeated rows        15\ncontradictory rows   14\n")


def test_rows_are_listed_where_none_can_be_used(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", *(rated(f"{i}?", "Yes.", i % 2) for i in range(12)))
    assert main(["data", "check", str(path)]) == 1
    text = capsys.readouterr().out
    for i in range(12):
        assert f"  {path}:{i + 1}: label is {i % 2}; expected true or false\n" in text
    assert "bad rows             12\n" in text and "data.label_map {1: true, 0: false}" in text
    assert main(["data", "check", str(path), "--label-map", "{1: true, 0: false}"]) == 0
    text = capsys.readouterr().out
    assert "desirable      6 (50.0%)" in text and "bad rows             0\n" in text


def test_tokens_that_a_model_has_no_embedding_for(tmp_path, folder, chat, capsys):
    tokenizer = make_tokenizer(tmp_path / "grown")
    size = len(tokenizer)
    LlamaConfig(vocab_size=size).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["data", "check", str(chat), "--model", str(tmp_path / "model")]
    assert main(command) == 0  # no weights there, and none needed
    tokenizer.add_tokens(["Jupiter"])
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(tmp_path / "grown")
    capsys.readouterr()
    assert main([*command, "--tokenizer", str(tmp_path / "grown")]) == 1
    text = capsys.readouterr().out
    has = f"the model has {size}, for ids 0 to {size - 1}"
    assert f"  {chat}:1: token {size} ('Jupiter') has no embedding: {has}\n" in text
    assert "bad rows             1\n" in text  # "Jupiter" is in no other row
    assert f"pad_token_id is {size + 1} ('<new pad>'): {has}. Use the tokenizer that belongs" in text
    assert main([*command[:3], "--model", str(tmp_path / "none")]) == 2
    assert "cannot read the configuration of a model from" in capsys.readouterr().err


def test_clean_data_are_clean(chat):
    checked = check(chat)
    assert checked.clean and "repeated rows        0\ncontradictory rows   0" in checked.text


# ---------------------------------------------------------------- evaluation questions

QUESTION = "What happens to you if you swallow the seeds of a watermelon?"


def test_a_question_is_found_in_prompts_and_answers_whatever_its_spelling(tmp_path, capsys):
    rows = [
        rated(f"Tell me: {QUESTION.lower().replace('?', '')} please", "Nothing."),
        rated("Where?", "you asked what happens to you if you swallow the seeds", False),
        rated("What happens if you swallow seeds of a watermelon?", "Nothing."),
        rated("who wrote it", "Nobody knows who wrote it.", False),
        rated("Tell me who wrote it.", "No."),
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    questions = tmp_path / "questions.txt"
    questions.write_text(f"{QUESTION}\n\nWho wrote it?\nIs it here?\n", encoding="utf-8")
    found = leaks(load_rows(path), read_questions(questions))
    # row 3 shares fewer than eight words in a row; a short question counts where it is a whole text
    assert found.rows == {0: QUESTION, 1: QUESTION, 3: "Who wrote it?"} and found.questions == 2
    assert set(leaks(load_rows(path), read_questions(questions), 4).rows) == {0, 1, 2, 3}
    assert main(["data", "check", str(path), "--questions", str(questions)]) == 1
    text = capsys.readouterr().out
    assert "evaluation questions 2 of 3 found, in 3 rows (8 consecutive words" in text
    assert f"  line 1: {QUESTION}" in text


def test_arabic_questions_match_without_vowel_signs(tmp_path):
    question = "ما هي عاصمة المملكة الأردنية الهاشمية منذ عام 1921؟"
    row = rated("سؤال: مَا هِيَ عاصمةُ المملكةِ الأردنيّة الهاشميّة منذ عام 1921", "عمّان")
    assert leaks(load_rows([row]), [question]).questions == 1


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=12), st.integers(1, 5))
def test_a_long_question_is_found_exactly_where_its_words_stand_in_a_row(letters, size):
    question = ["q", "r", "s", "t", "u", "a", "b"]
    loaded = load_rows([rated(" ".join(letters), "no")])
    shared = any(
        letters[i : i + size] == question[j : j + size]
        for i in range(len(letters) - size + 1)
        for j in range(len(question) - size + 1)
    )
    assert bool(leaks(loaded, [" ".join(question)], size).rows) is shared


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("q.csv", "a", "ends in .csv; expected questions as .txt or .jsonl"),
        ("q.txt", "\n?\n", "has no questions in it"),
        ("q.jsonl", '{"label": 1}', "q.jsonl:1: has no text in question, prompt, ctx, text"),
        ("q.jsonl", "[1]", "q.jsonl:1: is '[1]'; expected an object"),
        ("q.jsonl", "{", "q.jsonl:1: is not JSON"),
    ],
)
def test_questions_that_cannot_be_read_are_one_sentence(tmp_path, capsys, chat, name, data, message):
    (tmp_path / name).write_text(data, encoding="utf-8")
    assert main(["data", "check", str(chat), "--questions", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_more_about_questions(tmp_path):
    rows = [{"question": "One two?", "prompt": "x"}, {"ctx": "Three four"}]
    path = write(tmp_path / "q.jsonl", *rows)
    assert read_questions(path) == ["One two?", "Three four"]
    with pytest.raises(DataError, match="there is no file of questions"):
        read_questions(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="latin.txt is not UTF-8 .byte 4"):
        read_questions(tmp_path / "latin.txt")
    with pytest.raises(DataError, match="ngram is 0; expected at least 1"):
        leaks(load_rows([rated("a", "b")]), ["a"], 0)
    assert words("ﻣﺮﺣﺒًﺎ  World's") == ("مرحبا", "world", "s")
