"""Refusals of arguments that ops, losses and modules share: each names the argument, its value and what is expected.

Only ``check_bounds`` reads a tensor's values, on the CPU, so no check waits for a device, and all can be traced.
"""

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32)
_INTEGERS = (*INTEGERS, torch.int16, torch.int8, torch.uint8)
LARGEST = torch.finfo(torch.float32).max


def nearest(value: object, names: Iterable[object]) -> str:
    """A hint that names the known word nearest to ``value``; empty if there is none."""
    near = difflib.get_close_matches(str(value), [name for name in names if isinstance(name, str)], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_tensor(name: str, value: Tensor, shape: str, dims: int, dtypes: tuple[torch.dtype, ...] = ()) -> None:
    """Raise unless ``value`` is a strided tensor of so many dimensions, of one of the dtypes if there are any."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor of shape {shape}")
    if value.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; expected a strided tensor")
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; expected {' or '.join(map(str, dtypes))}")


def check_vector(
    name: str, value: Tensor, length: int | None = None, *, size: str = "n", dtypes: tuple[torch.dtype, ...] = ()
) -> None:
    """Raise unless ``value`` is a vector, of ``length`` if that is known."""
    # The length is put into text only where it is wrong: torch.compile would make a constant of it.
    if isinstance(value, Tensor) and length is not None and (value.dim() != 1 or value.shape[0] != length):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({length},)")
    check_tensor(name, value, f"({size},)", 1, dtypes)


def check_device(other_name: str, other: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless all tensors are on the device of ``other``."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != other.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {other.device}, where {other_name} is")


def check_bounds(cu_seqlens: Tensor, tokens: int, name: str = "logp") -> None:
    """Raise unless the bounds of sequences rise from 0 to the number of rows of ``name``. CPU tensors only."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(
            f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; expected from 0 to T = {tokens}, the rows of {name}"
        )
    if sorted(bounds) != bounds:
        i = next(i for i in range(len(bounds) - 1) if bounds[i + 1] < bounds[i])
        raise ValueError(
            f"cu_seqlens[{i + 1}] is {bounds[i + 1]}, below cu_seqlens[{i}] = {bounds[i]}; "
            "expected non-decreasing values"
        )


def check_number(
    name: str, value: float, expected: str, least: float = -LARGEST, most: float = LARGEST, *, above: bool = False
) -> None:
    """Raise unless ``value`` is a number from ``least``, or above it, to ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}")
    # A comparison with NaN is false; math.isfinite would not be traced where a number changes between calls.
    if not (least < value if above else least <= value) or not value <= most:
        raise ValueError(f"{name} is {value}; expected {expected}")


def check_choice(name: str, value: str | None, choices: tuple[str, ...], *, or_none: bool = False) -> None:
    """Raise, with the nearest valid name, unless ``value`` is one of ``choices``, or None where that is allowed."""
    if value not in choices and not (value is None and or_none):
        none = "None or " if or_none else ""
        raise ValueError(f"{name} is {value!r}; expected {none}one of {choices}{nearest(value, choices)}")


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
        check_device("logps", logps, **{name: value})
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
        check_number(name, value, f"a finite number{comma} a 0-dim tensor{or_rows}")
    elif not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}; expected floating point ({unit})")
    elif value.ndim != 0 and not (per_row and value.shape == logps.shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shapes}")


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    check_number(name, value, "a finite number above 0", 0.0, above=True)


def check_weight(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number, 0 or above."""
    check_number(name, value, "a finite number, 0 or above", 0.0)


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
    expected = f"a number in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    check_number(name, value, expected, low, high, above=open_low)
    if open_high and value == high:
        raise ValueError(f"{name} is {value}; expected {expected}")


def check_interval(name: str, value: tuple[float, float]) -> None:
    """Raise unless ``value`` is (low, high) with 0 < low <= high, finite."""
    expected = "(low, high) with 0 < low <= high"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    for end in value:
        check_number(name, end, expected)
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _check_vectors(size: str, **vectors: Tensor) -> None:
    first_name, first = next(iter(vectors.items()))
    for name, value in vectors.items():
        check_vector(name, value, size=size)
        if value.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected that of {first_name}, {tuple(first.shape)}"
            )
        check_device(first_name, first, **{name: value})


def _check_floating(**logps: Tensor) -> None:
    for name, value in logps.items():
        if not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}; expected floating point (nats)")
