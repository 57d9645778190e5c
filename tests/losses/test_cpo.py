"""cpo_loss against its closed form in Python's arithmetic, and the way to TRL's normalisation."""

import math

import pytest
import torch

from prefopt_kernels.losses import cpo_loss, dpo_loss
from support.losses import PAIRS, assert_within_rounding, inputs, value_and_gradients

BETA, ALPHA = 0.1, 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_the_closed_form(dtype):
    loss, gradients = value_and_gradients("cpo", inputs("cpo", dtype))
    values, chosen, rejected = [], [], []
    names = ("chosen_logps", "rejected_logps", "chosen_lengths")
    for w, l, T in zip(*(PAIRS[name] for name in names), strict=True):
        x = BETA * (w - l)
        values.append(math.log1p(math.exp(-x)) - ALPHA * w / T)
        chosen.append(-BETA / (1 + math.exp(x)) - ALPHA / T)
        rejected.append(BETA / (1 + math.exp(x)))
    assert_within_rounding(loss, values, argument=3)
    assert_within_rounding(gradients["chosen_logps"], chosen, argument=3)
    assert_within_rounding(gradients["rejected_logps"], rejected, argument=3)


def test_without_the_likelihood_it_is_dpo_against_a_uniform_reference():
    tensors = inputs("cpo")
    uniform = torch.full((5,), -64.0)
    logps = {key: tensors[key] for key in ("chosen_logps", "rejected_logps")}
    assert torch.equal(
        cpo_loss(**tensors, beta=BETA, alpha=0.0),
        dpo_loss(**logps, ref_chosen_logps=uniform, ref_rejected_logps=uniform, beta=BETA),
    )


def test_the_docstrings_way_to_a_mean_over_the_batchs_tokens():
    tensors = inputs("cpo", torch.float64)
    logps, lengths = tensors["chosen_logps"], tensors["chosen_lengths"]
    mean = cpo_loss(**tensors, beta=BETA, alpha=0.0).mean() + ALPHA * (-logps.sum() / lengths.sum())
    # the same by weighing the rows, as a reduction over rows has to
    weights = lengths / lengths.double().mean()
    rows = cpo_loss(**tensors, beta=BETA, alpha=0.0) + ALPHA * weights * (-logps / lengths)
    assert_within_rounding(rows.mean(), mean, argument=3)
    assert cpo_loss(**tensors, beta=BETA, alpha=ALPHA).mean() != pytest.approx(mean.item(), rel=0.1)
