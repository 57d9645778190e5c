"""Adapters for the models and trainers of other libraries; no other part of the package imports them."""
