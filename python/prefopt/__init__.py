"""Preference training on fused log-probabilities: data, a thin trainer, reports and the command line."""

__version__ = "0.1.0"
