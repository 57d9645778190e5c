"""What a call of sequence_loss must look like; each refusal names the argument, what was got and what is expected."""

from typing import Any

import torch
from torch import Tensor

from prefopt_kernels._checks import (
    INTEGERS,
    LARGEST,
    check_bounds,
    check_choice,
    check_device,
    check_interval,
    check_number,
    check_positive,
    check_vector,
)
from prefopt_kernels.ops._forward_mode import refuse_tangents
from prefopt_kernels.ops.sequence_loss.parameters import METHODS, OFF, TAKEN, TENSORS, WEIGHTINGS

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
    check_vector("logp", logp, size="T", dtypes=(torch.float32,))
    refuse_tangents("sequence_loss", {"logp": logp})
    check_vector("cu_seqlens", cu_seqlens, size="B + 1", dtypes=INTEGERS)
    B = cu_seqlens.shape[0] - 1
    if B < 1:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (B + 1,) with at least one sequence"
        )
    check_vector("ref_logps", ref_logps, B, dtypes=(torch.float32,))
    check_vector("labels", labels, B, dtypes=(torch.bool,))
    named = {"cu_seqlens": cu_seqlens, "ref_logps": ref_logps, "labels": labels}
    if lengths is not None:
        check_vector("lengths", lengths, B, dtypes=INTEGERS)
        named["lengths"] = lengths
    named |= {name: given[name] for name in TENSORS if isinstance(given[name], Tensor)}
    check_device("logp", logp, **named)
    check_choice("method", method, METHODS)
    check_positive("beta", beta)
    _check_settings(given)
    taken = TAKEN.get(method, tuple(OFF))
    for name, value in given.items():
        if name not in taken and (isinstance(value, Tensor) or value != OFF[name]):
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} is {got}; expected {OFF[name]!r}, because method {method!r} does not take it")


def check_values(cu_seqlens: Tensor, lengths: Tensor | None, tokens: int) -> None:
    """Raise ValueError unless cu_seqlens cuts the rows in order. CPU tensors only: it reads the values."""
    check_bounds(cu_seqlens, tokens)
    if lengths is not None and (smallest := min(lengths.tolist())) < 0:
        raise ValueError(f"lengths has {smallest}; expected numbers of tokens, 0 or above")


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
            check_number(name, value, expected + or_tensor, least, most, above=excluded)
    for name in ("win_weighting", "decision_weighting"):
        check_choice(name, given[name], WEIGHTINGS, or_none=True)
    check_interval("decision_clip", given["decision_clip"])
