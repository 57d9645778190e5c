"""The bounds on each component's pull that the docstring states, the clips, and the split of the gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from prefopt_kernels.losses import (
    EnhancedKTOComponents,
    enhanced_kto_components,
    enhanced_kto_loss,
)
from support.losses import EVERY_COMPONENT, assert_within_rounding, inputs

EPS = torch.finfo(torch.float32).eps
SLACK = 1 + 16 * EPS  # the factors of a bound round once each
H = {None: 0.25, "tversky-kahneman": 0.138, "prelec": 0.173}
EVERYTHING = {"beta": 0.1, "reference_point": 1.5, **EVERY_COMPONENT}


def gradient_of(tensors, **settings):
    leaf = tensors["logps"].clone().requires_grad_()
    loss = enhanced_kto_loss(**(tensors | {"logps": leaf}), **settings)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


log_probabilities = st.one_of(
    st.floats(-1e6, 0, width=32),
    st.floats(-60, 0, width=32),
    st.sampled_from([0.0, -1e-30, -1e-6, -1e-4, -1e6]),
)
weightings = st.sampled_from([None, "tversky-kahneman", "prelec"])
rows = st.lists(
    st.tuples(
        log_probabilities,
        log_probabilities,
        st.booleans(),
        st.sampled_from([1, 2, 50, 5000]),
    ),
    min_size=1,
    max_size=4,
)
main_settings = st.fixed_dictionaries(
    {
        "beta": st.floats(2**-7, 4, width=32),
        "reference_point": st.floats(0, 1e3, width=32),
        "shift": st.floats(-50, 50, width=32),
        "shift_gate": st.floats(0, 1, width=32),
        "loss_aversion": st.floats(0.125, 8, width=32),
        "alpha": st.floats(0.125, 1, width=32),
        "kappa": st.floats(0.03125, 4, width=32),
        "win_weighting": weightings,
        "decision_weighting": weightings,
        "undesirable_weight": st.one_of(st.just(0.0), st.floats(2**-20, 4, width=32)),
    }
)


def packed(rows):
    logps, ref_logps, labels, lengths = zip(*rows, strict=True)
    return {
        "logps": tensor(logps),
        "ref_logps": tensor(ref_logps),
        "labels": tensor(labels),
        "lengths": tensor(lengths),
    }


def weight_of(settings, tensors):
    """(B,) class weight times the largest decision weight, with the default clip."""
    omega = 4.0 if settings["decision_weighting"] is not None else 1.0
    return omega * torch.where(tensors["labels"], 1.0, settings["undesirable_weight"])


@given(rows=rows, settings=main_settings)
def test_the_main_terms_bound(rows, settings):
    tensors = packed(rows)
    loss, gradient = gradient_of(tensors, **settings)
    largest = settings["beta"] * max(1, settings["loss_aversion"]) * H[settings["win_weighting"]]
    bound = weight_of(settings, tensors) * largest
    assert (gradient.abs() <= bound * SLACK).all()
    # the value: 1 - W(1/2) + lambda W(1/2) at most, since W(1/2) < 1
    assert loss.isfinite().all() and (loss >= 0).all()
    assert (loss <= weight_of(settings, tensors) * (1 + settings["loss_aversion"]) * SLACK).all()


@given(rows=rows, b=st.floats(-8, 8, width=32), odds_weight=st.floats(2**-7, 4, width=32))
def test_the_odds_terms_bound(rows, b, odds_weight):
    tensors = packed(rows)
    settings = {"beta": 0.1, "reference_point": 0.0, "odds_baseline": b}
    off = {"desirable_weight": 0.0, "undesirable_weight": 0.0}  # of the main term
    loss, gradient = gradient_of(tensors, **settings, odds_weight=odds_weight, **off)
    assert loss.isfinite().all() and (loss >= 0).all()
    T = tensors["lengths"]
    m = (tensors["logps"] / T).double()
    steepest = (-1 / torch.expm1(m.clamp(max=-1e-4))).float()
    bound = odds_weight / T * torch.where(tensors["labels"], max(1.0, math.exp(b)), steepest)
    # odds are exponentials of numbers up to 8 + 10, whose own rounding they multiply
    assert (gradient.abs() <= bound * (1 + 32 * EPS)).all()


@given(
    rows=rows,
    settings=main_settings,
    main_bound=st.floats(2**-10, 1, width=32),
    odds_bound=st.floats(2**-10, 4, width=32),
)
def test_clips_bound_the_gradient_and_leave_the_value(rows, settings, main_bound, odds_bound):
    tensors = packed(rows)
    odds = {"odds_weight": 0.5, "odds_baseline": 1.0}
    free, _ = gradient_of(tensors, **settings, **odds)
    loss, _ = gradient_of(tensors, **settings, **odds, main_bound=main_bound, odds_bound=odds_bound)
    assert torch.equal(loss, free)
    _, main = gradient_of(tensors, **settings, main_bound=main_bound)
    # torch's derivative of a sigmoid takes 1 - s from an s near 1: eps of the factors before it
    factors = weight_of(settings, tensors) * settings["beta"] * max(1, settings["loss_aversion"])
    assert (main.abs() <= main_bound * SLACK + 2 * EPS * factors).all()
    without_main = settings | {"desirable_weight": 0.0, "undesirable_weight": 0.0}
    _, odds_only = gradient_of(tensors, **without_main, **odds, odds_bound=odds_bound)
    assert (odds_only.abs() <= odds_bound / tensors["lengths"] * SLACK).all()


def test_a_clip_takes_exactly_what_is_above_it():
    tensors = inputs("enhanced_kto", torch.float64)
    _, free = gradient_of(tensors, **EVERYTHING | {"odds_weight": 0.0})
    bound = free.abs().median().item()
    _, clipped = gradient_of(tensors, **EVERYTHING | {"odds_weight": 0.0}, main_bound=bound)
    exact = free.clamp(-bound, bound)
    assert (exact != free).sum() == 2  # of five rows two are above the median
    assert_within_rounding(clipped, exact, argument=8)
    # nothing that is below its bound changes a bit
    assert torch.equal(clipped[exact == free], free[exact == free])


def test_a_clip_does_not_depend_on_the_reduction():
    tensors = inputs("enhanced_kto", torch.float64)
    settings = EVERYTHING | {"main_bound": 0.01, "odds_bound": 0.05}
    _, of_sum = gradient_of(tensors, **settings)
    leaf = tensors["logps"].clone().requires_grad_()
    loss = enhanced_kto_loss(**(tensors | {"logps": leaf}), **settings).mean() * 1024
    (of_mean,) = torch.autograd.grad(loss, leaf)
    assert_within_rounding(of_mean, of_sum * 1024 / 5, argument=0)


def test_gradcheck_where_the_clips_do_not_bite():
    tensors = inputs("enhanced_kto", torch.float64)
    settings = EVERYTHING | {"decision_weighting": None, "main_bound": 1.0, "odds_bound": 1e3}
    tensors["logps"][2] -= 0.5  # off the kink at u = 0
    leaf = tensors.pop("logps").requires_grad_()
    assert torch.autograd.gradcheck(lambda logps: enhanced_kto_loss(logps, **tensors, **settings), leaf)


def test_works_under_torch_func():
    tensors = inputs("enhanced_kto", torch.float64)
    settings = EVERYTHING | {"main_bound": 0.01, "odds_bound": 0.05}
    _, exact = gradient_of(tensors, **settings)
    logps = tensors.pop("logps")
    gradient = torch.func.grad(lambda x: enhanced_kto_loss(x, **tensors, **settings).sum())
    assert torch.equal(gradient(logps), exact)


@pytest.mark.parametrize("clips", [{}, {"main_bound": 0.01, "odds_bound": 0.05}])
def test_components_sum_to_the_gradient(clips):
    tensors = inputs("enhanced_kto", torch.float64)
    _, gradient = gradient_of(tensors, **EVERYTHING, **clips)
    with torch.no_grad():
        parts = enhanced_kto_components(**tensors, **EVERYTHING, **clips)
    assert all(part.any() and not part.requires_grad for part in parts)
    # five differences of gradients of up to beta * 2.25
    assert_within_rounding(sum(parts), gradient, argument=0, largest=5 * 0.225)


@pytest.mark.parametrize(
    ("field", "setting"),
    [
        ("shift", {"shift": 0.4, "shift_gate": 0.5}),
        ("value", {"loss_aversion": 2.25}),
        ("value", {"alpha": 0.88}),
        ("weighting", {"win_weighting": "prelec"}),
        ("weighting", {"decision_weighting": "tversky-kahneman"}),
        ("odds", {"odds_weight": 0.1}),
    ],
)
def test_a_component_is_what_its_setting_adds(field, setting):
    tensors = inputs("enhanced_kto")
    base = {"beta": 0.1, "reference_point": 1.5}
    parts = enhanced_kto_components(**tensors, **base, **setting)
    _, kto = gradient_of(tensors, **base)
    _, whole = gradient_of(tensors, **base, **setting)
    assert torch.equal(parts.kto, kto)
    assert torch.equal(getattr(parts, field), whole - kto)
    for other in set(EnhancedKTOComponents._fields) - {"kto", field}:
        assert not getattr(parts, other).any(), other


def test_components_of_an_unknown_setting():
    with pytest.raises(TypeError, match="unexpected keyword argument 'loss_aversoin'"):
        enhanced_kto_components(**inputs("enhanced_kto"), beta=0.1, reference_point=0.0, loss_aversoin=2.0)
