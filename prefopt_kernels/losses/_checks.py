"""Argument checks that every loss makes: types, shapes, dtypes and Python numbers.

Nothing here reads a tensor's values, so a check never makes the host wait for a device.
"""

import math

import torch
from torch import Tensor


def check_rows(logps: Tensor, ref_logps: Tensor, labels: Tensor) -> None:
    """Raise unless the three are (B,) of one B on one device: floating, floating and bool."""
    for name, value in (("logps", logps), ("ref_logps", ref_logps), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor of shape (B,)")
        if value.ndim != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected (B,)")
        if value.shape != logps.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected that of logps, "
                f"{tuple(logps.shape)}"
            )
        if value.device != logps.device:
            raise ValueError(f"{name} is on {value.device}; expected {logps.device}, as logps")
    for name, value in (("logps", logps), ("ref_logps", ref_logps)):
        if not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}; expected floating point (nats)")
    if labels.dtype != torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; expected torch.bool (True = desirable)")


def check_baseline(name: str, value: Tensor | float, logps: Tensor) -> None:
    """Raise unless ``value`` is a finite number or a floating tensor, 0-dim or shaped as logps."""
    if not isinstance(value, Tensor):
        _check_finite(name, value, "a finite number, a 0-dim tensor or one of shape (B,)")
    elif not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}; expected floating point (nats)")
    elif value.ndim != 0 and value.shape != logps.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected () or {tuple(logps.shape)}, one per row"
        )


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    _check_finite(name, value, "a finite number above 0")
    if value <= 0:
        raise ValueError(f"{name} is {value}; expected a finite number above 0")


def check_weight(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number, 0 or above."""
    _check_finite(name, value, "a finite number, 0 or above")
    if value < 0:
        raise ValueError(f"{name} is {value}; expected a finite number, 0 or above")


def _check_finite(name: str, value: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; expected {expected}")
