"""The Triton kernels of linear_kl; backend.py is the entry."""
