"""Broken files and rows: each gets one sentence with its place, of bounded length, and hides no other row."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from prefopt.cli import main
from prefopt.data import DataError, load_rows
from prefopt.data.labels import label_table

GOOD = {"prompt": "Where?", "completion": "Here.", "label": True}


def write(path, *lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def dumped(row):
    return json.dumps(row).encode()


def only_bad(path):
    """The reason of the bad row in line 2 of 3."""
    loaded = load_rows(path, on_bad_row="skip")
    assert loaded.rows["line"][:] == [1, 3]
    (bad,) = loaded.bad
    assert (bad.file, bad.line) == (str(path), 2)
    return bad.reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "\ud800": 1}, r"key '\ud800' holds half of a surrogate pair at character 0"),
        ({**GOOD, "source": "a\udfff"}, "source holds half of a surrogate pair at character 1"),
        ({**GOOD, "note": {"a": ["b", "\ud800"]}}, "note.a[1] holds half of a surrogate pair at character 0"),
        ({**GOOD, "note": [{"\ud800": 1}]}, r"key '\ud800' holds half of a surrogate pair at character 0"),
        (
            {"prompt": [{"role": "user", "content": "a\ud800"}], "chosen": [], "rejected": []},
            "prompt[0].content holds half of a surrogate pair at character 1",
        ),
        ({**GOOD, "label": float("nan")}, "label is nan; expected true or false"),
        ({**GOOD, "group": float("inf")}, "group is inf; expected text or an integer"),
    ],
)
def test_a_row_that_could_not_be_written_or_compared(tmp_path, capsys, row, reason):
    path = write(tmp_path / "rows.jsonl", dumped(GOOD), dumped(row), dumped({**GOOD, "prompt": "b"}))
    assert only_bad(path) == reason
    assert load_rows([GOOD, row, GOOD], on_bad_row="skip").bad[0].reason == reason
    assert main(["data", "check", str(path)]) == 1
    assert f"{path}:2: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"note": ' + b"[" * 150 + b"]" * 150 + b"}", "note" + "[0]" * 18 + "[0 is nested more than 100"),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "cannot be read as JSON: maximum recursion"),
        (b"\0\0\0\0", "is not JSON: Expecting value at column 1"),
        (b"\x1f\x8b\x08", "is not UTF-8 (byte 2 of the line, 0x8b)"),
        (b"[]", "is a list; expected an object"),
        (b"null", "is a NoneType; expected an object"),
        (b'{"note": {"a": 1, "a": 2}}', "has the key 'a' twice"),
    ],
)
def test_a_line_that_is_no_row(tmp_path, line, reason):
    path = write(tmp_path / "rows.jsonl", dumped(GOOD), line, dumped(GOOD))
    assert only_bad(path).startswith(reason)


BIG = "x" * 2_000_000


@pytest.mark.parametrize(
    "row",
    [
        {**GOOD, "label": BIG},
        {**GOOD, "group": [BIG]},
        {**GOOD, "source": [BIG]},
        {"prompt": [{"role": BIG, "content": "a"}], "completion": [], "label": True},
        {"prompt": [{"role": "user", "content": "a", BIG: 1}], "completion": [], "label": True},
        {
            "prompt": [{"role": "user", "content": "a"}] * 10_000,
            "completion": [{"role": "assistant", "content": "b"}],
            "label": True,
        },
        {**GOOD, BIG + "\ud800": 1},
    ],
)
def test_a_message_about_a_huge_row_is_short(tmp_path, row):
    path = write(tmp_path / "rows.jsonl", dumped(GOOD), dumped(row), dumped(GOOD))
    assert len(only_bad(path)) < 300
    (tmp_path / "twice.jsonl").write_text(f'{{"{BIG}": 1, "{BIG}": 2}}\n"{BIG}"\n', encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_rows(tmp_path / "twice.jsonl")
    assert len(error.value.bad) == 2 and len(str(error.value)) < 1000


def test_what_is_odd_but_readable_is_read(tmp_path):
    row = {**GOOD, "prompt": "a\0b", "group": 10**400, "score": float("nan")}
    name = os.fsdecode(bytes(tmp_path) + b"/\xff.jsonl")
    with open(name, "wb") as file:
        file.write(b"\xef\xbb\xbf" + dumped(row) + b"\r\n")
    loaded = load_rows(name)
    assert loaded.rows[0]["prompt"] == "a\0b"
    assert loaded.rows[0]["source"].endswith(r"/\udcff.jsonl")  # can be written and printed


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ('{"prompt": "a"}'.encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        (b"\x1f\x8b\x08\x00\x00", "is compressed (gzip); unpack it"),
        (b"PAR1\x15\x04", "is a Parquet file; name it .parquet"),
    ],
)
def test_a_file_of_another_format_is_one_sentence(tmp_path, capsys, data, problem):
    (tmp_path / "rows.jsonl").write_bytes(data)
    assert main(["data", "check", str(tmp_path / "rows.jsonl")]) == 2
    assert capsys.readouterr().err == f"prefopt: {tmp_path / 'rows.jsonl'} {problem}\n"


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="is not a regular file"):
        load_rows(tmp_path / "rows.jsonl")


def test_a_date_that_python_cannot_hold_is_a_bad_row(tmp_path):
    """Year 292,277,026: Arrow has it, ``datetime`` has not."""
    when = pyarrow.array([0, 2**58, 1], pyarrow.timestamp("ms"))
    columns = {
        "prompt": ["a", "b", "c"],
        "completion": ["d", "e", "f"],
        "label": [True, False, True],
    }
    table = pyarrow.table({**columns, "when": when})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert only_bad(tmp_path / "rows.parquet").startswith("when cannot be read: ")
    loaded = load_rows(Dataset(table), on_bad_row="skip")
    assert loaded.rows["line"][:] == [1, 3] and [row.line for row in loaded.bad] == [2]


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    columns = [pyarrow.array(["a"])] * 2 + [pyarrow.array(["b"]), pyarrow.array([True])]
    table = pyarrow.Table.from_arrays(columns, ["prompt", "prompt", "completion", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet has the column 'prompt' twice"):
        load_rows(tmp_path / "rows.parquet")


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("good", "bad", "shown"),
    [
        (1, 0, "{1: true, 0: false}"),
        (1.0, 0.0, "{1.0: true, 0.0: false}"),
        ("true", "false", '{"true": true, "false": false}'),
        ("Yes", "No", '{"Yes": true, "No": false}'),
        ("👍", "👎", '{"👍": true, "👎": false}'),
    ],
)
def test_usual_labels_come_with_their_mapping(tmp_path, capsys, good, bad, shown):
    """The mapping that the message shows is the one that works, on the command line and in python."""
    rows = [{**GOOD, "label": good}, {**GOOD, "prompt": "b", "label": bad}]
    with pytest.raises(DataError) as error:
        load_rows(rows)
    assert f"convert them with data.label_map {shown} (" in str(error.value)
    assert load_rows(rows, label_map={good: True, bad: False}).rows["label"][:] == [True, False]
    path = write(tmp_path / "rows.jsonl", *map(dumped, rows))
    assert main(["data", "check", str(path), "--label-map", shown]) == 0
    assert "desirable      1 (50.0%)" in capsys.readouterr().out


@pytest.mark.parametrize("labels", [(1, True), (1, 2), (1, "yes"), (1, 0.0), ("yes", "👎"), ([1], 0)])
def test_no_mapping_is_suggested_for_mixed_labels(labels):
    with pytest.raises(DataError) as error:
        load_rows([{**GOOD, "label": label} for label in labels])
    assert "label_map" not in str(error.value)


def test_one_true_and_one_point_zero_are_three_labels():
    rows = [{**GOOD, "label": label} for label in (1, True, 1.0, 0, False, "1")]
    loaded = load_rows(rows, label_map={1: False, 0: True}, on_bad_row="skip")  # the wrong way round
    assert dict(zip(loaded.rows["line"], loaded.rows["label"], strict=True)) == {
        1: False,
        2: True,
        4: True,
        5: False,
    }
    assert [bad.reason for bad in loaded.bad] == [
        "label is 1.0; expected true or false, or a label of label_map (1, 0)",
        "label is '1'; expected true or false, or a label of label_map (1, 0)",
    ]


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ({}, "label_map is {}; expected a mapping such as {1: true, 0: false}"),
        ([1, 0], r"label_map is \[1, 0\]; expected a mapping"),
        ({1: True, 0: 0}, "label_map converts 0 to 0; expected true or false"),
        (
            {1: True},
            "label_map converts every label to true; expected labels for true and for false",
        ),
        ({True: True, False: False}, 'label_map has the key true; .* quote them, {"yes": true'),
        ({None: True, 0: False}, "label_map has the key missing; expected text or a number"),
        ({float("nan"): True, 0: False}, "label_map has the key nan; expected text or a number"),
    ],
)
def test_a_mapping_of_labels_is_checked(label_map, message):
    with pytest.raises(DataError, match=message):
        label_table(label_map)
