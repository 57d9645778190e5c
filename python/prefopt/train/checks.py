"""What is wrong with a configuration: every option out of range or out of place, one sentence each."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from prefopt.train.methods import METHODS, OPTIONS, PAIRS, RATED, in_force

KL_ESTIMATORS = ("window", "microbatch", "ema")
SHIFTS = ("off", "cumulative", "window", "ema")
WEIGHTINGS = ("off", "tversky-kahneman", "prelec")
SAMPLERS = ("label_balanced", "random", "sequential")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
CHOICES = {
    "method": tuple(METHODS),
    "kl_estimator": KL_ESTIMATORS,
    "shift": SHIFTS,
    "win_weighting": WEIGHTINGS,
    "decision_weighting": WEIGHTINGS,
    "sampler": SAMPLERS,
    "on_bad_row": ("stop", "skip"),
    "backend": BACKENDS,
}
ABOVE_0, FROM_0 = (0.0, math.inf, "above 0"), (0.0, math.inf, ">= 0")
DECAY, SHARE = (0.0, 1.0, ">= 0 and below 1"), (0.0, 1.0, "from 0 to 1")
NUMBERS = {  # lowest, highest, in words; the words decide which ends belong to it
    "beta": ABOVE_0,
    "desirable_weight": FROM_0,
    "undesirable_weight": FROM_0,
    "kl_decay": DECAY,
    "loss_aversion": ABOVE_0,
    "alpha": FROM_0,
    "kappa": ABOVE_0,
    "odds_weight": FROM_0,
    "shift_decay": DECAY,
    "shift_bound": FROM_0,
    "shift_start": SHARE,
    "shift_ramp": SHARE,
    "main_bound": FROM_0,
    "odds_bound": FROM_0,
    "label_smoothing": (0.0, 0.5, ">= 0 and below 0.5"),
    "gamma": FROM_0,
}


def unknown(given: Iterable[str], names: list[str]) -> list[str]:
    """One sentence for each name that is no option, with the nearest one that is."""
    return [
        f"{name} is not an option{_nearest(name, names)}" for name in given if name not in names
    ]


def problems(options: Mapping[str, Any]) -> list[str]:
    """One sentence for each option out of range, then for each that does not fit the others."""
    found = [
        f"{name} is {options[name]!r}; expected one of {', '.join(allowed)}{_nearest(options[name], allowed)}"
        for name, allowed in CHOICES.items()
        if options[name] not in allowed and not (options[name] is None and _may_be_left_out(name))
    ]
    found += _numbers(options)
    if options["method"] in METHODS:
        found += _unused(options)
    if not found:
        found += _of_the_method(options) + _estimates(options) + _of_the_trainer(options)
    return found


def _may_be_left_out(name: str) -> bool:
    return name in OPTIONS or name == "sampler"


def _nearest(got: Any, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(got), list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(options: Mapping[str, Any]) -> list[str]:
    found = []
    for name, (lowest, highest, words) in NUMBERS.items():
        value = options[name]
        if value is None or (name == "shift_start" and value == "plateau"):
            continue
        inside = _number(value) and (
            (lowest < value if words.startswith("above") else lowest <= value)
            and (value < highest if "below" in words else value <= highest)
        )
        if not inside:
            plateau = ", or plateau" if name == "shift_start" else ""
            found.append(f"{name} is {value!r}; expected a number {words}{plateau}")
    for name, lowest in (("max_length", 2), ("precompute_batch_size", 1)):
        value = options[name]
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < lowest
        ):
            found.append(f"{name} is {value!r}; expected an integer >= {lowest}, or None")
    clip = options["decision_clip"]
    if clip is not None and not (
        isinstance(clip, (tuple, list))
        and len(clip) == 2
        and all(map(_number, clip))
        and 0 < clip[0] <= clip[1]
    ):
        found.append(f"decision_clip is {clip!r}; expected (low, high) with 0 < low <= high")
    if options["robust"] is not None and not isinstance(options["robust"], bool):
        found.append(f"robust is {options['robust']!r}; expected True or False")
    return found


def _unused(options: Mapping[str, Any]) -> list[str]:
    """Options that the method's formula does not have, or has switched off."""
    name, used = options["method"], in_force(options)
    takes = ", ".join(used) or "none"
    return [
        f"{option} is {options[option]!r}; method {name!r} has no use for it here (it takes: {takes})"
        for option in OPTIONS
        if options[option] is not None and option not in used
    ]


def _of_the_method(options: Mapping[str, Any]) -> list[str]:
    found, name = [], options["method"]
    method, used = METHODS[name], in_force(options)
    if name == "enhanced_kto" and not 0 < used["alpha"] <= 1:
        found.append(
            f"alpha is {used['alpha']!r}; expected a number above 0 and at most 1 for method {name!r}"
        )
    if used.get("robust") and not used["label_smoothing"]:
        found.append(
            "robust is True and label_smoothing 0; expected the probability that a pair's label is wrong, above 0"
        )
    if options["precompute_ref_logps"] and not method.needs_reference:
        found.append(
            f"precompute_ref_logps is True; method {name!r} has no reference model to score rows with"
        )
    if options["sampler"] == "label_balanced" and method.data != RATED:
        what = "pairs" if method.data == PAIRS else "answers of one label"
        found.append(
            f"sampler is 'label_balanced'; method {name!r} learns from {what}: expected random or sequential"
        )
    return found


def _estimates(options: Mapping[str, Any]) -> list[str]:
    """Estimates over the rows of a step or of a micro-batch need enough of them."""
    found, used = [], in_force(options)
    batch = options["per_device_train_batch_size"]
    alone = batch * options["gradient_accumulation_steps"] == 1
    estimator = used.get("kl_estimator")
    if estimator == "microbatch" and batch == 1:
        found.append(
            "kl_estimator 'microbatch' with per_device_train_batch_size 1: a micro-batch of one row has no other row's "
            "completion to estimate the reference point from; use kl_estimator 'window'"
        )
    if estimator in ("window", "ema") and alone:
        found.append(
            "per_device_train_batch_size 1 with gradient_accumulation_steps 1: an optimizer step of one row has no "
            "other row's completion to estimate the reference point from; accumulate, or use method 'apo_zero'"
        )
    if used.get("shift") == "window" and alone:
        found.append(
            "per_device_train_batch_size 1 with gradient_accumulation_steps 1: an optimizer step of one row never has "
            "both labels, which shift 'window' is the mean of; accumulate, or use shift 'ema'"
        )
    if (
        options["precompute_ref_logps"]
        and estimator == "microbatch"
        and options["sampler"] != "sequential"
    ):
        found.append(
            f"precompute_ref_logps with kl_estimator 'microbatch' and sampler {options['sampler'] or 'label_balanced'!r}: "
            "which rows meet in a micro-batch is then not known in advance; use kl_estimator 'window' or sampler "
            "'sequential'"
        )
    return found


def _of_the_trainer(options: Mapping[str, Any]) -> list[str]:
    found = []
    if options["train_sampling_strategy"] not in ("random", options["sampler"]):
        found.append(
            f"train_sampling_strategy is {options['train_sampling_strategy']!r}; it follows from sampler, which is "
            + (repr(options["sampler"]) if options["sampler"] else "left out")
        )
    if options["logging_nan_inf_filter"]:
        found.append(
            "logging_nan_inf_filter is True; it would hide a loss that is not finite, which stops the run"
        )
    if options["label_smoothing_factor"]:
        found.append(
            "label_smoothing_factor is set; it smooths a cross-entropy over the vocabulary, which no method here "
            "computes; dpo has label_smoothing"
        )
    if options["neftune_noise_alpha"] is not None:
        found.append(
            "neftune_noise_alpha is set; its noise would enter the log-ratio of policy and reference"
        )
    if not options["remove_unused_columns"]:
        found.append("remove_unused_columns is False; the columns are chosen by the trainer")
    return found
