"""ipo_loss against its closed form in Python's arithmetic, and its target."""

import pytest
import torch
from torch import tensor

from prefopt_kernels.losses import ipo_loss
from support.losses import PAIRS, assert_within_rounding, inputs, value_and_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_the_closed_form(dtype):
    loss, gradients = value_and_gradients("ipo", inputs("ipo", dtype))
    values, chosen, rejected = [], [], []
    for w, l, ref_w, ref_l, T_w, T_l in zip(*PAIRS.values(), strict=True):
        distance = (w - ref_w) / T_w - (l - ref_l) / T_l - 5.0  # 1 / (2 * 0.1)
        values.append(distance**2)
        chosen.append(2 * distance / T_w)
        rejected.append(-2 * distance / T_l)
    # terms go up to 30, the distance up to 25 + .94
    assert_within_rounding(loss, values, argument=0, largest=2 * 26 * 30)
    assert_within_rounding(gradients["chosen_logps"], chosen, argument=0, largest=2 * 30)
    assert_within_rounding(gradients["rejected_logps"], rejected, argument=0, largest=2 * 30)


def test_at_rest_at_its_target():
    chosen = tensor([20.0], requires_grad=True)
    zero, lengths = torch.zeros(1), tensor([4])
    loss = ipo_loss(chosen, zero, zero, zero, lengths, lengths, beta=0.1)  # 20 / 4 = 1 / (2 * 0.1)
    loss.backward()
    assert loss.item() == 0 and chosen.grad.item() == 0


def test_divides_by_the_tokens_also_where_policy_and_reference_agree():
    # a mean over the tokens whose log-ratio is not 0 would be 0 / 0 here
    tensors = inputs("ipo")
    tensors["ref_chosen_logps"] = tensors["chosen_logps"]
    tensors["ref_rejected_logps"] = tensors["rejected_logps"]
    assert ipo_loss(**tensors, beta=0.5).tolist() == [1.0] * 5


def test_a_sequence_without_tokens_counts_as_one():
    zero, none, one = torch.zeros(1), tensor([0]), tensor([1])
    half = tensor([0.5])
    assert torch.equal(
        ipo_loss(half, zero, zero, zero, none, none, beta=0.5),
        ipo_loss(half, zero, zero, zero, one, one, beta=0.5),
    )
