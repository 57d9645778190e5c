"""`python -m studies.bco_stability`: a small plan's answers, continuing after an interruption, and refusals."""

import json
import re

import pytest

from prefopt.files import only_writer
from studies.bco_stability.__main__ import main, run_study
from studies.bco_stability.findings import remedy_cells
from studies.bco_stability.grid import COMPONENTS, Config, Plan, quick_plan, remedies_of
from studies.bco_stability.pool import read_lines
from studies.bco_stability.table import plain, share_of

NAIVE = ("value", "weighting", "shift")
RATE, SEEDS = 0.02, 2


def small_plan():
    """A few cells of the quick plan, with its number of steps."""
    cells = [Config("ours", COMPONENTS, precision, RATE) for precision in ("fp32", "bf16")]
    cells += [Config("ours", (), "fp32", RATE), Config("naive", ("weighting",), "bf16", RATE)]
    cells += [
        Config("naive", NAIVE, "bf16", RATE, changes)
        for changes in ((), ("safe weighting",), ("component clip",), remedies_of(NAIVE)[-1])
    ]
    quick = quick_plan()
    assert set(cells) <= set(quick.cells)
    traced = frozenset(cells[1:2])
    return Plan(quick.steps, quick.pretraining_steps, dict.fromkeys(cells, SEEDS), traced)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """One run in two processes: (folder, its rows)."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert run_study(small_plan(), out, processes=2) == out / "report.html"
    return out, read_lines(out / "results.jsonl")


@pytest.mark.slow
def test_answers(study):
    out, rows = study
    assert len(rows) == small_plan().runs()
    assert all(re.fullmatch(r"prefopt-kernels \S+, torch \S+", row["versions"]) for row in rows)
    assert share_of(row for row in plain(rows, "ours") if row["components"]).unstable == 0
    # In bf16 the sigmoid rounds to 1 within any run, where the plain weighting has no finite gradient.
    weighting = plain(rows, "naive", components="weighting", precision="bf16")
    assert [row["outcome"] for row in weighting] == ["not finite"] * SEEDS
    cells = remedy_cells(rows)["bf16", "+".join(NAIVE)]
    assert cells[()].unstable.unstable >= 1
    for cure in ("safe weighting", "component clip"):
        assert cells[(cure,)].outcomes["not finite"] == 0, cure
    assert cells[remedies_of(NAIVE)[-1]].unstable.unstable == 0
    assert min(row["accuracy"] for row in plain(rows, "ours", components="+".join(COMPONENTS))) > 0.6
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What causes it" in page and page.count("<svg") == 4


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_rows(study):
    out, rows = study
    file = out / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    # as after a kill: two cells are missing, one line is incomplete
    file.write_text("".join(lines[: -2 * SEEDS]) + lines[-2 * SEEDS][:40], encoding="utf-8")
    run_study(small_plan(), out)
    assert _sorted(read_lines(file)) == _sorted(rows)


def _sorted(rows):
    return sorted(json.dumps(row | {"commit": ""}, sort_keys=True) for row in rows)


@pytest.mark.slow
def test_a_folder_of_other_settings_is_refused(study, capsys):
    assert main(["--full", "--out", str(study[0])]) == 2
    assert "has a study of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "0"], "--processes is 0; expected 1 or more"),
        (["--seeds", "-1"], "--seeds is -1; expected 1 or more"),
        (["--sedes", "1"], "unrecognized arguments: --sedes 1"),
        (["--quick", "--full"], "not allowed with argument --quick"),
    ],
)
def test_wrong_arguments_are_named(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "out"), *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert main(["--out", str(tmp_path)]) == 2
    assert "has files in it that are not a study's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_is_being_written_is_refused(tmp_path, capsys):
    with only_writer(tmp_path / "out", "--out"):
        assert main(["--out", str(tmp_path / "out")]) == 2
    assert "is being written by" in capsys.readouterr().err
