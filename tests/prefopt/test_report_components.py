"""The table of components: what is active by the settings in force, and the shares that were logged."""

from pathlib import Path

import pytest

from prefopt.options import in_force
from prefopt.report.components import components, notes, table
from prefopt.report.read import Run


def a_run(logs=(), **options):
    method = options["method"]
    config = options | in_force(options)
    return Run(Path("run"), record={"method": method, "config": config}, logs=list(logs))


def active(run):
    return {one.name for one in components(run) if one.active}


def lines(run):
    head, body = table(run)
    return {line[0]: dict(zip(head, line, strict=True)) for line in body}


def test_the_defaults_of_enhanced_kto():
    run = a_run(method="enhanced_kto")
    assert [one.name for one in components(run)] == [
        "value function",
        "loss aversion",
        "win weighting",
        "decision weighting",
        "odds ratio",
        "BCO's shift",
        "bounds",
    ]
    assert active(run) == {"value function", "loss aversion", "decision weighting", "odds ratio"}
    assert lines(run)["value function"]["setting"] == "alpha 0.88, kappa 0.1"
    assert "share of the gradient" not in lines(run)["odds ratio"]  # nothing was logged


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"alpha": 1.0}, "value function"),
        ({"loss_aversion": 1.0}, "loss aversion"),
        ({"decision_weighting": "off"}, "decision weighting"),
        ({"odds_weight": 0.0}, "odds ratio"),
    ],
)
def test_a_component_that_is_switched_off_is_off(options, name):
    before = active(a_run(method="enhanced_kto"))
    run = a_run(method="enhanced_kto", **options)
    assert active(run) == before - {name}
    assert lines(run)[name]["state"] == "off"


def test_the_shift_with_its_schedule_and_bounds():
    run = a_run(method="enhanced_kto", shift="ema")
    assert {"BCO's shift", "bounds"} <= active(run)
    assert lines(run)["BCO's shift"]["setting"] == (
        "shift ema, shift_decay 0.9; bounded by 0.5 in reward; from 30 % of the steps, "
        "fully after another 10 % of the steps"
    )
    assert lines(run)["bounds"]["setting"] == "main_bound 0.025, odds_bound 0.2"
    plateau = a_run(method="enhanced_kto", shift="window", shift_start="plateau", shift_ramp=0.0)
    assert lines(plateau)["BCO's shift"]["setting"].endswith("from the plateau of the margin, at once")


def test_bco_has_its_shift_alone():
    run = a_run([{"step": 1, "grad/base": 0.6, "grad/shift": 0.4}], method="bco")
    assert list(lines(run)) == ["BCO's loss", "BCO's shift"]
    assert lines(run)["BCO's loss"]["share of the gradient"] == "60.0 %"
    assert lines(run)["BCO's shift"]["setting"] == "shift window; no bound; from the start, at once"
    assert [sentence.split(":")[0] for sentence in notes(run)] == [
        "Share of the gradient",
        "On BCO's shift",
    ]


def test_shares_are_means_of_the_logs_for_active_components():
    logs = [
        {"step": 1, "grad/base": 0.8, "grad/shift": 0.0, "grad/value": 0.1}
        | {"grad/weighting": 0.06, "grad/odds": 0.04},
        {"step": 2, "grad/base": 0.6, "grad/shift": 0.0, "grad/value": 0.3}
        | {"grad/weighting": 0.08, "grad/odds": 0.02},
        {"step": 3, "grad/odds": None},  # what was not finite is null and counts nowhere
    ]
    found = lines(a_run(logs, method="enhanced_kto"))
    assert {name: line["share of the gradient"] for name, line in found.items()} == {
        "KTO": "70.0 %",
        "value function": "20.0 % together",
        "loss aversion": "20.0 % together",
        "win weighting": "",
        "decision weighting": "7.0 %",
        "odds ratio": "3.0 %",
        "BCO's shift": "",
        "bounds": "",
    }
    alone = lines(a_run(logs, method="enhanced_kto", loss_aversion=1.0))
    assert alone["value function"]["share of the gradient"] == "20.0 %"


def test_the_weights_are_a_form_of_loss_aversion():
    run = a_run(method="enhanced_kto", undesirable_weight=1.5)
    (weights,) = [sentence for sentence in notes(run) if "desirable_weight" in sentence]
    assert "(here 1 and 1.5) already are a form of loss aversion" in weights
    assert any("docs/bco-stability.md" in sentence for sentence in notes(run))


@pytest.mark.parametrize("record", [{}, {"method": "kto", "config": {"beta": 0.1}}])
def test_other_methods_have_no_table(record):
    run = Run(Path("run"), record=record)
    assert components(run) == [] and table(run)[1] == [] and notes(run) == []
