"""Exact KL of two models' next-token distributions from hidden states and heads. Start at op.py."""

from prefopt_kernels.ops.linear_kl.op import TokenKL, linear_kl

__all__ = ["TokenKL", "linear_kl"]
