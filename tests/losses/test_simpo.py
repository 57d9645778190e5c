"""simpo_loss against its closed form in Python's arithmetic, and its target margin."""

import math

import pytest
import torch
from torch import tensor

from prefopt_kernels.losses import cpo_loss, simpo_loss
from support.losses import PAIRS, assert_within_rounding, inputs, value_and_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_the_closed_form(dtype):
    loss, gradients = value_and_gradients("simpo", inputs("simpo", dtype))
    values, chosen, rejected = [], [], []
    names = ("chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths")
    for w, l, T_w, T_l in zip(*(PAIRS[name] for name in names), strict=True):
        x = 2.0 * (w / T_w - l / T_l) - 1.0
        values.append(math.log1p(math.exp(-x)))
        chosen.append(-2.0 / T_w / (1 + math.exp(x)))
        rejected.append(2.0 / T_l / (1 + math.exp(x)))
    # x goes up to 7, as a difference of terms up to 6
    assert_within_rounding(loss, values, argument=14)
    assert_within_rounding(gradients["chosen_logps"], chosen, argument=14)
    assert_within_rounding(gradients["rejected_logps"], rejected, argument=14)


def test_ln_2_at_the_target_margin():
    logps, lengths = tensor([-4.0]), tensor([4])
    loss = simpo_loss(logps, 2 * logps, lengths, lengths, beta=2.0, gamma=2.0)
    assert_within_rounding(loss, [math.log(2)], argument=0)


def test_without_a_target_it_is_cpo_on_means_without_the_likelihood():
    tensors = inputs("simpo")
    means = {
        "chosen_logps": tensors["chosen_logps"] / tensors["chosen_lengths"],
        "rejected_logps": tensors["rejected_logps"] / tensors["rejected_lengths"],
    }
    assert torch.equal(
        simpo_loss(**tensors, beta=2.0, gamma=0.0),
        cpo_loss(**means, chosen_lengths=tensors["chosen_lengths"], beta=2.0, alpha=0.0),
    )


def test_length_alone_does_not_win():
    one, ten = tensor([1]), tensor([10])
    short, long = tensor([-2.0]), tensor([-20.0])
    loss = simpo_loss(short, long, one, ten, beta=2.0, gamma=0.0)
    assert_within_rounding(loss, [math.log(2)], argument=0)
