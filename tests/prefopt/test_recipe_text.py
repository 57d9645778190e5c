"""Rows of text on a model with a chat template: a warning, `data.as_chat`, and evaluation in the form of training."""

import io
import json

import pytest
import yaml

from prefopt.cli import main
from prefopt.data import load_rows
from prefopt.data.rows import group_of
from prefopt.errors import UserError
from prefopt.evaluate.request import EvalRequest
from prefopt.recipe import load_recipe, make_recipe
from prefopt.recipe.run import preference_config
from prefopt.runs import find_run
from prefopt.train import TrainingWarning
from prefopt.use.chat import chat
from support.tiny_models import ROWS, make_model, make_rows, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("world")
    make_model("llama", len(make_tokenizer(made / "model")), made / "model")
    for name, labels in (("rows", (True, False)), ("words", ("yes", "no"))):
        rows = [
            {"prompt": prompt, "completion": f" {answer}", "label": labels[not label]} for prompt, answer, label in ROWS
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (made / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return made


def content(folder, name, **data):
    return {
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "rows.jsonl"), "eval_fraction": 0.3, "max_length": 96} | data,
        "training": {
            "output_dir": str(folder / name),
            "max_steps": 1,
            "use_cpu": True,
            "save_strategy": "no",
        },
    }


def trained(folder, name, **data):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content(folder, name, **data)), encoding="utf-8")
    assert main(["train", str(path)]) == 0
    return folder / name


@pytest.fixture(scope="module")
def text_run(folder):
    with pytest.warns(TrainingWarning, match="plain text .* chat template.*data.as_chat: true"):
        return trained(folder, "text")


@pytest.fixture(scope="module")
def chat_run(folder):
    words = {"path": str(folder / "words.jsonl"), "eval_path": str(folder / "words.jsonl")}
    mapped = {"label_map": {"yes": True, "no": False}, "as_chat": True, "eval_fraction": 0.0}
    return trained(folder, "chat", **words, **mapped)


def findings(run):
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return [one["name"] for one in record["diagnostics"]], record["data"]


def answered(run, monkeypatch):
    """What the model is given for the turn "Hello"."""
    from transformers import GenerationMixin

    seen = []
    generate = GenerationMixin.generate

    def spy(self, *, input_ids, **options):
        seen.append(input_ids[0].tolist())
        return generate(self, input_ids=input_ids, **options)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    out = io.StringIO()
    chat(
        run,
        max_new_tokens=2,
        temperature=0,
        device="cpu",
        source=io.StringIO("Hello\n"),
        output=out,
    )
    tokenizer = make_tokenizer(run.parent / "tokenizer")
    return tokenizer.decode(seen[0])


def test_rows_of_text_are_warned_about_and_chat_continues_text(text_run, monkeypatch, capsys):
    names, data = findings(text_run)
    assert "text_beside_template" in names
    assert data["train"]["format"] == data["eval"]["format"] == "text"
    report = (text_run / "report.html").read_text(encoding="utf-8")
    assert "data.as_chat: true" in report and "has a chat template, which is not used" in report
    assert answered(text_run, monkeypatch) == "Hello"
    assert "trained on plain text: each line is text that the model continues" in capsys.readouterr().err
    with pytest.raises(UserError, match="--system is given, but the run has no chat template, or was"):
        chat(text_run, system="Be brief.", source=io.StringIO(""))


def test_as_chat_trains_on_messages_and_chat_uses_the_template(chat_run, monkeypatch):
    names, data = findings(chat_run)
    assert "text_beside_template" not in names
    assert data["train"]["format"] == data["eval"]["format"] == "chat"
    said = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert answered(chat_run, monkeypatch) == said
    own = load_recipe(chat_run / "recipe.yaml").data  # says how it was
    assert own.as_chat is True and own.label_map == {"yes": True, "no": False}


def test_evaluation_reads_rows_as_training_did(text_run, chat_run, folder, capsys):
    """Training and held-out prompts have the same form: chat and text runs of the same rows have other tokens."""
    from prefopt.evaluate.held_out import read_rows, tokenized, trained_on
    from prefopt.evaluate.subject import load_subject

    tokens = {}
    for run in (text_run, chat_run):
        source, subject = find_run(run), load_subject(run)
        held_out = tokenized(read_rows(source, EvalRequest(run=run, suite="preference", out=run)), subject)
        tokens[run.name] = [subject.tokenizer.decode(row["prompt_ids"]) for row in held_out.rows]
        path = folder / ("rows.jsonl" if run is text_run else "words.jsonl")
        rows = load_rows(path, **source.row_options)
        assert trained_on(source.recipe) <= set(rows.rows["group"])
    assert not any("<|im_start|>" in text for text in tokens["text"])
    assert all(text.startswith("<|im_start|>user\n") for text in tokens["chat"])
    assert len(tokens["chat"]) == len(ROWS)  # the words were converted


def test_other_rows_than_those_of_training_are_warned_about(text_run, tmp_path, capsys):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(True)), encoding="utf-8")
    given = [
        "eval",
        str(text_run),
        "--suite",
        "preference",
        "--data",
        str(path),
        "--out",
        str(tmp_path),
    ]
    assert main(given) == 0
    said = "The run was trained on plain text, and these rows are chat messages"
    assert said in capsys.readouterr().out


def test_as_chat_equals_rows_that_are_messages():
    text = [{**row, "completion": f"  {row['completion']}\n"} for row in make_rows(False)]
    wrapped, chat = load_rows(text, as_chat=True), load_rows(make_rows(True))
    assert wrapped.rows.to_list() == chat.rows.to_list() and wrapped.conversational
    assert load_rows(make_rows(True), as_chat=True).fingerprint == chat.fingerprint
    pair = load_rows([{"chosen": "Why? Yes.", "rejected": "Why? No."}], as_chat=True).rows
    assert pair["completion"][1] == [{"role": "assistant", "content": "No."}]
    assert pair["group"][0] == group_of({}, [{"role": "user", "content": "Why?"}])


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"label_map": {1: "good", 0: "bad"}}, "data.label_map converts 1 to 'good'; expected true or false"),
        ({"label_map": {True: True, False: False}}, "data.label_map has the key true; true and false need no"),
    ],
)  # fmt: skip
def test_a_mapping_of_labels_is_checked_with_the_recipe(folder, data, problem):
    with pytest.raises(UserError, match=problem):
        preference_config(make_recipe(content(folder, "none", **data)))


def test_options_on_the_command_line(folder, capsys):
    path = folder / "bad.yaml"
    path.write_text(yaml.safe_dump(content(folder, "none")), encoding="utf-8")
    assert main(["train", str(path), "--data.label_map", "[1, 0]", "--data.as_chat", "yes please"]) == 2
    error = capsys.readouterr().err
    assert "data.label_map is [1, 0]; expected keys with values" in error
    assert "data.as_chat is 'yes please'; expected true or false" in error
