"""What is wrong with a configuration: every option out of range or out of place, one sentence each."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from prefopt.train.methods import ANSWERS, METHODS, OPTIONS, PAIRS, RATED, in_force

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
INTEGERS = (  # lowest, and whether None is allowed
    ("max_length", 2, True),
    ("precompute_batch_size", 1, True),
    ("per_device_train_batch_size", 1, False),
    ("per_device_eval_batch_size", 1, False),
    ("gradient_accumulation_steps", 1, False),
)
REFUSED = {  # options of TrainingArguments that are off by default, and why they stay so
    "use_liger_kernel": "log-probabilities are always fused here, without logits; backend chooses the kernels",
    "liger_kernel_config": "log-probabilities are always fused here, without logits; backend chooses the kernels",
    "logging_nan_inf_filter": "it would hide a loss that is not finite, which stops the run",
    "label_smoothing_factor": "it smooths a cross-entropy over the vocabulary, which no method here computes; dpo has "
    "label_smoothing",
    "neftune_noise_alpha": "its noise would enter the log-ratio of policy and reference",
    "bf16_full_eval": "it rounds the policy's weights for good and not the reference's; use bf16",
    "fp16_full_eval": "it rounds the policy's weights for good and not the reference's; use fp16",
    "auto_find_batch_size": "a smaller batch would change the rows of each optimizer step; set "
    "per_device_train_batch_size, and gradient_accumulation_steps to keep their number",
}
CUDA_GRAPHS = {  # of torch.compile
    "torch_compile_mode": ("reduce-overhead", "max-autotune"),
    "torch_compile_backend": ("cudagraphs",),
}
LOGGED = ("loss", "entropy", "logits/chosen", "logits/rejected", "logps/chosen", "logps/rejected")
REWARDS = ("rewards/chosen", "rewards/margins", "rewards/rejected")
MORE_IS_BETTER = ("rewards/chosen", "rewards/margins", "rewards/accuracies")


def unknown(given: Iterable[str], names: list[str]) -> list[str]:
    """One sentence for each name that is no option, with the nearest one that is."""
    return [f"{name} is not an option{_nearest(name, names)}" for name in given if name not in names]


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
    for name, lowest, or_none in INTEGERS:
        value = options[name]
        if value is None and or_none:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            none = ", or None" if or_none else ""
            found.append(f"{name} is {value!r}; expected an integer >= {lowest}{none}")
    clip = options["decision_clip"]
    if clip is not None and not (
        isinstance(clip, (tuple, list)) and len(clip) == 2 and all(map(_number, clip)) and 0 < clip[0] <= clip[1]
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
        found.append(f"alpha is {used['alpha']!r}; expected a number above 0 and at most 1 for method {name!r}")
    if used.get("robust") and not used["label_smoothing"]:
        found.append(
            "robust is True and label_smoothing 0; expected the probability that a pair's label is wrong, above 0"
        )
    if options["precompute_ref_logps"] and not method.needs_reference:
        found.append(f"precompute_ref_logps is True; method {name!r} has no reference model to score rows with")
    if options["sampler"] == "label_balanced" and method.data != RATED:
        what = "pairs" if method.data == PAIRS else "answers of one label"
        found.append(f"sampler is 'label_balanced'; method {name!r} learns from {what}: expected random or sequential")
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
    if options["precompute_ref_logps"] and estimator == "microbatch" and options["sampler"] != "sequential":
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
    found += [
        f"{name} is {options[name]!r}; {why}" for name, why in REFUSED.items() if options[name] not in (None, False, 0)
    ]
    if not options["remove_unused_columns"]:
        found.append("remove_unused_columns is False; the columns are chosen by the trainer")
    if "underflow_overflow" in (options["debug"] or ""):
        found.append(
            "debug is 'underflow_overflow'; it cannot read the head's output, which is empty here, and a value that is not "
            "finite stops the run without it"
        )
    accelerate = options["accelerator_config"]
    for name, value in (("dispatch_batches", True), ("even_batches", False)):
        got = accelerate.get(name) if isinstance(accelerate, dict) else getattr(accelerate, name, None)
        if got is value:
            found.append(
                f"accelerator_config has {name} {value}; expected {not value}: each process reads as many batches of its "
                "own rows as the others"
            )
    return found + _compilation(options) + _best(options)


def _compilation(options: Mapping[str, Any]) -> list[str]:
    found = [
        f"{name} is {options[name]!r}; it replays CUDA graphs, which is untested with several passes a step: expected "
        "backend inductor in mode default or max-autotune-no-cudagraphs"
        for name, values in CUDA_GRAPHS.items()
        if options[name] in values
    ]
    backend = options["torch_compile_backend"]
    if backend is not None:
        known = torch.compiler.list_backends(())
        if backend not in known:
            found.append(
                f"torch_compile_backend is {backend!r}; expected one of {', '.join(known)}{_nearest(backend, known)}"
            )
    return found


def _best(options: Mapping[str, Any]) -> list[str]:
    """The metric of the best checkpoint has to be one that is logged, with a known direction."""
    given = options["metric_for_best_model"]
    if given is None:
        return []
    method = METHODS[options["method"]]
    names = [*LOGGED, *(REWARDS if method.data != ANSWERS else ())]
    names += ["rewards/accuracies"] if method.data == PAIRS else []
    names += ["kl"] if "kl_estimator" in method.options else []
    # of several evaluation sets a metric has the set's name before it: eval_held_out_loss
    name = next((name for name in names if f"_{given}".endswith(f"_{name}")), None)
    if name is None:
        return [
            f"metric_for_best_model is {given!r}; method {options['method']!r} logs {', '.join(names)}{_nearest(given, names)}"
        ]
    if options["greater_is_better"] is None and name != "loss" and name not in MORE_IS_BETTER:
        return [
            f"metric_for_best_model is {given!r} and greater_is_better is left out; expected True or False for this metric"
        ]
    return []
