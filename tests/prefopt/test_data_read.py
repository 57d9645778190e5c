"""load_rows: each source, each way a row can be wrong, nothing dropped without a word."""

import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from prefopt.data import DataError, load_rows, split_by_group
from support.tiny_models import ROWS, make_dataset, make_rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


GOOD = {"prompt": "Where?", "completion": "Here.", "label": True}
CHAT = {"prompt": [user("Where?")], "completion": [assistant("Here.")], "label": True}


def write(path: Path, *lines: bytes | dict) -> Path:
    data = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return path


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("conversational", [True, False])
def test_every_source_gives_the_same_rows(tmp_path, conversational):
    rows = make_rows(conversational)
    jsonl = write(tmp_path / "rows.jsonl", *rows)
    parquet = tmp_path / "rows.parquet"
    make_dataset(conversational).to_parquet(parquet)
    loaded = [load_rows(source) for source in (rows, make_dataset(conversational), jsonl, str(jsonl), parquet)]
    for one in loaded:
        assert one.rows.column_names == ["prompt", "completion", "label", "source", "line", "group"]
        assert one.rows.select_columns(["prompt", "completion", "label"]).to_list() == rows
        assert one.rows["line"][:] == list(range(1, len(rows) + 1))
        assert one.conversational is conversational
        assert one.counts == {
            "read": 20, "rows": 20, "desirable": 11, "undesirable": 9, "groups": 20, "pairs": 0, "bad": 0,
            "blank_lines": 0,
        }  # fmt: skip
        assert one.fingerprint == loaded[0].fingerprint
    assert loaded[2].rows["source"][0] == str(jsonl)


def test_hub_id_split_and_revision_are_passed_on(monkeypatch):
    asked = {}

    def load_dataset(name, **kwargs):
        asked.update(name=name, **kwargs)
        return make_dataset(True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_rows("someone/preferences", split="train_prefs", revision="v2")
    assert asked == {"name": "someone/preferences", "split": "train_prefs", "revision": "v2"}
    assert loaded.rows["source"][0] == "someone/preferences" and loaded.counts["rows"] == 20


def test_what_cannot_be_fetched_is_one_sentence():
    with pytest.raises(DataError, match="cannot load someone/preferences .* neither a local file nor a dataset"):
        load_rows("someone/preferences")


def test_pairs_are_interleaved_and_keep_their_group():
    pairs = [{"prompt": f"Question {i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(3)]
    loaded = load_rows(pairs)
    assert loaded.rows["label"][:] == [True, False] * 3
    assert loaded.rows["completion"][:2] == ["Yes 0.", "No 0."]
    assert loaded.rows["line"][:] == [1, 1, 2, 2, 3, 3]
    groups = loaded.rows["group"][:]
    assert groups[0::2] == groups[1::2] and len(set(groups)) == 3
    assert loaded.counts["read"] == loaded.counts["pairs"] == 3 and loaded.counts["rows"] == 6


def test_the_prompt_of_a_pair_is_what_both_conversations_share():
    shared = [{"role": "system", "content": ""}, user("Hi"), assistant("Hello"), user("Where?")]
    pair = {"chosen": [*shared, assistant("Here.")], "rejected": [*shared, assistant("No.")]}
    rows = load_rows([pair, {**pair, "prompt": "Where?"}]).rows
    assert rows["prompt"][:] == [shared] * 4
    assert rows["completion"][:2] == [[assistant("Here.")], [assistant("No.")]]
    with pytest.raises(DataError, match="prompt is text that is not a user turn shared by chosen and rejected"):
        load_rows([{**pair, "prompt": "When?"}])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "completion"),
    [
        ("The sky is blue", "The sky is black", "The sky is", " blue"),  # not "The sky is bl"
        ("Q: why?\nA: yes", "Q: why?\nA: no", "Q: why?\nA:", " yes"),
        ("Q: why?\nyes", "Q: why?\nno", "Q: why?\n", "yes"),
    ],
)
def test_the_prompt_of_a_text_pair_ends_at_a_word(chosen, rejected, prompt, completion):
    rows = load_rows([{"chosen": chosen, "rejected": rejected}]).rows
    assert rows["prompt"][0] == prompt and rows["completion"][0] == completion
    assert rows["prompt"][0] + rows["completion"][1] == rejected


def test_bom_blank_lines_crlf_and_line_separators(tmp_path):
    row = {**GOOD, "completion": "one\u2028line"}  # a line separator inside JSON is no new line
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", b"", b"  \t", row)
    loaded = load_rows(path)
    assert loaded.rows["line"][:] == [1, 4] and loaded.counts["blank_lines"] == 2
    assert loaded.rows["completion"][1] == "one\u2028line"


def test_chunks_are_joined(monkeypatch):
    monkeypatch.setattr("prefopt.data.read.CHUNK_ROWS", 3)
    loaded = load_rows([{**GOOD, "prompt": f"Where {i}?"} for i in range(8)])
    assert loaded.rows["prompt"][:] == [f"Where {i}?" for i in range(8)]


# ---------------------------------------------------------------- bad rows

BAD = {
    "field 'label' is missing": {"prompt": "a", "completion": "b"},
    "field 'label' is missing (found 'lable')": {"prompt": "a", "completion": "b", "lable": True},
    "field 'completion' is missing (found 'completions')": {
        "prompt": "a",
        "completions": "b",
        "label": True,
    },
    "field 'prompt' is missing": {"prompt": None, "completion": "b", "label": True},
    "field 'rejected' is missing": {"prompt": "a", "chosen": "b"},
    "has fields of an unpaired row": {"prompt": "a", "chosen": "b", "rejected": "c", "label": True},
    "label is 1; expected true or false": {**GOOD, "label": 1},
    "label is 0.0; expected true or false": {**GOOD, "label": 0.0},
    "label is 'true'; expected true or false": {**GOOD, "label": "true"},
    "completion is empty": {**GOOD, "completion": " \n"},
    "prompt is empty": {**GOOD, "prompt": ""},
    "prompt is 7; expected text or a list of messages": {**GOOD, "prompt": 7},
    "prompt is text but completion is chat messages": {**GOOD, "completion": [assistant("b")]},
    "holds half of a surrogate pair at character 1": {**GOOD, "completion": "a\ud83d"},
    "field 'tools' is not supported": {**GOOD, "tools": "[]"},
    "group is 1.5; expected text or an integer": {**GOOD, "group": 1.5},
    "source is 3; expected text": {**GOOD, "source": 3},
    "chosen and rejected are the same": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "rejected is empty": {"prompt": "a", "chosen": "b", "rejected": ""},
}

BAD_CHAT = {
    "prompt is empty": {**CHAT, "prompt": []},
    "message 1 of completion is empty": {**CHAT, "completion": [assistant("")]},
    "message 1 of prompt is 'Where?'; expected {role, content}": {**CHAT, "prompt": ["Where?"]},
    "message 1 of prompt has role missing; expected text": {**CHAT, "prompt": [{"content": "a"}]},
    "message 1 of prompt has content ['a']; expected text": {**CHAT, "prompt": [user(["a"])]},
    "has the unknown role 'human'; expected system, user, assistant": {
        **CHAT,
        "prompt": [{"role": "human", "content": "a"}],
    },
    "message 1 of completion has 'tool_calls', which is not supported": {
        **CHAT,
        "completion": [{**assistant("a"), "tool_calls": [1]}],
    },
    "prompt has the roles user, user; expected system": {**CHAT, "prompt": [user("a"), user("b")]},
    "prompt has the roles user, assistant; expected": {
        **CHAT,
        "prompt": [user("a"), assistant("b")],
    },
    "prompt has the roles system; expected": {
        **CHAT,
        "prompt": [{"role": "system", "content": "a"}],
    },
    "prompt has the roles user, system, user; expected": {
        **CHAT,
        "prompt": [user("a"), {"role": "system", "content": "s"}, user("b")],
    },
    "completion has the roles user; expected one assistant message": {
        **CHAT,
        "completion": [user("a")],
    },
    "chosen and rejected part before their last message": {
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("b"), user("x"), assistant("d")],
    },
}


@pytest.mark.parametrize(
    ("reason", "row", "good"),
    [(reason, row, GOOD) for reason, row in BAD.items()] + [(reason, row, CHAT) for reason, row in BAD_CHAT.items()],
)
def test_a_bad_row_stops_with_file_line_and_reason(tmp_path, reason, row, good):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, row, good)), encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_rows(path)
    assert "1 of 3 rows" in str(error.value) and "--data.on_bad_row skip" in str(error.value)
    assert [(bad.file, bad.line) for bad in error.value.bad] == [(str(path), 2)]
    assert reason in error.value.bad[0].reason and f"{path}:2: " in str(error.value)
    skipped = load_rows(path, on_bad_row="skip")
    assert skipped.rows["line"][:] == [1, 3] and skipped.bad == error.value.bad
    assert skipped.counts["read"] == 3 and skipped.counts["bad"] == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "caf\xe9"}', "is not UTF-8 (byte 16 of the line, 0xe9)"),
        (b'{"prompt": "a", }', "is not JSON: "),
        (b"[1, 2]", "is a list; expected an object"),
        (b'{"prompt": "a", "label": true, "label": false}', "has the key 'label' twice"),
        (b"[" * 100_000, "cannot be read as JSON: "),
        (b'{"label": ' + b"9" * 5000 + b"}", "cannot be read as JSON: "),
    ],
)
def test_a_broken_line_does_not_hide_the_others(tmp_path, line, reason):
    path = write(tmp_path / "data.jsonl", GOOD, line, {"prompt": "x"}, GOOD)
    with pytest.raises(DataError) as error:
        load_rows(path)
    assert [row.line for row in error.value.bad] == [2, 3]
    assert error.value.bad[0].reason.startswith(reason)


def test_only_ten_bad_rows_are_shown_but_all_are_listed():
    with pytest.raises(DataError) as error:
        load_rows([GOOD] + [{**GOOD, "label": "no"}] * 30)
    assert "30 of 31 rows" in str(error.value) and "... and 20 more" in str(error.value)
    assert str(error.value).count("label is 'no'") == 10 and len(error.value.bad) == 30


def test_text_and_chat_do_not_mix():
    with pytest.raises(DataError, match="rows:2: is chat messages, while the rows before it are text"):
        load_rows([GOOD, CHAT])
    with pytest.raises(DataError, match="rows:2: is text, while the rows before it are chat messages"):
        load_rows([CHAT, GOOD])


def test_bad_rows_in_parquet_have_row_numbers(tmp_path):
    table = pyarrow.table({"prompt": ["a", "b", None], "completion": ["c", "", "d"], "label": [True, False, True]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError) as error:
        load_rows(tmp_path / "rows.parquet")
    assert [(row.line, row.reason) for row in error.value.bad] == [
        (2, "completion is empty"),
        (3, "field 'prompt' is missing"),
    ]


def test_fields_without_use_are_counted_and_said(caplog):
    loaded = load_rows([{**GOOD, "score": 3}, {**GOOD, "score": None, "id": "x"}])
    assert loaded.ignored == {"score": 2, "id": 1}
    assert "unused fields: id, score" in caplog.text


# ---------------------------------------------------------------- sources that cannot be read


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.jsonl", b"", "has no rows to train on"),
        ("blank.jsonl", b"\n\n", "has no rows to train on"),
        ("utf16.jsonl", '{"prompt": "a"}'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (
            "rows.csv",
            b"prompt,completion\n",
            r"has the extension \.csv; expected \.jsonl or \.parquet",
        ),
        ("rows.parquet", b"not parquet at all", "cannot be read as Parquet"),
    ],
)
def test_an_unreadable_file_is_one_sentence(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / name)


def test_a_truncated_parquet_file_is_one_sentence(tmp_path):
    make_dataset(False).to_parquet(tmp_path / "rows.parquet")
    data = bytearray((tmp_path / "rows.parquet").read_bytes())
    data[4:200] = bytes(196)  # the footer stays whole, the pages do not
    (tmp_path / "rows.parquet").write_bytes(data)
    with pytest.raises(DataError, match="cannot be read after row 0"):
        load_rows(tmp_path / "rows.parquet")


def test_missing_files_folders_and_types_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no file .*missing.jsonl"):
        load_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="there is no file data/missing.parquet"):
        load_rows("data/missing.parquet")
    with pytest.raises(DataError, match="is a folder; expected a .jsonl or .parquet file"):
        load_rows(tmp_path)
    with pytest.raises(DataError, match="is a IterableDataset; expected a map-style"):
        load_rows(make_dataset(True).to_iterable_dataset())
    with pytest.raises(ValueError, match="on_bad_row is 'drop'; expected stop or skip"):
        load_rows([GOOD], on_bad_row="drop")


def test_a_missing_column_is_one_sentence_not_one_for_each_row():
    with pytest.raises(DataError, match="dataset has no column label; found prompt, completion") as error:
        load_rows(make_dataset(True).remove_columns("label"))
    assert error.value.bad == []
    with pytest.raises(DataError, match="has no column rejected"):
        load_rows(Dataset.from_dict({"prompt": ["a"], "chosen": ["b"]}))


def test_nothing_left_after_skipping_is_an_error():
    with pytest.raises(DataError, match="no rows to train on; all 2 are bad, the first: rows:1: label is 1"):
        load_rows([{**GOOD, "label": 1}] * 2, on_bad_row="skip")


# ---------------------------------------------------------------- groups, fingerprints, split


def test_groups_ignore_case_spacing_and_unicode_form_but_not_words():
    prompts = ["Café au lait?", "cafe\u0301  AU lait?\n", "Tea?"]
    groups = load_rows([{**GOOD, "prompt": prompt} for prompt in prompts]).rows["group"]
    assert groups[0] == groups[1] != groups[2]
    assert all(0 <= group < 2**63 for group in groups)
    # one stable value, so that a change of the hash, which would reshuffle every split, is seen
    assert load_rows([GOOD]).rows["group"][0] == 7992306431278147084


def test_a_given_group_wins_over_the_prompt():
    rows = load_rows([{**GOOD, "group": "t1"}, {**GOOD, "prompt": "Other?", "group": "t1"}, {**GOOD, "group": 2}]).rows
    assert rows["group"][0] == rows["group"][1] != rows["group"][2]


def test_fingerprint_follows_the_content_alone():
    first = load_rows([GOOD, {**GOOD, "label": False}])
    assert load_rows([{**GOOD, "source": "x", "note": 1}, {**GOOD, "label": False}]).fingerprint == first.fingerprint
    for changed in ({**GOOD, "label": True}, {**GOOD, "label": False, "prompt": "When?"}):
        assert load_rows([GOOD, changed]).fingerprint != first.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", first.fingerprint)


def test_split_keeps_groups_together_and_is_stable_under_growth():
    pairs = [{"prompt": f"Question {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(400)]
    train, held_out = split_by_group(load_rows(pairs), 0.25, seed=3)
    assert not set(train.rows["group"]) & set(held_out.rows["group"])
    assert train.counts["rows"] + held_out.counts["rows"] == 800
    # 400 draws with probability 1/4: standard deviation 8.7; five of them
    assert abs(held_out.counts["groups"] - 100) < 44
    assert held_out.counts["desirable"] == held_out.counts["undesirable"] == held_out.counts["groups"]
    grown = [{"prompt": "New?", "chosen": "Yes.", "rejected": "No."}, *reversed(pairs)]
    _, later = split_by_group(load_rows(grown), 0.25, seed=3)
    assert set(held_out.rows["group"]) <= set(later.rows["group"])
    _, other = split_by_group(load_rows(pairs), 0.25, seed=4)
    assert set(other.rows["group"]) != set(held_out.rows["group"])
    assert len({train.fingerprint, held_out.fingerprint, other.fingerprint}) == 3


def test_split_refuses_to_leave_a_side_empty():
    with pytest.raises(DataError, match="leaves the (train|eval) side of rows without rows .1 different prompts"):
        split_by_group(load_rows([GOOD]), 0.5)
    with pytest.raises(ValueError, match="eval_fraction is 1.5; expected a number between 0 and 1"):
        split_by_group(load_rows([GOOD]), 1.5)


def test_the_examples_of_the_tests_are_sound():
    assert len({prompt for prompt, _, _ in ROWS}) == len(ROWS) >= 16
