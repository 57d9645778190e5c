"""What a recipe may say: one dataclass a section, one field a key, its help and its default beside it.

The names under ``training`` are those of ``transformers.TrainingArguments``. A field without a default must be given.
"""

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal


def option(
    help: str,
    default: Any = MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    shown: str | None = None,
) -> Any:
    """A field with its help and, for a number, its bounds; with ``default`` MISSING it must be given.

    ``shown`` is what the help calls the default, where null stands for something that depends on other options.
    """
    metadata = {"help": help, "least": least, "above": above, "below": below, "shown": shown}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model to train and its reference."""

    path: str = option("folder of a model with its tokenizer, or a hub id")
    revision: str | None = option("branch, tag or commit on the hub", None)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "of the weights; float32 keeps the small steps of a full fine-tune, auto takes the checkpoint's",
        "float32",
    )
    quantization: Literal["nf4"] | None = option(
        "load the frozen weights in 4 bits through bitsandbytes (NF4, doubly quantised scales); needs lora",
        None,
    )
    ref_path: str | None = option(
        "folder or hub id of the reference model; null: the model as it is before training", None
    )
    trust_remote_code: bool = option("run the Python code that comes with the model; read it first", False)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows: rated ones, or pairs."""

    path: str = option(
        "a .jsonl or .parquet file (relative to the current folder), a folder from `prefopt data build`, or a hub id"
    )
    plan: str | None = option(
        "of `prefopt data build`: a name or a .yaml file; it is built into the folder data.path, once, and its "
        "validation split is evaluated on",
        None,
    )
    split: str = option("of a built folder or a hub dataset", "train")
    revision: str | None = option("of a hub dataset", None)
    eval_path: str | None = option("rows to evaluate on; file, built folder or hub id", None)
    eval_split: str = option("of a built folder or a hub dataset in eval_path", "test")
    eval_revision: str | None = option("of a hub dataset in eval_path", None)
    eval_fraction: float = option(
        "share of the prompts set aside for evaluation instead of eval_path", 0.0, least=0, below=1
    )
    on_bad_row: Literal["stop", "skip"] = option("stop before training, or skip and list the rows", "stop")
    label_map: dict | None = option(
        "what labels other than true and false mean, in training and evaluation rows: {1: true, 0: false} or "
        '{"yes": true, "no": false}',
        None,
    )
    as_chat: bool = option(
        "make chat messages of rows of text: the prompt becomes a user turn, the completion an assistant turn, and the "
        "chat template renders them",
        False,
    )
    max_length: int | None = option("tokens of prompt and answer together; null for no limit", 1024, least=2)
    chat_template: str | None = option(
        "instead of the tokenizer's own: dialogue (Human and Assistant, for base models without one) or a .jinja file",
        None,
    )
    chat_template_kwargs: dict = option("passed to the chat template, e.g. {enable_thinking: false}", {})


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter; `lora: null` trains all weights."""

    r: int = option("rank", 16, least=1)
    alpha: float = option("the update is scaled by alpha / r", 32.0, above=0)
    dropout: float = option("on the adapter's input; the method wants 0", 0.0, least=0, below=1)
    target_modules: str | list[str] = option("names of the linear layers, or all-linear", "all-linear")


Switch = Literal["off", "tversky-kahneman", "prelec"]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The preference loss; an option that its method has no use for is refused."""

    method: Literal["kto", "apo_zero", "enhanced_kto", "bco", "dpo", "ipo", "cpo", "simpo", "orpo", "sft"] = option(
        "kto, apo_zero, enhanced_kto and bco learn from thumbs; dpo, ipo, cpo, simpo and orpo from pairs; sft from "
        "desirable answers alone",
        "kto",
    )
    beta: float | None = option("inverse temperature, 1/nats", None, above=0, shown="0.1")
    desirable_weight: float | None = option("factor on the loss of desirable rows", None, least=0, shown="1")
    undesirable_weight: float | None = option("factor on the loss of undesirable rows", None, least=0, shown="1")
    kl_estimator: Literal["window", "microbatch", "ema"] | None = option(
        "kto's reference point from the whole optimizer step, from each micro-batch as in TRL, or averaged over steps",
        None,
        shown="window",
    )
    kl_decay: float | None = option("of kl_estimator ema", None, least=0, below=1, shown="0.9")
    loss_aversion: float | None = option("enhanced_kto: slope on the wrong side", None, above=0, shown="2.25")
    alpha: float | None = option(
        "enhanced_kto: curvature, 1 for none; cpo: weight of the likelihood",
        None,
        least=0,
        shown="0.88; cpo 1",
    )
    kappa: float | None = option("enhanced_kto: where the curvature sets in", None, above=0, shown="0.1")
    win_weighting: Switch | None = option("enhanced_kto: of the probability to win", None, shown="off")
    decision_weighting: Switch | None = option(
        "enhanced_kto: of the rows by their likelihood", None, shown="tversky-kahneman"
    )
    decision_clip: tuple[float, float] | None = option("least and largest decision weight", None, shown="[0.5, 2]")
    odds_weight: float | None = option("of the odds ratio, in enhanced_kto and orpo", None, least=0, shown="0.1")
    main_bound: float | None = option(
        "enhanced_kto: largest pull on a row, 0 for none",
        None,
        least=0,
        shown="beta / 4 with a shift, else 0",
    )
    odds_bound: float | None = option(
        "enhanced_kto: the same of the odds ratio, per token",
        None,
        least=0,
        shown="2 odds_weight with a shift, else 0",
    )
    shift: Literal["off", "cumulative", "window", "ema"] | None = option(
        "bco's baseline: the mean of all rewards so far, of an optimizer step, or an average over steps",
        None,
        shown="window; enhanced_kto off",
    )
    shift_decay: float | None = option("of shift ema", None, least=0, below=1, shown="0.9")
    shift_bound: float | None = option(
        "largest size of the shift, reward units, 0 for none",
        None,
        least=0,
        shown="0; enhanced_kto 0.5",
    )
    shift_start: float | Literal["plateau"] | None = option(
        "share of the steps before the shift, or plateau of the margin",
        None,
        shown="0; enhanced_kto 0.3",
    )
    shift_ramp: float | None = option(
        "share of the steps in which it comes in", None, least=0, shown="0; enhanced_kto 0.1"
    )
    label_smoothing: float | None = option(
        "dpo: probability that a pair is the wrong way round", None, least=0, below=0.5, shown="0"
    )
    robust: bool | None = option("dpo: the unbiased form of label_smoothing", None, shown="false")
    gamma: float | None = option("simpo: margin to reach, reward units (its beta is 2)", None, least=0, shown="1")
    precompute_ref_logps: bool = option("score all rows with the reference first, and keep the scores", False)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How it is optimised, and where the run goes."""

    output_dir: str = option("the run folder")
    learning_rate: float = option("at its peak; with lora 1e-5 to 1e-4", 1e-6, above=0)
    num_train_epochs: float = option("passes over the data", 1.0, above=0)
    max_steps: int = option("optimizer steps; above 0 it overrides num_train_epochs", -1)
    per_device_train_batch_size: int = option("rows or pairs in a micro-batch", 4, least=1)
    per_device_eval_batch_size: int = option("rows in an evaluation batch", 8, least=1)
    gradient_accumulation_steps: int = option("micro-batches in an optimizer step", 4, least=1)
    lr_scheduler_type: str = option("linear, cosine, constant, ...", "linear")
    warmup_steps: float = option("steps of warm-up; below 1, a share of all steps", 0.0, least=0)
    weight_decay: float = option("of AdamW", 0.0, least=0)
    max_grad_norm: float = option("gradients are clipped to this norm", 1.0, least=0)
    optim: str = option("optimizer", "adamw_torch_fused")
    bf16: bool = option("autocast to bfloat16", False)
    fp16: bool = option("autocast to float16 with a gradient scaler; on a GPU", False)
    gradient_checkpointing: bool = option("recompute activations instead of keeping them", False)
    sampler: Literal["label_balanced", "random", "sequential"] | None = option(
        "order of the rows", None, shown="label_balanced; random for pairs and sft"
    )
    seed: int = option("of everything random", 42, least=0, below=2**32)
    logging_steps: int = option("optimizer steps between two logs", 10, least=1)
    eval_strategy: Literal["no", "steps", "epoch"] = option("when to evaluate besides the end", "no")
    eval_steps: int | None = option("optimizer steps between evaluations", None, least=1)
    save_strategy: Literal["no", "steps", "epoch"] = option("when to write checkpoints", "epoch")
    save_steps: int = option("optimizer steps between checkpoints", 500, least=1)
    save_total_limit: int | None = option("checkpoints to keep; null for all", 2, least=1)
    use_cpu: bool = option("stay on the CPU even where there is a GPU", False)
    report_to: str | list[str] = option("trackers beside the run folder, e.g. tensorboard", "none")
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = option("of the fused log-probabilities", "auto")
    extra: dict = option("further options of transformers.TrainingArguments", {})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    ``name`` is what it is reported under: its file, or "recipe". ``notes`` are written as comments at the head of the run's
    recipe.
    """

    model: Model
    data: Data
    training: Training
    lora: Lora | None = None
    loss: Loss = field(default_factory=Loss)
    name: str = "recipe"
    notes: tuple[str, ...] = ()


SECTIONS: dict[str, type] = {
    "model": Model,
    "data": Data,
    "lora": Lora,
    "loss": Loss,
    "training": Training,
}


def required(one: Field) -> bool:
    """Whether a recipe must give this field."""
    return one.default is MISSING and one.default_factory is MISSING


def options_of(section: str) -> dict[str, Field]:
    """The fields of a section by name."""
    return {one.name: one for one in fields(SECTIONS[section])}
