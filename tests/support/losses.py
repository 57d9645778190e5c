"""One call of every loss, for the tests of what all of them promise, and the bound on rounding they share."""

import torch
from torch import Tensor, tensor

from prefopt_kernels.losses import (
    apo_zero_loss,
    bco_loss,
    cpo_loss,
    dpo_loss,
    enhanced_kto_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    sft_loss,
    simpo_loss,
)

# Multiples of 1/8, so that differences are exact in fp32.
ROWS = {
    "logps": [-10.0, -42.5, -7.25, -90.0, -3.0],
    "ref_logps": [-12.0, -40.0, -7.25, -70.0, -33.0],
    "labels": [True, False, False, True, False],
    "lengths": [5, 30, 7, 64, 1],
}
PAIRS = {
    "chosen_logps": [-10.0, -42.5, -7.25, -90.0, -3.0],
    "rejected_logps": [-11.5, -30.0, -7.25, -120.0, -0.125],
    "ref_chosen_logps": [-12.0, -40.0, -7.25, -70.0, -33.0],
    "ref_rejected_logps": [-10.0, -44.25, -7.25, -95.0, -2.0],
    "chosen_lengths": [5, 30, 7, 64, 1],
    "rejected_lengths": [6, 12, 7, 80, 2],
}
FOUR = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
TWO = ("chosen_logps", "rejected_logps")
LENGTHS = ("chosen_lengths", "rejected_lengths")

EVERY_COMPONENT = {
    "shift": 0.4,
    "shift_gate": 0.6,
    "loss_aversion": 2.25,
    "alpha": 0.88,
    "win_weighting": "tversky-kahneman",
    "decision_weighting": "prelec",
    "odds_weight": 0.1,
    "odds_baseline": -0.5,
    "undesirable_weight": 1.25,
}

# name: function, its tensors, its hyper-parameters
LOSSES = {
    "kto": (kto_loss, ("logps", "ref_logps", "labels"), {"beta": 0.1, "reference_point": 1.5}),
    "apo_zero": (apo_zero_loss, ("logps", "ref_logps", "labels"), {"beta": 0.1}),
    "bco": (bco_loss, ("logps", "ref_logps", "labels"), {"beta": 0.1, "shift": 0.4}),
    "enhanced_kto": (
        enhanced_kto_loss,
        ("logps", "ref_logps", "labels", "lengths"),
        {"beta": 0.1, "reference_point": 1.5, **EVERY_COMPONENT},
    ),
    "dpo": (dpo_loss, FOUR, {"beta": 0.1}),
    "dpo smoothed": (dpo_loss, FOUR, {"beta": 0.1, "label_smoothing": 0.2}),
    "dpo robust": (dpo_loss, FOUR, {"beta": 0.1, "label_smoothing": 0.2, "robust": True}),
    "ipo": (ipo_loss, FOUR + LENGTHS, {"beta": 0.1}),
    "cpo": (cpo_loss, (*TWO, "chosen_lengths"), {"beta": 0.1, "alpha": 0.5}),
    "simpo": (simpo_loss, TWO + LENGTHS, {"beta": 2.0, "gamma": 1.0}),
    "orpo": (orpo_loss, TWO + LENGTHS, {"odds_weight": 0.5}),
    "sft": (sft_loss, ("logps", "lengths"), {}),
}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The loss's tensors of ROWS or PAIRS, log-probabilities in ``dtype``."""
    source = ROWS | PAIRS
    return {key: tensor(source[key], dtype=dtype) if "logps" in key else tensor(source[key]) for key in LOSSES[name][1]}


def call(name: str, tensors: dict[str, Tensor], **change) -> Tensor:
    function, _, settings = LOSSES[name]
    return function(**tensors, **(settings | change))


def value_and_gradients(name: str, tensors: dict[str, Tensor], **change) -> tuple[Tensor, dict]:
    """The loss, and the gradient of its sum to each of the policy's log-probabilities."""
    leaves = {
        key: value.detach().clone().requires_grad_()
        for key, value in tensors.items()
        if "logps" in key and not key.startswith("ref_")
    }
    loss = call(name, tensors | leaves, **change)
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def assert_within_rounding(ours: Tensor, exact, argument: float, largest: float = 0.0) -> None:
    """Up to sixteen roundings, and what an exponential makes of those of its argument.

    ``argument`` is the largest number that goes through an exponential: an error of eps in it is one of
    ``argument`` eps in the result, twice where two of them are divided. Where a result is a difference, or
    torch's derivative takes 1 - sigmoid from a sigmoid near 1, eps of ``largest``, the largest of the terms,
    stays.
    """
    exact = torch.as_tensor(exact, dtype=torch.float64)
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=(16 + 2 * argument) * eps, atol=4 * eps * largest)
