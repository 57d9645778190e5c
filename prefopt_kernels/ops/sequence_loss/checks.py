"""What a call of sequence_loss must look like; each refusal names the argument, what was got and what is expected."""

import difflib
from typing import Any

import torch
from torch import Tensor

from prefopt_kernels.ops._forward_mode import refuse_tangents
from prefopt_kernels.ops.sequence_loss.parameters import METHODS, OFF, TAKEN, TENSORS, WEIGHTINGS

INTEGERS = (torch.int64, torch.int32)
LARGEST = torch.finfo(torch.float32).max
# Ranges of the numbers: what is expected, the least and the largest value, whether the least is excluded.
_ANY = ("a finite number", -LARGEST, LARGEST, False)
_WEIGHT = ("a finite number, 0 or above", 0.0, LARGEST, False)
_POSITIVE = ("a finite number above 0", 0.0, LARGEST, True)
RANGES = {
    "reference_point": _ANY,
    "shift": _ANY,
    "shift_gate": ("a number in [0, 1]", 0.0, 1.0, False),
    "shift_bound": _POSITIVE,
    "loss_aversion": _POSITIVE,
    "alpha": ("a number in (0, 1]", 0.0, 1.0, True),
    "kappa": _POSITIVE,
    "decision_mean": _POSITIVE,
    "odds_weight": _WEIGHT,
    "odds_baseline": _ANY,
    "desirable_weight": _WEIGHT,
    "undesirable_weight": _WEIGHT,
    "main_bound": _POSITIVE,
    "odds_bound": _POSITIVE,
}
MAY_BE_NONE = ("decision_mean", "main_bound", "odds_bound")


def check_call(
    logp: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    lengths: Tensor | None,
    method: str,
    beta: float,
    given: dict[str, Any],
) -> None:
    """Raise TypeError, ValueError or NotImplementedError unless the call is one that every backend understands.

    Reads metadata only, so it costs no device synchronisation and traces under torch.compile.
    """
    _check_vector("logp", logp, "T", (torch.float32,))
    refuse_tangents("sequence_loss", {"logp": logp})
    _check_vector("cu_seqlens", cu_seqlens, "B + 1", INTEGERS)
    B = cu_seqlens.shape[0] - 1
    if B < 1:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (B + 1,) with at least one sequence"
        )
    _check_vector("ref_logps", ref_logps, "B", (torch.float32,), B)
    _check_vector("labels", labels, "B", (torch.bool,), B)
    named = {"cu_seqlens": cu_seqlens, "ref_logps": ref_logps, "labels": labels}
    if lengths is not None:
        _check_vector("lengths", lengths, "B", INTEGERS, B)
        named["lengths"] = lengths
    named |= {name: given[name] for name in TENSORS if isinstance(given[name], Tensor)}
    for name, tensor in named.items():
        if tensor.device != logp.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {logp.device}, where logp is")
    _check_choice("method", method, METHODS)
    _check_number("beta", beta, *_POSITIVE)
    _check_settings(given)
    taken = TAKEN.get(method, tuple(OFF))
    for name, value in given.items():
        if name not in taken and (isinstance(value, Tensor) or value != OFF[name]):
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} is {got}; expected {OFF[name]!r}, because method {method!r} does not take it")


def check_values(cu_seqlens: Tensor, lengths: Tensor | None, tokens: int) -> None:
    """Raise ValueError unless cu_seqlens cuts the rows in order. CPU tensors only: it reads the values."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(
            f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; expected from 0 to T = {tokens}, the rows of logp"
        )
    if sorted(bounds) != bounds:
        i = next(i for i in range(len(bounds) - 1) if bounds[i + 1] < bounds[i])
        raise ValueError(
            f"cu_seqlens[{i + 1}] is {bounds[i + 1]}, below cu_seqlens[{i}] = {bounds[i]}; "
            "expected non-decreasing values"
        )
    if lengths is not None and (smallest := min(lengths.tolist())) < 0:
        raise ValueError(f"lengths has {smallest}; expected numbers of tokens, 0 or above")


def _check_vector(
    name: str,
    value: Tensor,
    size: str,
    dtypes: tuple[torch.dtype, ...],
    length: int | None = None,
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor of shape ({size},)")
    if value.dim() != 1 or (length is not None and value.shape[0] != length):
        expected = f"({size},)" if length is None else f"({length},), one for each sequence"
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {expected}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; expected a strided tensor")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} has dtype {value.dtype}; expected {expected}")


def _check_settings(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, Tensor) and name in TENSORS:
            if not value.is_floating_point():
                raise TypeError(f"{name} has dtype {value.dtype}; expected floating point")
            if value.dim() != 0:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ()")
        elif name in RANGES and not (value is None and name in MAY_BE_NONE):
            expected, least, most, excluded = RANGES[name]
            or_tensor = " or a 0-dim tensor" if name in TENSORS else ""
            _check_number(name, value, expected + or_tensor, least, most, excluded)
    for name in ("win_weighting", "decision_weighting"):
        if given[name] is not None:
            _check_choice(name, given[name], (None, *WEIGHTINGS))
    clip, expected = given["decision_clip"], "(low, high) with 0 < low <= high"
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"decision_clip is {clip!r}; expected {expected}")
    for end in clip:
        _check_number("decision_clip", end, expected, 0.0, LARGEST, True)
    if not clip[0] <= clip[1]:
        raise ValueError(f"decision_clip is {clip!r}; expected {expected}")


def _check_number(name: str, value: float, expected: str, least: float, most: float, excluded: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}")
    # A comparison with NaN is false; math.isfinite would not be traced where a number changes.
    if not (least < value if excluded else least <= value) or not value <= most:
        raise ValueError(f"{name} is {value}; expected {expected}")


def _check_choice(name: str, value: str, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), [c for c in choices if c is not None], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} is {value!r}; expected one of {choices}{hint}")
