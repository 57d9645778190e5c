"""Argument checks that every loss makes: types, shapes, dtypes and Python numbers.

Nothing here reads a tensor's values, so a check never makes the host wait for a device.
"""

import difflib
import math

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_rows(logps: Tensor, ref_logps: Tensor, labels: Tensor) -> None:
    """Raise unless the three are (B,) of one B on one device: floating, floating and bool."""
    _check_vectors("B", logps=logps, ref_logps=ref_logps, labels=labels)
    _check_floating(logps=logps, ref_logps=ref_logps)
    if labels.dtype != torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; expected torch.bool (True = desirable)")


def check_logps(size: str, **logps: Tensor) -> None:
    """Raise unless all are floating point and vectors of one length, named ``size``, on one device."""
    _check_vectors(size, **logps)
    _check_floating(**logps)


def check_lengths(logps: Tensor, **lengths: Tensor) -> None:
    """Raise unless every one is an integer tensor of the shape and on the device of ``logps``."""
    for name, value in lengths.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor of integers")
        if value.shape != logps.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected {tuple(logps.shape)}, as the log-probabilities"
            )
        if value.device != logps.device:
            raise ValueError(f"{name} is on {value.device}; expected {logps.device}, as the log-probabilities")
        if value.dtype not in _INTEGERS:
            raise TypeError(f"{name} has dtype {value.dtype}; expected integers (tokens)")


def check_baseline(
    name: str, value: Tensor | float, logps: Tensor, *, per_row: bool = True, unit: str = "nats"
) -> None:
    """Raise unless ``value`` is a finite number or a floating tensor, 0-dim or shaped as logps."""
    shapes = "() or " + f"{tuple(logps.shape)}, one per row" if per_row else "()"
    if not isinstance(value, Tensor):
        or_rows = " or one of shape (B,)" if per_row else ""
        comma = "," if per_row else " or"
        _check_finite(name, value, f"a finite number{comma} a 0-dim tensor{or_rows}")
    elif not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}; expected floating point ({unit})")
    elif value.ndim != 0 and not (per_row and value.shape == logps.shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shapes}")


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


def check_between(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise unless ``value`` is a number in the interval; an open end is excluded."""
    interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    _check_finite(name, value, f"a number in {interval}")
    below = value <= low if open_low else value < low
    above = value >= high if open_high else value > high
    if below or above:
        raise ValueError(f"{name} is {value}; expected a number in {interval}")


def check_interval(name: str, value: tuple[float, float]) -> None:
    """Raise unless ``value`` is (low, high) with 0 < low <= high, finite."""
    expected = "(low, high) with 0 < low <= high"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    for end in value:
        _check_finite(name, end, expected)
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Raise, with the nearest valid name, unless ``value`` is None or one of ``choices``."""
    if value is None or value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} is {value!r}; expected None or one of {choices}{hint}")


def _check_vectors(size: str, **vectors: Tensor) -> None:
    first_name, first = next(iter(vectors.items()))
    for name, value in vectors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor of shape ({size},)")
        if value.ndim != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({size},)")
        if value.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected that of {first_name}, {tuple(first.shape)}"
            )
        if value.device != first.device:
            raise ValueError(f"{name} is on {value.device}; expected {first.device}, as {first_name}")


def _check_floating(**logps: Tensor) -> None:
    for name, value in logps.items():
        if not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}; expected floating point (nats)")


def _check_finite(name: str, value: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}")
    # Not math.isfinite, which torch.compile cannot trace where a number changes between calls.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value}; expected {expected}")
