"""Chat templates that fail, loop or write without end: named by file and line, and within bounds."""

import time

import datasets
import pytest

import prefopt.data.template as template
from prefopt.data import DataError, load_rows, tokenize_rows
from support.tiny_models import CHATML, make_rows, make_tokenizer

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


def only_in_row_3(failure):
    """A template that fails on row 3 alone: 'What do plants need to grow?' stands in line 4."""
    return f"{{% if 'plants' in messages[0]['content'] %}}{failure}{{% endif %}}{CHATML}"


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("{{ raise_exception('no plants') }}", "the chat template refuses it: no plants"),
        ("{{ nothing.at.all }}", "the chat template refuses it: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError: division by zero"),
        ("{{ 'a' + 1 }}", "the chat template fails: TypeError: can only concatenate str"),
        ("{% for i in range(10**9) %}{% endfor %}", "the chat template fails: OverflowError: Range too big"),
        ("{{ raise_exception('x' * 9999) }}", "the chat template refuses it: " + "x" * 200),
        ("{{ 'x' * 3000000 }}", "the chat template writes 3,000,"),
    ],
)  # fmt: skip
def test_a_row_on_which_a_template_fails_is_a_bad_row(tokenizer, failure, reason):
    tokenizer.chat_template = only_in_row_3(failure)
    kept = tokenize_rows(load_rows(make_rows(True)), tokenizer, max_length=None, on_bad_row="skip")
    ((file, line, found),) = kept.bad
    assert (file, line) == ("rows", 4) and found.startswith(reason) and len(found) < 260
    assert len(kept.dataset) == len(make_rows(True)) - 1 and 4 not in kept.dataset["line"][:]


def test_a_template_that_loops_stops_with_its_row(tokenizer, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    tokenizer.chat_template = only_in_row_3(LOOP)
    start = time.monotonic()
    with pytest.raises(DataError, match="^rows:4: the chat template took longer than 0.2 s$"):
        tokenize_rows(load_rows(make_rows(True)), tokenizer, max_length=None, on_bad_row="skip")
    assert time.monotonic() - start < 5


def test_the_limit_leaves_other_timers_as_they_were(tokenizer):
    import signal

    tokenizer.chat_template = CHATML
    calls = []
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        template.render(tokenizer, make_rows(True)[0]["prompt"])
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        time.sleep(0.4)
        assert calls == [1]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_long_conversation_may_be_rendered_long(tokenizer):
    tokenizer.chat_template = CHATML
    messages = [{"role": "user", "content": "x" * 2_000_000}]
    assert len(template.render(tokenizer, messages)) > 2_000_000
