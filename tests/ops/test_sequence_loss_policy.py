"""The comparison of sequence_loss with fp64 finds planted bugs, and its truth and its rows are good ones."""

import math
from dataclasses import replace

import pytest
import torch

from prefopt_kernels.losses import (
    decision_weights,
)
from prefopt_kernels.modules import sequence_logps
from support.sequence_loss import (
    BETA,
    ENHANCED,
    SETTINGS,
    TK,
    check,
    formula,
    ours,
    problem,
)

BUGS = {
    "a token lost": lambda r: with_logps(r, 1e-3),
    "a sum rounded to bf16": lambda r: r._replace(logps=r.logps.bfloat16().float()),
    "a row unwritten": lambda r: with_row(r, "losses", math.nan),
    "a loss of another row": lambda r: r._replace(losses=r.losses.roll(1)),
    "beta forgotten": lambda r: r._replace(rewards=r.log_ratios),
    "classes swapped": lambda r: r._replace(sums=r.sums.roll(4)),
    "a mean for a sum": lambda r: r._replace(sums=r.sums / 60),
}


def with_logps(out, by):
    logps = out.logps.clone()
    logps[5] += by
    return out._replace(logps=logps)


def with_row(out, name, value):
    changed = getattr(out, name).clone()
    changed[7] = value
    return out._replace(**{name: changed})


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug):
    made, settings = problem(), SETTINGS["everything"]
    right = ours(made, settings, "reference")
    check(made, settings, right)
    with pytest.raises(AssertionError):
        check(made, settings, replace(right, outputs=BUGS[bug](right.outputs)))


FORGOTTEN = {
    "loss_aversion": 1.0,
    "alpha": 1.0,
    "shift": 0.0,
    "shift_gate": 1.0,
    "win_weighting": "prelec",
    "decision_weighting": None,
    "odds_weight": 0.0,
    "odds_baseline": 0.0,
    "main_bound": 1.0,
    "odds_bound": 1.0,
    "undesirable_weight": 1.0,
    "reference_point": 0.0,
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_forgotten_component_is_found(name):
    made, settings = problem(), SETTINGS["everything"]
    wrong = ours(made, settings | {name: FORGOTTEN[name]}, "reference")
    with pytest.raises(AssertionError):
        check(made, settings, wrong)


def test_a_gradient_from_the_wrong_tokens_is_found():
    made, settings = problem(), SETTINGS["everything"]
    right = ours(made, settings, "reference")
    with pytest.raises(AssertionError, match="dlogp"):
        check(made, settings, replace(right, dlogp=right.dlogp.roll(1)))


def test_slopes_of_the_truth_agree_with_finite_differences():
    """The truth's derivative is autograd's; decision weights, which it takes for constants, are off."""
    made = problem(7)
    for case in ENHANCED:
        settings = SETTINGS[case] | {"decision_weighting": None}
        settings |= {"main_bound": math.inf, "odds_bound": math.inf}
        rows = (made.labels, made.lengths)
        logps = sequence_logps(made.logp, made.cu_seqlens).double()
        ref = made.ref_logps.double()
        step = 1e-5
        up, down = (formula(logps + h, ref, *rows, **settings)["losses"] for h in (step, -step))
        slopes = formula(logps, ref, *rows, **settings)["slopes"]
        # third derivatives are below 10 here: an error of step^2, and 1e-16 / step of rounding
        torch.testing.assert_close((up - down) / (2 * step), slopes, rtol=0, atol=1e-8)


def test_the_problem_reaches_both_sides_of_every_branch():
    made, settings = problem(), SETTINGS["everything"]
    out = ours(made, settings, "reference").outputs
    u = torch.where(made.labels, 1, -1) * (out.rewards - BETA * 0.75 - 0.2)
    assert (u > 0.5).sum() > 5 and (u < -0.5).sum() > 5
    assert 20 < made.labels.sum() < 40
    omega = decision_weights(out.logps, made.lengths, weighting=TK, clip=(1e-9, 1e9))
    assert (omega < 1).sum() > 5 and ((omega > 1) & (omega < 2)).sum() > 5 and (omega > 2).any()
    mean = (out.logps / made.lengths).double()
    assert mean.max() < -1e-3, "beyond it the textbook's log-odds are not ours"
