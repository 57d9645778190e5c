"""Per-token log-probabilities under a linear head. Start at op.py."""

from prefopt_kernels.ops.linear_logprob.op import TokenLogprobs, explain, linear_logprob

__all__ = ["TokenLogprobs", "explain", "linear_logprob"]
