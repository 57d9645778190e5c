"""The problems of a configuration: one sentence for each option that is out of range or does not fit the others."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal, get_type_hints

import torch

from prefopt.option_values import converted, in_bounds, nearest
from prefopt.options import in_force, options_of
from prefopt.train.methods import ANSWERS, METHODS, PAIRS, UNPAIRED

PYTHON = {"null": "None", "true": "True", "false": "False"}  # for the words of YAML
BATCH_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
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
    return [f"{name} is not an option{nearest(name, names)}" for name in given if name not in names]


def problems(options: Mapping[str, Any], kind: type) -> list[str]:
    """One sentence for each option out of range, then for each that does not fit the others.

    Args:
        options: every option of a configuration, by name.
        kind: the class of the configuration, which declares the options.
    """
    found = [*_out_of_range(options, kind)]
    if options["method"] in METHODS:
        found += _unused(options, kind)
    if not found:
        used = in_force(options, kind)
        found += _of_the_method(options, used) + _estimates(options, used) + _of_the_trainer(options, used)
    return found


def _out_of_range(options: Mapping[str, Any], kind: type) -> Iterator[str]:
    hints, declared = get_type_hints(kind), {one.name: one for one in fields(kind) if "bounds" in one.metadata}
    declared |= {name: options_of("training")[name] for name in BATCH_SIZES}
    for name, one in declared.items():
        hint = Literal[tuple(METHODS)] if name == "method" else hints[name]
        try:
            in_bounds(converted(options[name], hint), one.metadata["bounds"])
        except ValueError as error:
            expected = re.sub("null|true|false", lambda word: PYTHON[word[0]], str(error))
            yield f"{name} is {options[name]!r}; expected {expected}"


def _unused(options: Mapping[str, Any], kind: type) -> list[str]:
    """Options that the method's formula does not have, or has switched off."""
    method, used = options["method"], in_force(options, kind)
    takes = ", ".join(used) or "none"
    return [
        f"{one.name} is {options[one.name]!r}; method {method!r} has no use for it here (it takes: {takes})"
        for one in fields(kind)
        if one.metadata.get("methods") and options[one.name] is not None and one.name not in used
    ]


def _of_the_method(options: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    found, name = [], options["method"]
    method = METHODS[name]
    if "decision_clip" in used and not 0 < used["decision_clip"][0] <= used["decision_clip"][1]:
        found.append(f"decision_clip is {used['decision_clip']!r}; expected (low, high) with 0 < low <= high")
    if name == "enhanced_kto" and not 0 < used["alpha"] <= 1:
        found.append(f"alpha is {used['alpha']!r}; expected a number above 0 and at most 1 for method {name!r}")
    if used.get("robust") and not used["label_smoothing"]:
        found.append(
            "robust is True and label_smoothing 0; expected the probability that a pair's label is wrong, above 0"
        )
    if options["precompute_ref_logps"] and not method.needs_reference:
        found.append(f"precompute_ref_logps is True; method {name!r} has no reference model to score rows with")
    if options["sampler"] == "label_balanced" and method.data != UNPAIRED:
        what = "pairs" if method.data == PAIRS else "answers of one label"
        found.append(f"sampler is 'label_balanced'; method {name!r} learns from {what}: expected random or sequential")
    return found


def _estimates(options: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    """Estimates over the rows of a step or of a micro-batch need enough of them."""
    found = []
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
    if options["precompute_ref_logps"] and estimator == "exact":
        found.append(
            "precompute_ref_logps with kl_estimator 'exact', which needs the reference model's distributions; use "
            "kl_estimator 'window', or do not precompute"
        )
    if options["precompute_ref_logps"] and estimator == "microbatch" and options["sampler"] != "sequential":
        found.append(
            "precompute_ref_logps with kl_estimator 'microbatch' and sampler "
            f"{options['sampler'] or 'label_balanced'!r}: the rows of a micro-batch are not known in advance; use "
            "kl_estimator 'window' or sampler 'sequential'"
        )
    return found


def _of_the_trainer(options: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
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
            "debug is 'underflow_overflow'; it cannot read the head's output, which is empty here. A value that is not "
            "finite stops the run in any case"
        )
    accelerate = options["accelerator_config"]
    for name, value in (("dispatch_batches", True), ("even_batches", False)):
        got = accelerate.get(name) if isinstance(accelerate, dict) else getattr(accelerate, name, None)
        if got is value:
            found.append(
                f"accelerator_config has {name} {value}; expected {not value}: every process reads the same number of "
                "batches, each of its own rows"
            )
    return found + _compilation(options) + _best(options, used)


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
                f"torch_compile_backend is {backend!r}; expected one of {', '.join(known)}{nearest(backend, known)}"
            )
    return found


def _best(options: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    """The metric of the best checkpoint has to be one that is logged, with a known direction."""
    given = options["metric_for_best_model"]
    if given is None:
        return []
    method = METHODS[options["method"]]
    names = [*LOGGED, *(REWARDS if method.data != ANSWERS else ())]
    names += ["rewards/accuracies"] if method.data == PAIRS else []
    names += ["kl"] if "kl_estimator" in used else []
    names += ["kl_per_token"] if method.needs_reference and not options["precompute_ref_logps"] else []
    # of several evaluation sets a metric has the set's name before it: eval_held_out_loss
    name = next((name for name in names if f"_{given}".endswith(f"_{name}")), None)
    if name is None:
        return [
            f"metric_for_best_model is {given!r}; method {options['method']!r} logs {', '.join(names)}"
            f"{nearest(given, names)}"
        ]
    if options["greater_is_better"] is None and name != "loss" and name not in MORE_IS_BETTER:
        return [
            f"metric_for_best_model is {given!r} and greater_is_better is left out; expected True or False for this "
            "metric"
        ]
    return []
