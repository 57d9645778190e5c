"""orpo_loss against its closed form in Python's arithmetic, and near probability 1."""

import math

import pytest
import torch
from torch import tensor

from prefopt_kernels.losses import orpo_loss
from support.losses import PAIRS, assert_within_rounding, inputs, value_and_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_the_closed_form(dtype):
    loss, gradients = value_and_gradients("orpo", inputs("orpo", dtype))
    values, chosen, rejected = [], [], []
    names = ("chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths")
    for w, l, T_w, T_l in zip(*(PAIRS[name] for name in names), strict=True):
        p_w, p_l = math.exp(w / T_w), math.exp(l / T_l)
        ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
        values.append(-w / T_w + 0.5 * math.log1p(1 / ratio))
        chosen.append(-(1 + 0.5 / (1 + ratio) / (1 - p_w)) / T_w)
        rejected.append(0.5 / (1 + ratio) / (1 - p_l) / T_l)
    # log-odds are sums of terms up to 3
    assert_within_rounding(loss, values, argument=9)
    assert_within_rounding(gradients["chosen_logps"], chosen, argument=9)
    assert_within_rounding(gradients["rejected_logps"], rejected, argument=9)


def test_probability_one_is_finite_and_still_pushed_down():
    # plain log-odds are infinite at m = 0, and their difference is NaN where both are
    logps, lengths = tensor([0.0, -1.0], requires_grad=True), tensor([1, 1])
    rejected = torch.zeros(2, requires_grad=True)
    loss = orpo_loss(logps, rejected, lengths, lengths, odds_weight=1.0)
    loss.sum().backward()
    assert loss.isfinite().all() and logps.grad.isfinite().all()
    assert_within_rounding(loss[0], math.log(2), argument=0)
    assert (rejected.grad > 1000).all()


def test_log_odds_go_on_along_their_tangent():
    m = tensor([-1e-4], dtype=torch.float64)
    settings = {"rejected_lengths": tensor([1]), "chosen_lengths": tensor([1]), "odds_weight": 1.0}
    other = torch.full_like(m, -5e-5)

    def odds_term(m):
        return orpo_loss(m, other, **settings) + m  # less the likelihood

    # one slope, 1 / (1 - exp(-1e-4)), from -1e-4 to 0: log(exp(odds term) - 1) = o_l - o_w is linear there
    slope = 1 / -math.expm1(-1e-4)
    for step in (2.5e-5, 1e-4):
        before, after = (torch.log(torch.expm1(odds_term(x))) for x in (m, m + step))
        assert_within_rounding(before - after, [slope * step], argument=10, largest=10)


def test_no_weight_is_the_likelihood():
    tensors = inputs("orpo")
    loss = orpo_loss(**tensors, odds_weight=0.0)
    assert torch.equal(loss, -tensors["chosen_logps"] / tensors["chosen_lengths"])
