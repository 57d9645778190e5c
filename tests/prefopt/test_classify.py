"""Classify: each label's likelihood as the plain log-softmax gives it, rows from every kind of file, one table out."""

import copy
import csv
import io
import json

import pytest
import torch

from prefopt.cli import main
from prefopt.errors import DataError, UserError
from prefopt.runs import find_run, load_model, load_tokenizer
from prefopt.use.classify import classify, label_logps, label_rows
from prefopt.use.questions import Question, read_questions
from support.trained_runs import EOS, make_run

LABELS = ["computer", "computer science", "law"]
QUESTIONS = ["Which planet is the largest?", "ما هي عاصمة مصر؟", "Name three colours."]


def chat_row(prompt, answer, label=True):
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
        "label": label,
    }


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    rows = [chat_row(q, name) for q, name in zip(QUESTIONS, LABELS, strict=True)]
    write_lines(folder / "rows.jsonl", [*rows, chat_row("Why?", "no idea", label=False)])
    return make_run(folder, "llama", "gpt-2", data={"path": str(folder / "rows.jsonl")})


@pytest.fixture(scope="module")
def parts(world):
    source = find_run(world.folder)
    return load_model(source), load_tokenizer(source)


def table_of(found):
    return list(csv.DictReader(io.StringIO(found.table)))


def exact_logp(model, tokenizer, prompt, label):
    """Sum over the label's tokens and the end of turn, in fp64 from the model's own logits, one sequence at a time."""
    start = f"<|im_start|>user\n{prompt}{EOS}\n<|im_start|>assistant\n"
    before = tokenizer(start, add_special_tokens=False).input_ids
    whole = tokenizer(f"{start}{label}{EOS}", add_special_tokens=False).input_ids
    assert whole[: len(before)] == before
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0].double()
    logp = logits.log_softmax(-1)
    return sum(logp[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_scores_are_the_log_likelihoods_of_label_and_end_of_turn(parts, batch_size):
    model, tokenizer = parts
    questions = [Question(line, [{"role": "user", "content": text}]) for line, text in enumerate(QUESTIONS, start=1)]
    scores = torch.from_numpy(label_logps(model, tokenizer, questions, LABELS, batch_size=batch_size))

    def by_hand(model):
        return torch.tensor(
            [[exact_logp(model, tokenizer, text, label) for label in LABELS] for text in QUESTIONS],
            dtype=torch.float64,
        )

    exact = by_hand(copy.deepcopy(model).double())
    # rounding differs with the batch's shape: as good as the same model one by one, up to a factor and a few roundings
    allowed = 4 * (by_hand(model) - exact).abs().max() + 2.0**-20 * exact.abs().max()
    assert (scores - exact).abs().max() <= allowed < 1e-2
    assert (exact[:, 0] - exact[:, 1]).abs().min() > 1  # a token more or less would be seen


def test_what_the_template_writes_behind_the_end_of_turn_is_not_scored(parts):
    model, tokenizer = parts
    question = Question(1, [{"role": "user", "content": "Why?"}])
    ends = {row["completion_ids"][-1] for row in label_rows(model, tokenizer, [question], LABELS, {})}
    assert ends == {tokenizer.convert_tokens_to_ids(EOS)}


def test_the_table_has_the_likeliest_label_its_share_and_every_score(world, tmp_path):
    file = write_lines(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "Which planet is the largest?", "completion": "law"},
            {"prompt": [{"role": "user", "content": "ما هي عاصمة مصر؟"}]},
        ],
    )
    found = classify(world.folder, file, labels=LABELS, out=tmp_path / "out.csv")
    rows = table_of(found)
    assert (tmp_path / "out.csv").read_text(encoding="utf-8") == found.table
    assert [row["line"] for row in rows] == ["1", "2"]
    for row in rows:
        logps = {label: float(row[f"logp {label}"]) for label in LABELS}
        assert row["label"] == max(logps, key=logps.get)
        share = 1 / sum(pow(2.718281828459045, logp - max(logps.values())) for logp in logps.values())
        assert float(row["probability"]) == pytest.approx(share, abs=2e-4)  # of rounded scores
    assert [row["expected"] for row in rows] == ["law", ""]
    assert found.known == 1 and found.right == (rows[0]["label"] == "law")


def test_labels_are_the_runs_own_if_none_are_given(world, tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("Why?\n\nWho?\n", encoding="utf-8")
    rows = table_of(classify(world.folder, file))
    assert [row["line"] for row in rows] == ["1", "3"]
    assert [name for name in rows[0] if name.startswith("logp ")] == [f"logp {x}" for x in LABELS]


def test_a_run_without_its_training_rows_needs_labels(world, tmp_path):
    run = make_run(tmp_path, "llama", "gpt-2", data={"path": str(tmp_path / "gone.jsonl")})
    file = tmp_path / "questions.txt"
    file.write_text("Why?\n", encoding="utf-8")
    with pytest.raises(UserError, match="labels cannot be read: there is no file .*by --labels"):
        classify(run.folder, file)


def test_texts_become_what_the_run_was_trained_on(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("\ufeffWhy?\n", encoding="utf-8")
    ask = "Which field? {text}"
    assert read_questions(file, ask=ask) == [Question(1, [{"role": "user", "content": "Which field? Why?"}])]
    assert read_questions(file, chat=False) == [Question(1, "Why?")]


def test_plain_texts_end_in_the_eos_token(parts):
    model, tokenizer = parts
    row = label_rows(model, tokenizer, [Question(1, "Why?")], LABELS, {})[0]
    assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"]) == f"Why?computer{EOS}"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "Why?"}], "has no column prompt; found question"),
        ([{"prompt": "Why?"}, {"prompt": 3}], "rows.jsonl:2: prompt is 3; expected text, or chat"),
        ([{"prompt": " "}], "rows.jsonl:1: prompt is ' '"),
        ([{"prompt": [{"role": "user"}]}], "rows.jsonl:1: prompt is "),
        ([], "rows.jsonl has no prompts"),
    ],
)
def test_rows_without_a_prompt_are_named(rows, said, tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        read_questions(file)
    assert said in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        read_questions(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8: .* at byte 4"):
        read_questions(tmp_path / "latin.txt")
    with pytest.raises(DataError, match="expected .jsonl or .parquet"):
        (tmp_path / "rows.xlsx").write_bytes(b"")
        read_questions(tmp_path / "rows.xlsx")


def test_a_prompt_that_is_too_long_is_named(parts):
    model, tokenizer = parts
    question = Question(7, [{"role": "user", "content": "word " * 300}])
    with pytest.raises(UserError, match="line 7 has .* tokens, and the model takes 256"):
        label_logps(model, tokenizer, [question], LABELS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": ["a"]}, "--labels has 1 name; expected at least two"),
        ({"labels": ["a", " a"]}, "--labels has 'a' twice"),
        ({"labels": ["a", ""]}, "--labels has an empty name"),
        ({"labels": LABELS, "ask": "no place"}, "--ask is 'no place'; expected {text} in it"),
        ({"labels": LABELS, "batch_size": 0}, "--batch-size is 0; expected at least 1"),
        ({"labels": LABELS, "out": "there.csv"}, "there.csv exists"),
    ],
)
def test_bad_arguments_are_named(world, options, said, tmp_path):
    (tmp_path / "there.csv").write_text("", encoding="utf-8")
    (tmp_path / "questions.txt").write_text("Why?\n", encoding="utf-8")
    if "out" in options:
        options = options | {"out": tmp_path / options["out"]}
    with pytest.raises(UserError) as caught:
        classify(world.folder, tmp_path / "questions.txt", **options)
    assert said in str(caught.value)


def test_the_command_line_writes_a_table(world, tmp_path, capsys):
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "Why?", "completion": "law"}])
    words = ["classify", str(world.folder), str(file), "--labels", ",".join(LABELS)]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("line,label,probability,expected,logp computer,")
    assert "of 1 (" in printed.err
    out = tmp_path / "out.csv"
    assert main([*words, "--out", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert main([*words, "--lables", "x"]) == 2
    assert "did you mean --labels?" in capsys.readouterr().err
