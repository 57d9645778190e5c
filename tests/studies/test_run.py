"""`python -m studies.bco_stability`: the quick run's answers, going on after an interruption, refusals."""

import json
import re

import pytest

from studies.bco_stability.__main__ import main
from studies.bco_stability.findings import remedy_cells
from studies.bco_stability.grid import COMPONENTS, quick_plan, remedies_of
from studies.bco_stability.pool import read_lines
from studies.bco_stability.table import plain, share_of

EVERY = "+".join(COMPONENTS)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """One quick run in two processes: (folder, its rows)."""
    out = tmp_path_factory.mktemp("study") / "out"
    words = ["--quick", "--out", str(out), "--processes", "2"]
    assert main(words) == 0
    return out, read_lines(out / "results.jsonl")


@pytest.mark.slow
def test_quick_run_answers(study):
    out, rows = study
    assert len(rows) == quick_plan().runs()
    assert all(re.fullmatch(r"prefopt-kernels \S+, torch \S+", row["versions"]) for row in rows)
    ours = share_of(row for row in plain(rows, "ours") if row["components"])
    assert (ours.unstable, ours.n) == (0, 12)
    # Six seeds each. In bf16 the sigmoid rounds to 1 within any run, and the plain weighting is not finite there.
    weighting = plain(rows, "naive", components="weighting", precision="bf16")
    assert [row["outcome"] for row in weighting] == ["not finite"] * 6
    cells = remedy_cells(rows)["bf16", "value+weighting+shift"]
    assert cells[()].unstable.unstable >= 2
    for cure in ("safe weighting", "component clip"):
        assert cells[(cure,)].outcomes["not finite"] == 0, cure
    assert cells[remedies_of(("value", "weighting", "shift"))[-1]].unstable.unstable == 0
    assert min(row["accuracy"] for row in plain(rows, "ours", components=EVERY)) > 0.6
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What causes it" in page and page.count("<svg") == 4


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_rows(study, capsys):
    out, rows = study
    file = out / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    # as a kill would leave it: some cells not run, one written by half
    cut = "".join(lines[:-12]) + lines[-12][:40]
    file.write_text(cut, encoding="utf-8")
    assert main(["--quick", "--out", str(out)]) == 0
    again = read_lines(file)
    assert _sorted(again) == _sorted(rows)
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "report.html")


def _sorted(rows):
    return sorted(json.dumps(row | {"commit": ""}, sort_keys=True) for row in rows)


@pytest.mark.slow
def test_a_folder_of_another_study_is_refused(study, capsys):
    assert main(["--full", "--out", str(study[0])]) == 2
    assert "has a study of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "0"], "--processes is 0; expected a number from 1"),
        (["--seeds", "-1"], "--seeds is -1; expected a number from 1"),
        (["--sedes", "1"], x),
    ],
)
def test_wrong_arguments_are_one_message(words, message, capsys, tmp_path):
    assert main(["--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert main(["--out", str(tmp_path)]) == 2
    assert "has files in it that are not a study's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
