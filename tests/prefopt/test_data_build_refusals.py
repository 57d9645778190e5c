"""`prefopt data build` on what it cannot build: one sentence, and nothing is left of it."""

import json

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RevisionNotFoundError

from prefopt.cli import main
from support.data_build import FIXTURES, run, words


def left_over(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"chosen": "\n\nHuman: a\n\nAssistant: b"}, "has no column rejected; found chosen. Expected chosen, rejected"),
        ({"chosen": "x", "rejected": 1}, "rejected is 1; expected text"),
        ({"chosen": "\n\nHuman: \ud83d", "rejected": "a"}, "chosen holds half of a surrogate pair at character 9"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(tmp_path, capsys, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert main(["data", "build", f"hh-rlhf:{path}", "--out", str(tmp_path / "set")]) == 2
    assert message in capsys.readouterr().err
    assert left_over(tmp_path) == ["bad.jsonl"]


def test_bad_rows_stop_or_are_listed(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        (FIXTURES / "kto-mix-14k.jsonl").read_bytes() + b'{"prompt": 1, "completion": "b", "label": true}\nnot JSON\n'
    )
    given = ["data", "build", str(path), "--out", str(tmp_path / "set"), "--validation", "0"]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert "3 of 10 rows" in error and f"{path}:5: message 1 of completion is empty" in error
    assert f"{path}:10: is not JSON" in error and "--on-bad-row skip" in error
    assert main([*given, "--on-bad-row", "skip"]) == 0
    assert "bad row (listed in bad_rows.jsonl)" in capsys.readouterr().out
    listed = (tmp_path / "set" / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(one)["line"] for one in listed] == [5, 9, 10]
    counts = json.loads((tmp_path / "set" / "counts.json").read_text())["total"]
    assert counts["read"] == counts["used"] + sum(counts["left_out"].values()) == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["missing.jsonl"], "there is no file missing.jsonl"),
        (["shpp"], "there is no file, plan or published set shpp; did you mean shp?"),
        (["shpp:x.jsonl"], "shpp is no kind of source; did you mean shp?"),
        (["plan.yaml"], "there is no plan plan.yaml"),
        (["a.jsonl", "plan.yaml"], "plan.yaml is a plan; expected one plan"),
        (["rows:a.jsonl", "rows:b/a.jsonl"], "two sources are called a; name them: NAME=a and so on"),
        (["a.jsonl", "--validation", "1.5"], "validation is 1.5; expected a number from 0 to below 1"),
        (["a.jsonl", "--validation", "0.5", "--test", "0.5"], "leave nothing to train on"),
        (["a.jsonl", "--max-rows", "0"], "max_rows is 0; expected a whole number, at least 1"),
        (["a.jsonl", "--validaton", "0.5"], "--validaton is unknown; did you mean --validation?"),
        (["someone/rows"], "cannot load someone/rows (split any, revision newest)"),
        (["someone/rows@" + "0" * 40], "cannot load someone/rows (split train, revision 0000"),
        (["shp"], "cannot load stanfordnlp/SHP (split train, revision e94b5f32"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    code, out, error = run(capsys, *given, "--out", "set")
    assert code == 2 and out == "" and message in error and "Traceback" not in error
    assert left_over(tmp_path) == []


def test_splits_labels_and_sources_without_rows_are_one_sentence(tmp_path, capsys):
    out = tmp_path / "set"
    one = FIXTURES / "unpaired.jsonl"
    code, _, error = run(capsys, one, "--out", out, "--validation", "0.001")
    assert code == 2 and "the validation split is empty: its share is 0.001 of 2 groups" in error
    code, _, error = run(capsys, *words("mmlu-pro"), "--out", out, "--validation", "0")
    assert code == 2 and "all 6 rows of the train split are desirable" in error
    assert "--one-label" in error
    path = tmp_path / "ties.jsonl"
    path.write_text((FIXTURES / "shp.jsonl").read_text(encoding="utf-8").splitlines()[3] + "\n", encoding="utf-8")
    code, _, error = run(capsys, f"shp:{path}", "--out", out)
    assert code == 2 and "ties.jsonl has no usable rows among 1: 1 the scores tie" in error
    code, _, error = run(capsys, one, "--out", out, "--language", "ar", "--validation", 0)
    assert code == 2 and "all 1 rows of the train split are desirable" in error
    assert left_over(tmp_path) == ["ties.jsonl"]


def test_a_folder_with_files_is_not_touched(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    assert run(capsys, *words("shp"), "--out", tmp_path / "set", "--validation", 0)[0] == 0
    before = (tmp_path / "set" / "manifest.json").read_bytes()
    code, _, error = run(capsys, *words("hh-rlhf"), "--out", tmp_path / "set")
    assert code == 2 and "exists already; choose another folder" in error
    assert (tmp_path / "set" / "manifest.json").read_bytes() == before
    (tmp_path / "file").write_text("")
    code, _, error = run(capsys, *words("shp"), "--out", tmp_path / "file" / "set")
    assert code == 2 and "Not a directory" in error or "File exists" in error


def test_a_full_disk_or_an_interrupt_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("prefopt.data.build.run.write_rows", full)
    code, _, error = run(capsys, *words("shp"), "--out", tmp_path / "set", "--validation", 0)
    assert code == 1 and "No space left on device" in error and left_over(tmp_path) == []

    def full_on_reading(*_):
        raise OSError(28, "No space left on device")  # as write() reports it: without a name

    with monkeypatch.context() as patch:
        patch.setattr("prefopt.data.write.Spool.add", full_on_reading)
        code, _, error = run(capsys, *words("shp"), "--out", tmp_path / "set")
    named = f"prefopt: No space left on device: '{tmp_path / 'set'}' (traceback: "
    assert code == 1 and error.splitlines()[-1].startswith(named)
    assert left_over(tmp_path) == []

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("prefopt.data.build.run.write_rows", interrupted)
    code, _, error = run(capsys, *words("shp"), "--out", tmp_path / "set", "--validation", 0)
    assert code == 130 and error == "prefopt: interrupted" and left_over(tmp_path) == []


@pytest.mark.parametrize("error", [HTTPError("Name or service not known"), ConnectionError("no route")])
def test_no_network_is_one_sentence(tmp_path, capsys, monkeypatch, error):
    def dataset_info(*_, **__):
        raise error

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    code, _, text = run(capsys, "someone/rows", "--out", tmp_path / "set")
    assert code == 2
    assert (
        "cannot load someone/rows (split any, revision newest); it is neither a local file nor a dataset that" in text
    )
    assert f" can be fetched: {error}" in text
    assert left_over(tmp_path) == []


def test_a_wrong_revision_is_one_sentence(tmp_path, capsys, monkeypatch):
    class Response:
        headers, request = {}, None

    def dataset_info(*_, **__):
        raise RevisionNotFoundError("404", response=Response())

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    code, _, error = run(capsys, "shp:stanfordnlp/SHP@nowhere", "--out", tmp_path / "set")
    assert code == 2 and "the dataset stanfordnlp/SHP has no revision 'nowhere' on the hub" in error
