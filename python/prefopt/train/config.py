"""Every option of a preference run, checked all at once before anything is loaded."""

import difflib
import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

METHODS = ("kto", "apo_zero")
KL_ESTIMATORS = ("window", "microbatch")
SAMPLERS = ("label_balanced", "random", "sequential")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
CHOICES = {
    "method": METHODS,
    "kl_estimator": KL_ESTIMATORS,
    "sampler": SAMPLERS,
    "on_bad_row": ("stop", "skip"),
    "backend": BACKENDS,
}


@dataclass
class PreferenceConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and what preference training adds to them.

    Args:
        method: "kto" (arXiv:2402.01306) or "apo_zero" (arXiv:2408.06266: KTO with its reference point at 0, so no
            passes over mismatched completions).
        beta: inverse temperature, 1/nats, above 0.
        desirable_weight, undesirable_weight: multiply the loss of the rows of each label; 0 or above.
        kl_estimator: where KTO's reference point comes from. "window": once per optimizer step, from pairs made over
            all its micro-batches, so that accumulation does not change the gradient. "microbatch": from each
            micro-batch alone, as TRL's KTOTrainer does; for comparisons with it.
        sampler: order of the training rows. "label_balanced" and "random" are seeded by ``data_seed`` (or ``seed``);
            "sequential" keeps the order of the data.
        max_length: tokens per sequence, prompt and completion; None for no limit.
        on_bad_row: "stop" before training, or "skip" and list the rows in bad_rows.jsonl.
        disable_dropout: sets every dropout of policy and reference to 0, as TRL does. Without it the log-ratio of two
            equal models is not 0.
        precompute_ref_logps: score all rows with the reference before training, keep the results in a cache on disk
            and free the reference. Every row then has one fixed mismatched completion.
        precompute_batch_size: rows per forward pass of that; the batch size of evaluation if left out.
        reference_cache_dir: folder of that cache; beside the cache of ``datasets`` if left out.
        backend: of ``prefopt_kernels.linear_logprob``.

    Differences to the defaults of TrainingArguments: ``learning_rate`` is 1e-6 and ``logging_nan_inf_filter`` is off,
    because a loss that is not finite stops the run.

    Raises:
        ValueError: unknown names and values out of range, all of them in one message.

    Example:
        >>> PreferenceConfig(output_dir="run", use_cpu=True, beta=0.2, sampler="random").train_sampling_strategy
        'random'
        >>> PreferenceConfig(output_dir="run", betta=0.2, sampler="balanced")
        Traceback (most recent call last):
            ...
        ValueError: 2 options of PreferenceConfig are not valid:
          betta is not an option; did you mean beta?
          sampler is 'balanced'; expected one of label_balanced, random, sequential; did you mean label_balanced?
    """

    method: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl_estimator: str = "window"
    sampler: str = "label_balanced"
    max_length: int | None = 1024
    on_bad_row: str = "stop"
    disable_dropout: bool = True
    precompute_ref_logps: bool = False
    precompute_batch_size: int | None = None
    reference_cache_dir: str | None = None
    backend: str = "auto"
    learning_rate: float = field(default=1e-6)
    logging_nan_inf_filter: bool = field(default=False)

    def __new__(cls, *args: Any, **kwargs: Any):
        # Before the generated __init__, which would stop at the first unknown name and suggest nothing.
        if args or kwargs:  # neither: being copied or unpickled
            names = [option.name for option in fields(cls) if option.init]
            given = dict(zip(names, args, strict=False)) | kwargs
            _raise_for(cls, _unknown(given, names) + _problems(_with_defaults(cls, given)))
        return super().__new__(cls)

    def __post_init__(self):
        self.check()
        if self.sampler != "label_balanced":
            self.train_sampling_strategy = self.sampler
        super().__post_init__()

    def check(self) -> None:
        """Raise ``ValueError`` with every option that does not make sense, alone or beside the others."""
        _raise_for(type(self), _problems(vars(self)))

    @property
    def needs_kl(self) -> bool:
        """Whether the loss has a reference point to estimate."""
        return self.method == "kto"


def _with_defaults(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        option.name: option.default if option.default is not MISSING else None
        for option in fields(cls)
    }
    return defaults | given


def _raise_for(cls: type, problems: list[str]) -> None:
    if problems:
        count = "1 option" if len(problems) == 1 else f"{len(problems)} options"
        verb = "is" if len(problems) == 1 else "are"
        listed = "\n  ".join(problems)
        raise ValueError(f"{count} of {cls.__name__} {verb} not valid:\n  {listed}")


def _unknown(given: dict[str, Any], names: list[str]) -> list[str]:
    return [
        f"{name} is not an option{_nearest(name, names)}" for name in given if name not in names
    ]


def _nearest(got: Any, names: Any) -> str:
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _problems(options: dict[str, Any]) -> list[str]:
    """One sentence for each option out of range, then for each combination that cannot work."""
    found = [
        f"{name} is {options[name]!r}; expected one of {', '.join(allowed)}{_nearest(options[name], allowed)}"
        for name, allowed in CHOICES.items()
        if options[name] not in allowed
    ]
    found += _numbers(options)
    if not found:
        found += _combinations(options)
    return found


def _numbers(options: dict[str, Any]) -> list[str]:
    found = []
    for name, lowest, exclusive in (
        ("beta", 0.0, True),
        ("desirable_weight", 0.0, False),
        ("undesirable_weight", 0.0, False),
    ):
        value = options[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < lowest or (exclusive and value == 0):
            found.append(
                f"{name} is {value!r}; expected a number {'above 0' if exclusive else '>= 0'}"
            )
    for name, lowest in (("max_length", 2), ("precompute_batch_size", 1)):
        value = options[name]
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < lowest
        ):
            found.append(f"{name} is {value!r}; expected an integer >= {lowest}, or None")
    return found


def _combinations(options: dict[str, Any]) -> list[str]:
    found = []
    batch, accumulation = (
        options["per_device_train_batch_size"],
        options["gradient_accumulation_steps"],
    )
    if options["method"] == "kto" and options["kl_estimator"] == "microbatch" and batch == 1:
        found.append(
            "kl_estimator 'microbatch' with per_device_train_batch_size 1: a micro-batch of one row has no other row's "
            "completion to estimate the reference point from; use kl_estimator 'window'"
        )
    if (
        options["method"] == "kto"
        and options["kl_estimator"] == "window"
        and batch * accumulation == 1
    ):
        found.append(
            "per_device_train_batch_size 1 with gradient_accumulation_steps 1: an optimizer step of one row has no "
            "other row's completion to estimate the reference point from; accumulate, or use method 'apo_zero'"
        )
    if (
        options["precompute_ref_logps"]
        and options["method"] == "kto"
        and options["kl_estimator"] == "microbatch"
        and options["sampler"] != "sequential"
    ):
        found.append(
            f"precompute_ref_logps with kl_estimator 'microbatch' and sampler {options['sampler']!r}: which rows meet in "
            "a micro-batch is then not known in advance; use kl_estimator 'window' or sampler 'sequential'"
        )
    if options["train_sampling_strategy"] not in ("random", options["sampler"]):
        found.append(
            f"train_sampling_strategy is {options['train_sampling_strategy']!r}; it follows from sampler, which is "
            f"{options['sampler']!r}"
        )
    if options["logging_nan_inf_filter"]:
        found.append(
            "logging_nan_inf_filter is True; it would hide a loss that is not finite, which stops the run"
        )
    if options["label_smoothing_factor"]:
        found.append(
            "label_smoothing_factor is set; it smooths a cross-entropy, which no method here has"
        )
    if options["neftune_noise_alpha"] is not None:
        found.append(
            "neftune_noise_alpha is set; its noise would enter the log-ratio of policy and reference"
        )
    if not options["remove_unused_columns"]:
        found.append("remove_unused_columns is False; the columns are chosen by the trainer")
    return found
