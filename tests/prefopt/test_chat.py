"""Chat: the run's own template and arguments, answers streamed by whole words, commands, and turns that go wrong."""

import io
import sys

import pytest
import torch

import prefopt.use.chat as module
from prefopt.cli import main
from prefopt.errors import UserError
from prefopt.generation import end_of_turn, prompt_ids, stop_ids
from prefopt.models import choose_device
from prefopt.runs import find_run, load_model, load_tokenizer
from prefopt.use.chat import Conversation, Stream, chat, talk
from support.trained_runs import EOS, make_run

TEMPLATE = (  # that of Qwen3 in small: an empty thought in front of an answer, unless thinking is asked for
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>' }}{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = make_run(
        tmp_path_factory.mktemp("world"),
        "llama",
        "gpt-2",
        template_kwargs={"enable_thinking": False},
    )
    made.tokenizer.chat_template = TEMPLATE
    made.tokenizer.save_pretrained(made.folder)
    return made


@pytest.fixture
def make_conversation(run):
    def make(**options):
        source = find_run(run.folder)
        generation = {"max_new_tokens": 6, "do_sample": False} | options.pop("generation", {})
        return Conversation(
            load_model(source),
            load_tokenizer(source),
            template_kwargs=source.template_kwargs,
            generation=generation,
            **options,
        )

    return make


def asked_of(conversation, monkeypatch):
    """The texts that the model is given, turn by turn."""
    seen = []
    generate = conversation.model.generate

    def spy(*, input_ids, **options):
        seen.append(conversation.tokenizer.decode(input_ids[0]))
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(conversation.model, "generate", spy)
    return seen


def test_turns_are_rendered_by_the_runs_template_with_its_arguments(make_conversation, monkeypatch):
    conversation = make_conversation(system="Be brief.")
    seen = asked_of(conversation, monkeypatch)
    first = conversation.answer("Hello", io.StringIO())
    conversation.answer("ما اسمك؟", io.StringIO())
    head = f"<|im_start|>system\nBe brief.{EOS}\n<|im_start|>user\nHello{EOS}\n<|im_start|>assistant\n"
    assert seen[0] == f"{head}<think>"
    asked = f"<|im_start|>user\nما اسمك؟{EOS}\n<|im_start|>assistant\n<think>"
    assert seen[1] == f"{head}{first}{EOS}\n{asked}"
    conversation.reset()
    conversation.answer("Hello", io.StringIO())
    assert seen[2] == seen[0]


def test_the_answer_is_what_generate_gives_and_is_written_once(make_conversation):
    conversation, out = make_conversation(), io.StringIO()
    answer = conversation.answer("Hello", out)
    messages = [{"role": "user", "content": "Hello"}]
    ids = torch.tensor([prompt_ids(conversation.tokenizer, messages, conversation.template_kwargs)])
    whole = conversation.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **conversation.generation)
    expected = conversation.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer == expected and out.getvalue() == f"{expected}\n"


def test_a_letter_that_is_spread_over_tokens_is_never_written_in_halves(run):
    class Pieces(io.StringIO):
        def __init__(self):
            super().__init__()
            self.written = []

        def write(self, text):
            self.written.append(text)
            return super().write(text)

    text = "عاصمة مصر هي القاهرة 😀 ok"
    ids = run.tokenizer(text, add_special_tokens=False).input_ids
    out = Pieces()
    stream = Stream(run.tokenizer, out)
    stream.put(torch.tensor([1, 2]))  # the prompt, which is not shown
    for token in [*ids, run.tokenizer.eos_token_id]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert len(ids) > 12 and len([piece for piece in out.written if piece]) > 3
    assert not any("\ufffd" in piece for piece in out.written)
    assert out.getvalue() == f"{text}\n" and stream.text == text


def test_commands_of_the_conversation(make_conversation, monkeypatch, capsys):
    conversation, out = make_conversation(), io.StringIO()
    seen = asked_of(conversation, monkeypatch)
    talk(conversation, iter(["", "Hello\n", "/reste\n", "/help\n"]), out)
    assert len(conversation.turns) == 2
    said = capsys.readouterr().err
    assert "/reste is not a command; did you mean /reset?" in said and "/quit" in said
    talk(conversation, iter(["/reset\n", "/quit\n", "Hello\n"]), out)
    assert conversation.turns == [] and len(seen) == 1


def test_a_conversation_that_is_too_long_is_said_and_goes_on(make_conversation, capsys):
    conversation, out = make_conversation(), io.StringIO()
    talk(conversation, iter(["many words " * 200, "Hello"]), out)
    assert "tokens, and the model takes 256; this turn is discarded" in capsys.readouterr().err
    assert [turn["content"] for turn in conversation.turns][0] == "Hello"


def test_an_interrupted_answer_is_forgotten(make_conversation, monkeypatch, capsys):
    conversation = make_conversation()

    def stop(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.model, "generate", stop)
    talk(conversation, iter(["Hello"]), io.StringIO())
    assert conversation.turns == [] and "this turn is discarded" in capsys.readouterr().err


def test_an_answer_ends_where_the_template_ends_a_turn(run):
    source = find_run(run.folder)
    model, tokenizer = load_model(source), load_tokenizer(source)
    end = tokenizer.convert_tokens_to_ids(EOS)
    model.generation_config.eos_token_id = 0
    tokenizer.eos_token = "<|start|>"
    assert end_of_turn(tokenizer) == end
    assert stop_ids(model, tokenizer) == sorted([0, tokenizer.eos_token_id, end])
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None
    assert stop_ids(model, tokenizer) == [0, tokenizer.eos_token_id]


def test_without_a_template_a_line_is_gone_on_with(run, tmp_path, capsys):
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(run.folder, plain)
    (plain / "chat_template.jinja").unlink()
    out = io.StringIO()
    chat(plain, max_new_tokens=3, temperature=0, source=io.StringIO("Once\n"), output=out)
    assert "each line is text that the model continues" in capsys.readouterr().err
    with pytest.raises(UserError, match="--system is given, but .* no chat template"):
        chat(plain, system="Be brief.", source=io.StringIO(""))


def test_the_same_seed_samples_the_same_answers(run):
    def answers(seed):
        out = io.StringIO()
        chat(
            run.folder,
            max_new_tokens=8,
            temperature=1.0,
            seed=seed,
            device="cpu",
            source=io.StringIO("Hello\nAnd?\n"),
            output=out,
        )
        return out.getvalue()

    assert answers(1) == answers(1) != answers(2)


def test_the_command_line_answers_a_pipe(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("مرحبا\n/quit\n"))
    words = ["chat", str(run.folder), "--max-new-tokens", "4", "--temperature", "0"]
    assert main([*words, "--device", "cpu", "--system", "Be brief."]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; expected at least 1"),
        (["--temperature", "-1"], "--temperature is -1.0; expected 0 or more"),
        (["--temperature", "nan"], "--temperature is nan; expected 0 or more"),
        (["--seed", "-1"], "--seed is -1; expected a number from 0 to 4294967295"),
        (["--sytem", "x"], "--sytem is unknown; did you mean --system?"),
        (["--base", "/nowhere"], "the base model /nowhere of"),
    ],
)
def test_bad_arguments_exit_2_with_one_sentence(run, words, said, capsys):
    assert main(["chat", str(run.folder), *words]) == 2
    found = capsys.readouterr().err
    assert said in found and found.count("\n") == 1


def test_a_closed_input_and_one_that_is_no_text_are_refused(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", str(run.folder)]) == 2
    error = capsys.readouterr().err
    assert error == "prefopt: standard input is closed; expected a terminal, a file or a pipe\n"
    source = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    with pytest.raises(UserError, match="^standard input is not UTF-8: .* byte 0xe9 in position 3"):
        list(module._lines(source))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU"):
        choose_device("cuda")
