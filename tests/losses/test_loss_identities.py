"""How the losses are related: each identity ties two functions, or two parts of one, to each other."""

import math

import pytest
import torch
from torch import tensor

from prefopt_kernels.losses import (
    bco_loss,
    cpo_loss,
    dpo_loss,
    enhanced_kto_loss,
    kto_loss,
    orpo_loss,
    sft_loss,
)
from support.losses import LENGTHS, assert_within_rounding, inputs, value_and_gradients

FP64 = torch.float64


def test_kto_with_reference_point_zero_is_apo_zero():
    apo, apo_gradients = value_and_gradients("apo_zero", inputs("apo_zero"))
    kto, kto_gradients = value_and_gradients("kto", inputs("kto"), reference_point=0.0)
    assert torch.equal(apo, kto)
    assert torch.equal(apo_gradients["logps"], kto_gradients["logps"])


def test_bcos_gradient_is_ktos_over_the_probability_of_the_right_side():
    tensors = inputs("kto", FP64)
    _, kto = value_and_gradients("kto", tensors, reference_point=4.0)
    _, bco = value_and_gradients("bco", tensors, shift=0.4)  # 0.1 * 4
    u = 0.1 * (tensors["logps"] - tensors["ref_logps"] - 4.0)
    u = torch.where(tensors["labels"], u, -u)
    assert_within_rounding(bco["logps"] * torch.sigmoid(u), kto["logps"], argument=3.5)


def test_dpos_gradient_is_bcos_with_the_other_sides_reward_as_the_shift():
    tensors = inputs("dpo", FP64)
    _, dpo = value_and_gradients("dpo", tensors)
    for side, other, label in (("chosen", "rejected", True), ("rejected", "chosen", False)):
        logps = tensors[f"{side}_logps"].clone().requires_grad_()
        reward = 0.1 * (tensors[f"{other}_logps"] - tensors[f"ref_{other}_logps"])
        labels = torch.full((5,), label)
        loss = bco_loss(logps, tensors[f"ref_{side}_logps"], labels, beta=0.1, shift=reward)
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        assert_within_rounding(dpo[f"{side}_logps"], gradient, argument=3.5)


def test_bco_bounds_dpo_most_tightly_at_half_the_sum_of_the_rewards():
    # (1 + e^-(r_w - d)) (1 + e^(r_l - d)) - (1 + e^-(r_w - r_l)) = e^-(r_w - d) + e^(r_l - d)
    rewards = tensor([1.5, -0.5], dtype=FP64)
    zero = torch.zeros(1, dtype=FP64)
    dpo = dpo_loss(rewards[:1], rewards[1:], zero, zero, beta=1.0)

    def gap(shift):
        labels = tensor([True, False])
        bco = bco_loss(rewards, torch.zeros(2, dtype=FP64), labels, beta=1.0, shift=shift).sum()
        return (bco.exp() - dpo.exp()).item()

    for shift in (-1.0, 0.25, 0.5, 2.0):
        exact = math.exp(shift - 1.5) + math.exp(-0.5 - shift)
        assert gap(shift) == pytest.approx(exact, rel=1e-12)  # some 20 roundings of numbers near 10
    best = gap(0.5)  # (1.5 - 0.5) / 2
    assert best < gap(0.5 - 1e-3) and best < gap(0.5 + 1e-3)


def test_cpos_likelihood_is_sfts():
    tensors = inputs("cpo", FP64)
    loss, _ = value_and_gradients("cpo", tensors, alpha=2.0)
    margin = cpo_loss(**tensors, beta=0.1, alpha=0.0)
    likelihood = sft_loss(tensors["chosen_logps"], tensors["chosen_lengths"])
    assert_within_rounding(loss, margin + 2 * likelihood, argument=0)


def odds_halves(label):
    """The odds term alone, and its gradient, with a baseline of 0."""
    tensors = inputs("enhanced_kto", FP64) | {"labels": torch.full((5,), label)}
    leaf = tensors.pop("logps").requires_grad_()
    settings = {"beta": 0.1, "reference_point": 0.0, "desirable_weight": 0.0}
    loss = enhanced_kto_loss(leaf, **tensors, **settings, undesirable_weight=0.0, odds_weight=1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient, tensors["lengths"], leaf.detach()


def test_the_desirable_half_of_the_odds_is_the_likelihood():
    # sigmoid(log-odds of p) = p, so -log sigmoid(o) = -m: a constant pull of 1 / T
    loss, gradient, lengths, logps = odds_halves(True)
    assert_within_rounding(loss, sft_loss(logps, lengths), argument=4)
    assert_within_rounding(gradient, -1 / lengths.double(), argument=4)


def test_the_undesirable_half_of_the_odds_is_the_unlikelihood():
    # -log sigmoid(-o) = -log(1 - p), with pull p / (1 - p) / T
    loss, gradient, lengths, logps = odds_halves(False)
    p = torch.exp(logps / lengths)
    assert_within_rounding(loss, -torch.log1p(-p), argument=4)
    assert_within_rounding(gradient, p / (1 - p) / lengths, argument=4)


def test_orpos_log_odds_ratio_is_the_odds_term_with_the_other_side_as_its_baseline():
    tensors = inputs("orpo", FP64)
    likelihood = orpo_loss(**tensors, odds_weight=0.0)
    chosen, rejected = (tensors[k] / tensors[n] for k, n in zip(list(tensors)[:2], LENGTHS, strict=True))
    other = rejected - torch.log1p(-rejected.exp())
    odds = enhanced_kto_loss(
        tensors["chosen_logps"],
        tensors["chosen_logps"],
        torch.ones(5, dtype=torch.bool),
        tensors["chosen_lengths"],
        beta=0.1,
        reference_point=0.0,
        desirable_weight=0.0,
        odds_weight=0.5,
        odds_baseline=other,
    )
    whole = orpo_loss(**tensors, odds_weight=0.5)
    assert_within_rounding(whole, likelihood + odds, argument=8)
    assert_within_rounding(likelihood, -chosen, argument=0)


def test_kto_ignores_what_is_very_wrong_and_bco_does_not():
    logps, ref, labels = tensor([-2000.0]), torch.zeros(1), tensor([True])
    kto_leaf, bco_leaf = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    kto_loss(kto_leaf, ref, labels, beta=0.1, reference_point=0.0).sum().backward()
    bco_loss(bco_leaf, ref, labels, beta=0.1, shift=0.0).sum().backward()
    assert kto_leaf.grad.item() == 0  # sigmoid(-200) underflows
    assert_within_rounding(bco_leaf.grad, [-0.1], argument=0)
