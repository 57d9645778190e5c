"""Fused losses for preference optimisation: per-token log-probabilities straight from hidden states and the LM head."""

from prefopt_kernels.ops.linear_logprob import TokenLogprobs, explain, linear_logprob

__version__ = "0.1.0"

__all__ = ["TokenLogprobs", "explain", "linear_logprob"]
