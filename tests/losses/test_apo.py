"""apo_zero_loss: its own formula, and KTO with the reference point at 0."""

import math

import pytest
import torch
from torch import tensor

from prefopt_kernels.losses import apo_zero_loss, kto_loss

LOGPS = tensor([-10.0, -42.5, -7.25, -300.0])
REF_LOGPS = tensor([-12.0, -40.0, -7.25, -280.0])
LABELS = tensor([True, False, False, True])


def test_equals_the_papers_formula():
    loss = apo_zero_loss(LOGPS, REF_LOGPS, LABELS, beta=0.1, desirable_weight=2.0, undesirable_weight=0.5)
    # 1 - sigmoid(0.1 r) where desirable, sigmoid(0.1 r) where not; r = 2, -2.5, 0, -20
    exact = [
        2.0 / (1 + math.exp(0.2)),
        0.5 / (1 + math.exp(0.25)),
        0.5 / 2,
        2.0 / (1 + math.exp(-2.0)),
    ]
    # six roundings, and those of u (|u| <= 2) once more
    rtol = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(loss, tensor(exact), rtol=rtol, atol=0)


def test_is_kto_with_reference_point_zero_bit_for_bit():
    arguments = {"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    gradients = []
    for loss, extra in ((apo_zero_loss, {}), (kto_loss, {"reference_point": 0.0})):
        logps = LOGPS.clone().requires_grad_()
        value = loss(logps, REF_LOGPS, LABELS, **arguments, **extra)
        value.sum().backward()
        gradients.append((value.detach(), logps.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_half_the_weight_where_policy_and_reference_agree():
    loss = apo_zero_loss(LOGPS, LOGPS, LABELS, beta=0.1, desirable_weight=4.0)
    assert loss.tolist() == [2.0, 0.5, 0.5, 2.0]


def test_gradcheck():
    logps, ref_logps = LOGPS.double().requires_grad_(), REF_LOGPS.double()
    assert torch.autograd.gradcheck(lambda logps: apo_zero_loss(logps, ref_logps, LABELS, beta=0.2), logps)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="^beta is 0; expected a finite number above 0"):
        apo_zero_loss(LOGPS, REF_LOGPS, LABELS, beta=0)
    with pytest.raises(ValueError, match="^undesirable_weight is -1"):
        apo_zero_loss(LOGPS, REF_LOGPS, LABELS, beta=0.1, undesirable_weight=-1)
