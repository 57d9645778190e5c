"""bco_loss against its closed form in Python's arithmetic, and its limits."""

import math

import pytest
import torch
from torch import tensor

from prefopt_kernels.losses import bco_loss
from support.losses import ROWS, assert_within_rounding, inputs, value_and_gradients

BETA, SHIFT = 0.1, 0.4


def exact():
    values, gradients = [], []
    for logp, ref, label in zip(ROWS["logps"], ROWS["ref_logps"], ROWS["labels"], strict=True):
        s = 1 if label else -1
        u = s * (BETA * (logp - ref) - SHIFT)
        values.append(math.log1p(math.exp(-u)))
        gradients.append(-s * BETA / (1 + math.exp(u)))
    return values, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_the_closed_form(dtype):
    loss, gradients = value_and_gradients("bco", inputs("bco", dtype))
    values, slopes = exact()
    assert_within_rounding(loss, values, argument=3.4)
    assert_within_rounding(gradients["logps"], slopes, argument=3.4)


def test_ln_2_where_the_reward_is_the_shift():
    logps, labels = tensor([-5.0, -5.0]), tensor([True, False])
    loss = bco_loss(logps, logps - 4.0, labels, beta=0.25, shift=1.0)
    assert_within_rounding(loss, [math.log(2)] * 2, argument=0)


def test_a_wrong_row_is_pulled_on_at_any_distance():
    logps = tensor([-1e6, 1e6], requires_grad=True)
    loss = bco_loss(logps, torch.zeros(2), tensor([True, False]), beta=0.5, shift=0.0)
    loss.sum().backward()
    assert loss.tolist() == [5e5, 5e5]
    assert logps.grad.tolist() == [-0.5, 0.5]


def test_shift_as_number_scalar_tensor_or_one_per_row():
    tensors = inputs("bco")
    number = bco_loss(**tensors, beta=BETA, shift=SHIFT)
    assert torch.equal(number, bco_loss(**tensors, beta=BETA, shift=tensor(SHIFT)))
    assert torch.equal(number, bco_loss(**tensors, beta=BETA, shift=torch.full((5,), SHIFT)))


def test_shift_is_a_constant_to_the_gradient():
    tensors = inputs("bco")
    logps = tensors.pop("logps").requires_grad_()
    shift = (BETA * (logps - tensors["ref_logps"])).mean()
    loss = bco_loss(logps, **tensors, beta=BETA, shift=shift)
    (through_shift,) = torch.autograd.grad(loss.sum(), shift, allow_unused=True)
    assert through_shift is None
