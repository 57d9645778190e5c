"""sft_loss: the likelihood per token of a row, and the docstring's way to the mean over tokens."""

import torch

from prefopt_kernels.losses import sft_loss
from support.losses import ROWS, assert_within_rounding, inputs, value_and_gradients


def test_value_and_gradient():
    for dtype in (torch.float32, torch.float64):
        loss, gradients = value_and_gradients("sft", inputs("sft", dtype))
        exact = [-logp / T for logp, T in zip(ROWS["logps"], ROWS["lengths"], strict=True)]
        assert_within_rounding(loss, exact, argument=0)
        assert_within_rounding(gradients["logps"], [-1 / T for T in ROWS["lengths"]], argument=0)


def test_the_mean_over_tokens_is_the_mean_weighted_by_them():
    tensors = inputs("sft", torch.float64)
    lengths = tensors["lengths"]
    mean = (sft_loss(**tensors) * lengths).sum() / lengths.sum()
    assert_within_rounding(mean, -sum(ROWS["logps"]) / sum(ROWS["lengths"]), argument=0)
