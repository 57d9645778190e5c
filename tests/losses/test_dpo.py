"""dpo_loss, plain, smoothed and robust, against the closed forms in Python's arithmetic, and their optima."""

import math

import pytest
import torch
from torch import tensor

from prefopt_kernels.losses import dpo_loss
from support.losses import PAIRS, assert_within_rounding, inputs, value_and_gradients

BETA, EPSILON = 0.1, 0.2


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def margins():
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    for w, l, ref_w, ref_l in zip(*(PAIRS[name] for name in names), strict=True):
        yield BETA * ((w - ref_w) - (l - ref_l))


EXACT = {
    "dpo": (lambda x: -log_sigmoid(x), lambda x: -BETA * sigmoid(-x)),
    "dpo smoothed": (
        lambda x: -(1 - EPSILON) * log_sigmoid(x) - EPSILON * log_sigmoid(-x),
        lambda x: -BETA * (sigmoid(-x) - EPSILON),
    ),
    "dpo robust": (
        lambda x: (-(1 - EPSILON) * log_sigmoid(x) + EPSILON * log_sigmoid(-x)) / (1 - 2 * EPSILON),
        lambda x: -BETA * ((1 - EPSILON) * sigmoid(-x) + EPSILON * sigmoid(x)) / (1 - 2 * EPSILON),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXACT)
def test_value_and_gradient_are_the_closed_form(name, dtype):
    loss, gradients = value_and_gradients(name, inputs(name, dtype))
    value, slope = EXACT[name]
    # x goes up to 3.1 and either logarithm up to that and a little
    assert_within_rounding(loss, [value(x) for x in margins()], argument=3.1, largest=4)
    slopes = tensor([slope(x) for x in margins()], dtype=torch.float64)
    assert_within_rounding(gradients["chosen_logps"], slopes, argument=3.1, largest=2 * BETA)
    assert_within_rounding(gradients["rejected_logps"], -slopes, argument=3.1, largest=2 * BETA)


def test_ln_2_where_policy_and_reference_agree():
    chosen, rejected = tensor([-10.0, -20.0]), tensor([-15.0, -3.0])
    loss = dpo_loss(chosen, rejected, chosen, rejected, beta=0.3)
    assert_within_rounding(loss, [math.log(2)] * 2, argument=0)


def test_smoothing_is_at_rest_at_its_optimum_and_the_robust_form_is_not():
    # sigmoid(-x) = epsilon at x = log((1 - epsilon) / epsilon) = log 4
    zero = torch.zeros(1, dtype=torch.float64)
    chosen = torch.full_like(zero, math.log(4) / BETA).requires_grad_()
    settings = {"beta": BETA, "label_smoothing": EPSILON}
    (smoothed,) = torch.autograd.grad(dpo_loss(chosen, zero, zero, zero, **settings), chosen)
    (robust,) = torch.autograd.grad(dpo_loss(chosen, zero, zero, zero, robust=True, **settings), chosen)
    assert_within_rounding(smoothed, [0.0], argument=2, largest=BETA)
    assert_within_rounding(robust, [-BETA * 0.32 / 0.6], argument=2, largest=BETA)


def test_the_robust_form_never_lets_go():
    zero = torch.zeros(1, dtype=torch.float64)
    chosen = torch.full_like(zero, 1e6).requires_grad_()
    loss = dpo_loss(chosen, zero, zero, zero, beta=BETA, label_smoothing=EPSILON, robust=True)
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert_within_rounding(gradient, [-EPSILON * BETA / (1 - 2 * EPSILON)], argument=0)


def test_robust_is_unbiased_under_flipped_labels():
    tensors = inputs("dpo", torch.float64)
    flipped = {
        "chosen_logps": tensors["rejected_logps"],
        "rejected_logps": tensors["chosen_logps"],
        "ref_chosen_logps": tensors["ref_rejected_logps"],
        "ref_rejected_logps": tensors["ref_chosen_logps"],
    }
    settings = {"beta": BETA, "label_smoothing": EPSILON, "robust": True}
    seen = (1 - EPSILON) * dpo_loss(**tensors, **settings)
    seen += EPSILON * dpo_loss(**flipped, **settings)
    assert_within_rounding(seen, dpo_loss(**tensors, beta=BETA), argument=3.1, largest=4)


def test_without_smoothing_robust_is_dpo():
    tensors = inputs("dpo")
    assert torch.equal(dpo_loss(**tensors, beta=BETA, robust=True), dpo_loss(**tensors, beta=BETA))


def test_only_the_difference_counts():
    tensors = inputs("dpo")
    lower = tensors | {key: tensors[key] - 8 for key in ("chosen_logps", "rejected_logps")}
    assert torch.equal(dpo_loss(**lower, beta=BETA), dpo_loss(**tensors, beta=BETA))
