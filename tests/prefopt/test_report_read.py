"""Run folders in every state: what is broken becomes a sentence, and the rest is read."""

import json
import math

import pytest

from prefopt.report.read import read_run


def folder(tmp_path, **files):
    """A run folder with the given texts; the name's last underscore stands for a dot."""
    for name, text in files.items():
        file = tmp_path / ".".join(name.rsplit("_", 1))
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return tmp_path


def test_a_whole_run_gives_no_notes(tmp_path):
    logs = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}, {"step": 2, "eval_loss": 0.3}]
    run = read_run(
        folder(
            tmp_path,
            run_json='{"method": "kto"}',
            metrics_jsonl="".join(json.dumps(log) + "\n" for log in logs),
        )
    )
    assert run.notes == []
    assert run.series("loss") == [(1.0, 0.5), (2.0, 0.25)]
    assert run.series("eval_loss") == [(2.0, 0.3)]
    assert run.last("loss") == 0.25 and run.last("kl") is None


def test_no_folder_and_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither run\.json nor metrics\.jsonl"):
        read_run(tmp_path)


def test_no_metrics_is_one_note(tmp_path):
    run = read_run(folder(tmp_path, run_json="{}"))
    assert run.logs == []
    assert len(run.notes) == 1 and "There is no metrics.jsonl" in run.notes[0]


def test_half_a_last_line(tmp_path):
    text = '{"step": 1, "loss": 0.5}\n{"step": 2, "lo'
    run = read_run(folder(tmp_path, run_json="{}", metrics_jsonl=text))
    assert run.series("loss") == [(1.0, 0.5)]
    assert run.notes == ["The last line of metrics.jsonl was only half written and was left out."]


def test_broken_lines_within(tmp_path):
    text = '{"step": 1, "loss": 0.5}\n[1]\noops\n\n{"step": 2, "loss": 0.4}\n'
    run = read_run(folder(tmp_path, run_json="{}", metrics_jsonl=text))
    assert run.finite("loss") == [0.5, 0.4]
    assert run.notes == ["2 lines of metrics.jsonl (first: 2) cannot be read and were left out."]


def test_values_that_are_not_finite_or_not_numbers(tmp_path):
    text = (
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n'
        '{"step": 3, "loss": 0.4}\n{"step": 4, "loss": true}\n{"step": 5, "loss": "0.1"}\n'
    )
    run = read_run(folder(tmp_path, run_json="{}", metrics_jsonl=text))
    assert [step for step, _ in run.series("loss")] == [1.0, 2.0, 3.0]
    assert math.isnan(run.series("loss")[0][1])
    assert run.finite("loss") == [0.4]
    assert len(run.notes) == 1 and "2 logged values are not finite" in run.notes[0]


def test_a_text_with_a_unicode_line_break_is_one_line(tmp_path):
    line = json.dumps({"file": "a", "line": 1, "reason": "x\u2028y"}, ensure_ascii=False)
    run = read_run(folder(tmp_path, run_json="{}", metrics_jsonl="", bad_rows_jsonl=line + "\n"))
    assert run.bad_rows == [{"file": "a", "line": 1, "reason": "x\u2028y"}]


@pytest.mark.parametrize(
    ("name", "text", "note"),
    [
        ("run_json", "{", "run.json is not valid JSON and was left out."),
        ("run_json", "[]", "run.json is not a JSON object and was left out."),
        ("samples_json", "{}", "samples.json is not a list of samples and was left out."),
        (
            "samples_json",
            '[{"prompt": "a", "before": "b", "after": "c"}, {"prompt": "a", "before": 1}, 7]',
            "2 of 3 samples in samples.json lack a text and were left out.",
        ),
        ("summary_json", b"\xff\xfe", "summary.json is not valid JSON and was left out."),
    ],
)
def test_a_broken_file_is_left_out_and_named(tmp_path, name, text, note):
    files = {"run_json": "{}", "metrics_jsonl": '{"step": 1, "loss": 0.5}\n'} | {name: text}
    run = read_run(folder(tmp_path, **files))
    assert run.notes == [note]
    assert run.finite("loss") == [0.5]
