"""tokenize_rows: the ids of TRL 1.16, every lost token counted, a cache keyed by rows and tokenizer alone."""

from types import SimpleNamespace

import datasets
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from prefopt.data import DataError, PreferenceCollator, load_rows, tokenize_rows
from support.tiny_models import BOS, CHATML, EOS, ROWS, make_dataset, make_rows, make_tokenizer

# A generation prompt that the rendered answer does not repeat, as DeepSeek-R1-Distill's template has it.
THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
assert THINKING != CHATML
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "prefopt"


def trl_rows(dataset, tokenizer, max_length):
    """What KTOTrainer 1.16 makes of a dataset, without building a model for it."""
    from trl import KTOTrainer

    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length)
    return KTOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "eval")


@pytest.mark.parametrize("max_length", [None, 64, 30])
@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_ids_equal_trl(tokenizer, conversational, max_length, template):
    tokenizer.chat_template = template
    dataset = make_dataset(conversational)
    ours = tokenize_rows(load_rows(dataset), tokenizer, max_length=max_length, on_bad_row="skip").dataset
    theirs = trl_rows(dataset, tokenizer, max_length)
    assert len(theirs) > 10 and any(not label for label in theirs["label"])
    for name in ("prompt_ids", "completion_ids", "label"):
        assert ours[name][:] == theirs[name][:], name


def test_pairs_equal_trl_up_to_the_order(tokenizer):
    tokenizer.chat_template = CHATML
    pairs = [
        {
            "chosen": [*row["prompt"], *row["completion"]],
            "rejected": [*row["prompt"], {"role": "assistant", "content": f"لا {i}"}],
        }
        for i, row in enumerate(make_rows(True))
    ]
    dataset = datasets.Dataset.from_list(pairs)
    ours = tokenize_rows(load_rows(dataset), tokenizer, max_length=None).dataset
    theirs = trl_rows(dataset, tokenizer, None)
    rows = [sorted((row["label"], row["prompt_ids"], row["completion_ids"]) for row in side) for side in (ours, theirs)]
    assert rows[0] == rows[1] and len(rows[0]) == 2 * len(pairs)
    assert ours["label"][:] == [True, False] * len(pairs)  # theirs: all True first


def test_text_ends_in_eos_exactly_once(tokenizer):
    rows = [{"prompt": "Where?", "completion": f" Here{end}", "label": True} for end in ("", EOS)]
    ids = tokenize_rows(load_rows(rows), tokenizer, max_length=None).dataset["completion_ids"]
    assert ids[0] == ids[1] and ids[0].count(tokenizer.eos_token_id) == 1 == ids[0][::-1].index(3) + 1


def test_truncation_is_counted_and_the_ids_are_kept_for_the_collator(tokenizer):
    tokenizer.chat_template = CHATML
    full = tokenize_rows(load_rows(make_rows(True)), tokenizer, max_length=None)
    sizes = [(len(row["prompt_ids"]), len(row["completion_ids"])) for row in full.dataset]
    limit = max(prompt for prompt, _ in sizes) + 3
    cut = tokenize_rows(load_rows(make_rows(True)), tokenizer, max_length=limit)
    lost = [max(0, prompt + completion - limit) for prompt, completion in sizes]
    assert 0 < sum(n > 0 for n in lost) < len(sizes)  # the case is really there
    assert cut.counts["truncated"] == sum(n > 0 for n in lost)
    assert cut.counts["truncated_tokens"] == sum(lost)
    assert cut.counts["completion_tokens"] == sum(completion for _, completion in sizes) - sum(lost)
    assert cut.counts["prompt_tokens"] == sum(prompt for prompt, _ in sizes)
    batch = PreferenceCollator(0, max_length=limit)(list(cut.dataset))
    assert batch["completion_mask"].sum() == cut.counts["completion_tokens"]
    assert batch["attention_mask"].sum(1).tolist() == [min(limit, sum(size)) for size in sizes]


def test_a_prompt_as_long_as_max_length_is_a_bad_row(tokenizer):
    tokenizer.chat_template = CHATML
    loaded = load_rows(make_rows(True))
    lengths = [len(ids) for ids in tokenize_rows(loaded, tokenizer, max_length=None).dataset["prompt_ids"]]
    limit = sorted(lengths)[10]
    long = [row for row, length in enumerate(lengths) if length >= limit]
    with pytest.raises(DataError) as error:
        tokenize_rows(loaded, tokenizer, max_length=limit)
    assert [row.line for row in error.value.bad] == [row + 1 for row in long]
    assert f"{len(long)} of {len(ROWS)} rows of rows cannot be used" in str(error.value)
    assert f"max_length is {limit}: no room for an answer" in str(error.value)
    skipped = tokenize_rows(loaded, tokenizer, max_length=limit, on_bad_row="skip")
    assert skipped.counts["bad"] == len(long) == len(skipped.bad)
    assert skipped.dataset["row"][:] == [row for row in range(len(ROWS)) if row not in long]
    for row in skipped.dataset:  # the columns stay aligned when rows leave
        assert row["label"] == loaded.rows[row["row"]]["label"] and row["group"] == loaded.rows[row["row"]]["group"]
    with pytest.raises(DataError, match="no rows to train on; all 20 are bad"):
        tokenize_rows(loaded, tokenizer, max_length=2, on_bad_row="skip")


def test_a_prompt_that_is_rendered_differently_alone_is_counted_and_said(tokenizer, caplog):
    tokenizer.chat_template = THINKING
    tokenized = tokenize_rows(load_rows(make_rows(True)), tokenizer, max_length=None)
    assert tokenized.counts["prompt_cut"] == len(ROWS)
    assert "20 of 20 rows the prompt alone is rendered differently" in caplog.text


def test_a_row_that_the_template_refuses_is_a_bad_row(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    rows = make_rows(True)
    rows[3]["prompt"] = [{"role": "system", "content": "Be brief."}, *rows[3]["prompt"]]
    with pytest.raises(DataError, match="rows:4: the chat template refuses it: no system role"):
        tokenize_rows(load_rows(rows), tokenizer, max_length=None)
    kept = tokenize_rows(load_rows(rows), tokenizer, max_length=None, on_bad_row="skip")
    assert kept.dataset["row"][:] == [row for row in range(len(rows)) if row != 3]


def test_template_arguments_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ mood }}" + CHATML
    loaded = load_rows(make_rows(True))
    plain = tokenize_rows(loaded, tokenizer, max_length=None)
    kind = tokenize_rows(loaded, tokenizer, max_length=None, chat_template_kwargs={"mood": "kind"})
    assert tokenizer.decode(kind.dataset[0]["prompt_ids"]).startswith("kind<|im_start|>user")
    assert kind.fingerprint != plain.fingerprint


def test_what_the_tokenizer_lacks_is_named(tokenizer, tmp_path):
    bare = make_tokenizer(tmp_path / "bare")
    bare.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        tokenize_rows(load_rows(make_rows(True)), bare, max_length=None)
    bare.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        tokenize_rows(load_rows(make_rows(False)), bare, max_length=None)
    with pytest.raises(ValueError, match="max_length is 1; expected at least 2"):
        tokenize_rows(load_rows(make_rows(False)), tokenizer, max_length=1)
    with pytest.raises(ValueError, match="on_bad_row is 'drop'; expected stop or skip"):
        tokenize_rows(load_rows(make_rows(False)), tokenizer, max_length=9, on_bad_row="drop")


def test_the_cache_depends_on_rows_and_tokenizer_alone(tokenizer, cache):
    def files(rows, **kwargs):
        tokenize_rows(load_rows(rows), tokenizer, **{"max_length": None, **kwargs})
        return sorted(path.name for path in cache.glob("tokens-*.arrow"))

    tokenizer.chat_template = CHATML
    first = files(make_rows(True))
    assert len(first) == 1
    stamp = (cache / first[0]).stat().st_mtime_ns
    tokenizer(
        "a padded call leaves traces in a fast tokenizer",
        padding=True,
        truncation=True,
        max_length=3,
    )
    assert files(make_rows(True), max_length=200, on_bad_row="skip") == first
    assert (cache / first[0]).stat().st_mtime_ns == stamp  # read again, not written again
    tokenizer.chat_template = NO_SYSTEM
    assert len(files(make_rows(True))) == 2
    changed = make_rows(True)
    changed[0]["label"] = not changed[0]["label"]
    assert len(files(changed)) == 3


def test_a_cached_read_equals_the_first(tokenizer, cache):
    tokenizer.chat_template = CHATML
    first, second = (tokenize_rows(load_rows(make_rows(True)), tokenizer, max_length=64) for _ in range(2))
    assert first.dataset.to_list() == second.dataset.to_list() and first.fingerprint == second.fingerprint


def test_without_caching_nothing_is_written(tokenizer, cache):
    datasets.disable_caching()
    try:
        tokenized = tokenize_rows(load_rows(make_rows(False)), tokenizer, max_length=64)
    finally:
        datasets.enable_caching()
    assert len(tokenized.dataset) == len(ROWS) and not cache.exists()


@pytest.mark.parametrize("conversational", [True, False])
def test_ids_equal_trl_when_the_tokenizer_adds_bos(tmp_path, conversational):
    adding = make_tokenizer(tmp_path / "bos")
    adding.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $0", special_tokens=[(BOS, 1)])
    ours = tokenize_rows(load_rows(make_dataset(conversational)), adding, max_length=None).dataset
    theirs = trl_rows(make_dataset(conversational), adding, None)
    assert ours["prompt_ids"][:] == theirs["prompt_ids"][:]
    assert ours["completion_ids"][:] == theirs["completion_ids"][:]
    # text begins with BOS, as the tokenizer wants it; a template writes its own special tokens
    assert all((ids[0] == 1) is not conversational and 1 not in ids[1:] for ids in ours["prompt_ids"])


def test_a_tokenizer_in_python_equals_trl_and_is_cached(cache):
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    ours = tokenize_rows(load_rows(make_dataset(False)), slow, max_length=None)
    theirs = trl_rows(make_dataset(False), slow, None)
    assert ours.dataset["completion_ids"][:] == theirs["completion_ids"][:]
    assert ours.dataset["prompt_ids"][:] == theirs["prompt_ids"][:]
    assert tokenize_rows(load_rows(make_dataset(False)), slow, max_length=None).fingerprint == ours.fingerprint
    assert len(list(cache.glob("tokens-*.arrow"))) == 1


def test_rows_that_render_to_nothing_are_bad_rows(tokenizer):
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="rows:1: completion has no tokens once it is rendered"):
        tokenize_rows(load_rows(make_rows(True)), tokenizer, max_length=None)
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match="rows:1: the prompt's first token changes once the completion follows it"):
        tokenize_rows(load_rows(make_rows(True)), tokenizer, max_length=None)
