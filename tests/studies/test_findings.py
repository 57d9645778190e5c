"""Shares, effects, remedies and verdicts on rows with known answers."""

import json
import re
from pathlib import Path

import pytest

from prefopt.errors import UserError
from prefopt.report.statistics import wilson
from studies.bco_stability.findings import cause, cure, effects, price, remedy_cells, variants, verdict
from studies.bco_stability.grid import COMPONENTS, WIDER, Config, Plan, full_plan, remedies_of
from studies.bco_stability.pool import missing, read_lines
from studies.bco_stability.report import markdown, write_report
from studies.bco_stability.table import Share, as_csv, cell_of, paired

EVERY = "+".join(COMPONENTS)


def rows_of(config, outcomes, margin=1.0, accuracy=0.8):
    """A row for each outcome, with the seeds 0, 1, ...; with components, every other one is 0.02 better or worse."""
    wobble = 0.02 if config.components else 0.0
    return [
        config.fields()
        | {
            "seed": seed,
            "steps": 200,
            "outcome": outcome,
            "at": None,
            "ratio": 1.0,
            "accuracy": accuracy + wobble * (-1) ** seed,
            "margin": margin + 0.01 * seed + wobble * (-1) ** seed,
            "versions": "prefopt-kernels 0, torch 0",
            "commit": "0",
        }
        for seed, outcome in enumerate(outcomes)
    ]


def made_up(shift_is_bad=False, ours_fail=0, ours_margin=1.2, ours_accuracy=0.9):
    """A grid in which the weighting (or the shift) makes runs fail, and some remedies help."""
    rows = []
    for components in ((), ("weighting",), ("shift",), ("weighting", "shift"), COMPONENTS):
        bad = "shift" if shift_is_bad else "weighting"
        outcomes = ["not finite"] * 8 + ["stable"] * 4 if bad in components else ["stable"] * 12
        rows += rows_of(Config("naive", components, "bf16", 0.02), outcomes)
    for changes in remedies_of(COMPONENTS):
        fixed = changes == ("safe weighting",) or len(changes) > 1
        rows += rows_of(
            Config("naive", COMPONENTS, "bf16", 0.02, changes),
            ["stable"] * 12 if fixed else ["collapse"] * 8 + ["stable"] * 4,
        )
    for rate in (0.01, 0.02):
        fine = ["spike"] * ours_fail + ["stable"] * (120 - ours_fail)
        rows += rows_of(Config("ours", COMPONENTS, "fp32", rate), fine, ours_margin, ours_accuracy)
        rows += rows_of(Config("ours", (), "fp32", rate), ["spike"] * 3 + ["stable"] * 117, 1.0)
    return rows


def test_share_has_wilsons_interval():
    share = Share(3, 12)
    assert share.interval == wilson(3, 12) and share.share == 0.25
    assert Share(0, 240).words() == "0 of 240 (0 %, 0 to 1.6)"


def test_cells_count_each_outcome_and_take_medians():
    outcomes = ["not finite", "spike", "spike", "collapse", "stable"]
    cell = cell_of(rows_of(Config("ours", (), "fp32", 0.01), outcomes))
    assert cell.outcomes == {"not finite": 1, "spike": 2, "collapse": 1}
    assert cell.unstable == Share(4, 5) and cell.margin == pytest.approx(1.02)


def test_csv_has_a_line_for_each_configuration():
    rows = made_up()
    lines = as_csv(rows).splitlines()
    assert len(lines) == 1 + len({Config.of(row) for row in rows})
    found = [line for line in lines if line.startswith("naive,weighting,bf16")]
    low, high = wilson(8, 12)
    assert found == [f"naive,weighting,bf16,0.02,,12,8,8,0,0,0.6667,{low:.4f},{high:.4f},0.8000,1.0550"]


def test_a_paired_difference_is_over_shared_runs():
    ours = rows_of(Config("ours", COMPONENTS, "fp32", 0.01), ["stable"] * 5, 2.0)
    others = rows_of(Config("ours", (), "fp32", 0.01), ["stable"] * 3, 1.5)
    # 0.52, 0.48 and 0.52: Student's t for two degrees of freedom is 4.30265
    reach = 4.30265 * 0.02 * (4 / 3) ** 0.5 / 3**0.5
    mean = 1.52 / 3
    expected = (mean, mean - reach, mean + reach)
    assert paired(ours, others, "margin") == pytest.approx(expected, abs=1e-6)
    assert paired(ours, rows_of(Config("ours", (), "fp32", 0.02), ["stable"] * 3), "margin") is None


def test_the_cause_is_named():
    first, *rest = effects(made_up())
    assert (first.component, first.word) == ("weighting", "raises it")
    assert first.without == Share(0, 24) and first.with_it == Share(16, 24)
    assert {effect.word for effect in rest} == {"no clear effect"}
    found = " ".join(cause(made_up()))
    assert "raises it most is the weighting: 16 of 24 (67 %, 47 to 82) with it, 0 of 24" in found
    assert "The shift by itself has no clear effect" in found
    assert "Nearest to it comes value + weighting + odds + shift in bf16" in found
    other = " ".join(cause(made_up(shift_is_bad=True)))
    assert "raises it most is the shift" in other and "The shift adds to it" in other


def test_remedies_are_listed_by_whether_they_reach_zero():
    cells = remedy_cells(made_up())["bf16", EVERY]
    assert cells[()].unstable == Share(8, 12)
    (sentence,) = [one for one in cure(made_up()) if one.startswith("Naive form")]
    zero, others = re.fullmatch(r".*Reaches zero: (.*)\. Does not: (.*)\.", sentence).groups()
    names = [re.sub(r" \d.*", "", one) for one in zero.split("; ")]
    assert names == ["safe weighting", "all together"]
    assert len(others.split("; ")) == 6 and "staging 8 of 12" in others


@pytest.mark.parametrize(
    ("made", "tone", "words"),
    [
        ({}, "good", "0 of 240 (0 %, 0 to 1.6) runs were unstable; of plain KTO, 6 of 240"),
        ({"ours_fail": 1}, "bad", "2 of 240"),
        ({"ours_margin": 0.9}, "unclear", "margin on held-out pairs is below KTO's: -0.100"),
        ({"ours_margin": 0.9, "ours_accuracy": 0.7}, "bad", "is below KTO's: -0.100"),
        ({"ours_margin": 1.0}, "good", "is not clearly different from KTO's: +0.000"),
    ],
)
def test_verdict(made, tone, words):
    found, text = verdict(made_up(**made))
    assert found == tone and words in text


def test_the_best_variant_is_the_highest_margin_without_an_unstable_run():
    rows = made_up(ours_margin=0.9)
    for changes, margin, outcome in (
        (("no staging",), 1.1, "stable"),
        (("running mean",), 1.3, "spike"),
        (("win weighting", "loss aversion 1.5"), 1.2, "stable"),
    ):
        config = Config("ours", COMPONENTS, "fp32", 0.02, changes)
        rows += rows_of(config, ["stable"] * 11 + [outcome], margin)
    ranked = [one.changes for one in variants(rows)]
    assert ranked == [
        (),
        ("running mean",),
        ("win weighting", "loss aversion 1.5"),
        ("no staging",),
    ]
    assert variants(rows)[0].cell.unstable == Share(0, 12)  # on the runs that all of them share
    sentence = price(rows)[-1]
    assert "(12 runs each), the one with win weighting and loss aversion 1.5" in sentence
    # 12 differences of 0.18 and 0.22: 2.201 (Student's t) * 0.02 * sqrt(12 / 11) / sqrt(12) = 0.0133
    assert "+0.200 (+0.187 to +0.213) against KTO's" in sentence


def test_a_variant_run_often_enough_gets_its_own_sentence():
    rows = made_up(ours_margin=0.9)
    wide = [Config("ours", COMPONENTS, "fp32", rate, WIDER) for rate in (0.01, 0.02)]
    rows += rows_of(wide[0], ["stable"] * 120, 1.1) + rows_of(wide[1], ["stable"] * 79, 1.1)
    assert len(price(rows)) == 5  # two rates, margin, accuracy, the best variant
    rows += rows_of(wide[1], ["stable"] * 80, 1.1)[-1:]
    assert price(rows)[-1].startswith(
        "In 200 runs, our form with no shift bound and loss aversion 1.5 was unstable in "
        "0 of 200 (0 %, 0 to 1.9). The margin on held-out pairs is above KTO's: +0.100"
    )


def test_few_runs_give_no_verdict():
    rows = [row for row in made_up() if row["seed"] < 12]
    assert verdict(rows)[0] == "unclear"
    assert verdict([row for row in rows if row["form"] == "naive"])[1] == ("The defaults were not run.")


def test_the_report_is_one_page_with_every_plot(tmp_path):
    rows = made_up()
    trace = {"step": [0, 5], "chosen": [0, 1], "rejected": [0, -1], "shift": [0, 0.2], "z0": [0, 0]}
    trace |= {f"share of {name}": [0.2, 0.2] for name in ("kto", *COMPONENTS)}
    traced = [Config(form, COMPONENTS, "bf16", 0.02).fields() | trace for form in ("naive", "ours")]
    for name, lines in (("results.jsonl", rows), ("traces.jsonl", traced)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name).write_text(text, encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert verdict(rows)[1].replace("'", "&#x27;") in page
    assert page.count("<svg") == 4 and "nan" not in page.lower().replace("tversky", "")
    names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert names == {path.stem for path in (tmp_path / "plots").glob("*.svg")}
    assert names == {
        "unstable",
        "remedies-bf16-value-weighting-odds-shift",
        "gradient-shares",
        "rewards-and-shift",
    }
    assert not re.search(r"(?:src|href)=\"(?!#)", page)  # nothing is loaded from elsewhere
    assert (tmp_path / "table.csv").read_text(encoding="utf-8") == as_csv(rows)
    answers = (tmp_path / "answers.md").read_text(encoding="utf-8")
    assert verdict(rows)[1] in answers and all(one in answers for one in cause(rows))
    assert "| weighting, bf16 | 0 of 24 (0 %, 0 to 14) | 16 of 24 (67 %, 47 to 82) | +67" in answers


def test_the_committed_answers_are_those_of_the_committed_rows():
    folder = Path(__file__).parents[2] / "docs" / "bco-stability"
    rows = read_lines(folder / "results.jsonl")
    assert (folder / "answers.md").read_text(encoding="utf-8") == markdown(rows)
    assert (folder / "table.csv").read_text(encoding="utf-8") == as_csv(rows)
    runs = {(Config.of(row), row["seed"]) for row in rows}
    assert len(runs) == len(rows) and {config for config, _ in runs} <= set(full_plan().cells)


# ---------------------------------------------------------------- what is left to run


def test_only_missing_seeds_are_run():
    one, two = Config("ours", (), "fp32", 0.01), Config("naive", (), "fp32", 0.01)
    plan = Plan(200, 10, {one: 54, two: 3}, frozenset())
    tasks = missing(plan, [])
    assert [(config, len(seeds)) for config, seeds in tasks] == [
        (one, 26),
        (one, 26),
        (one, 2),
        (two, 3),
    ]
    rows = rows_of(one, ["stable"] * 30) + rows_of(two, ["spike"] * 3)
    assert missing(plan, rows) == [(one, list(range(30, 54)))]
    assert missing(plan, rows_of(one, ["stable"] * 60) + rows_of(two, ["spike"] * 3)) == []


def test_a_line_cut_short_is_dropped_and_a_broken_one_is_refused(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_bytes(b'{"a":1}\n{"a":2}\n{"a":')
    assert read_lines(file) == [{"a": 1}, {"a": 2}] and file.read_bytes().endswith(b'{"a":')
    assert read_lines(file, mend=True) == [{"a": 1}, {"a": 2}]
    assert file.read_bytes() == b'{"a":1}\n{"a":2}\n'
    file.write_bytes(b'{"a":1}\n{"a":\n{"a":2}\n')
    with pytest.raises(UserError, match=r"results\.jsonl:2 is not JSON"):
        read_lines(file)
