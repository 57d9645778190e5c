"""Option names of TRL and older versions of transformers: the option that replaces each, or the reason for its refusal.

A key is looked up by its last part: in a section, at the top level as in the flat files of transformers and TRL, or on
the command line.
"""

import logging
from typing import Any, NamedTuple

from prefopt.option_values import converted
from prefopt.options import SECTIONS, options_of

logger = logging.getLogger(__name__)

Entry = tuple[Any, str]  # a value and its source


class Foreign(NamedTuple):
    """The option that replaces a name, None if it is refused, and the reason."""

    new: str | None
    reason: str


_RENAMED = "transformers 5 renamed it"
_TRL = "this is TRL's name"
_FLAT = "this recipe has sections"
FOREIGN = {
    # transformers
    "evaluation_strategy": Foreign("training.eval_strategy", _RENAMED),
    "per_gpu_train_batch_size": Foreign("training.per_device_train_batch_size", _RENAMED),
    "per_gpu_eval_batch_size": Foreign("training.per_device_eval_batch_size", _RENAMED),
    "activation_checkpointing": Foreign(
        "training.gradient_checkpointing", "the older and better-known name is used here"
    ),
    "no_cuda": Foreign("training.use_cpu", _RENAMED),
    "warmup_ratio": Foreign("training.warmup_steps", "transformers 5 takes a share of all steps there, below 1"),
    "torch_dtype": Foreign("model.dtype", _RENAMED),
    # TRL and its scripts
    "model_name_or_path": Foreign("model.path", _TRL),
    "model_revision": Foreign("model.revision", _TRL),
    "dataset_name": Foreign("data.path", _TRL),
    "dataset_train_split": Foreign("data.split", _TRL),
    "dataset_test_split": Foreign("data.eval_split", _TRL),
    "load_in_4bit": Foreign("model.quantization", "the kind of 4 bits is named here"),
    "lora_r": Foreign("lora.r", _TRL),
    "lora_alpha": Foreign("lora.alpha", _TRL),
    "lora_dropout": Foreign("lora.dropout", _TRL),
    "lora_target_modules": Foreign("lora.target_modules", _TRL),
    "loss_type": Foreign("loss.method", "a loss and the rows it learns from are one choice here"),
    "precompute_ref_log_probs": Foreign("loss.precompute_ref_logps", _TRL),
    # refused
    "max_prompt_length": Foreign(
        None,
        "a prompt is never cut here: one that leaves no room within data.max_length makes a bad row, which is reported",
    ),
    "max_completion_length": Foreign(None, "only data.max_length, of prompt and answer together, limits an answer"),
    "truncation_mode": Foreign(None, "an answer loses its end beyond data.max_length, a prompt nothing"),
    "use_liger_kernel": Foreign(None, "log-probabilities are always fused here; training.backend chooses by what"),
    "group_by_length": Foreign(None, "the order of the rows decides what they are compared with; see training.sampler"),
    "use_peft": Foreign(None, "a section lora, even an empty one (lora: {}), asks for an adapter"),
    "load_in_8bit": Foreign(None, "only 4 bits are tested here: model.quantization nf4"),
    "push_to_hub": Foreign(None, "nothing is uploaded here; `prefopt export` makes the folder for it"),
}
LOSS_TYPES = {
    "kto": "kto",
    "apo_zero_unpaired": "apo_zero",
    "sigmoid": "dpo",
    "ipo": "ipo",
    "bco": "bco",
    "simpo": "simpo",
    "nll": "sft",
}


def translate(values: dict[str, Entry], problems: list[str]) -> dict[str, Entry]:
    """Replace foreign names, each with a warning; refusals are added to ``problems``.

    A training option at the top level, as in a flat file, goes to ``training``.

    Args:
        values: {dotted key: (value, its source)} of one file, or of the command line.
        problems: gets a sentence for each key that is refused, and for each that is given twice, by both its names.

    Example:
        >>> problems = []
        >>> translate({"training.warmup_ratio": (0.1, "r.yaml")}, problems), problems
        ({'training.warmup_steps': (0.1, 'r.yaml')}, [])
        >>> translate({"max_prompt_length": (256, "r.yaml")}, problems), problems[0][:42]
        ({}, 'r.yaml: max_prompt_length is not an option')
    """
    found: dict[str, Entry] = {}
    given_as: dict[str, str] = {}
    for key, (value, where) in values.items():
        foreign = _foreign(key)
        if foreign is None:
            new, entry = key, (value, where)
        elif foreign.new is None:
            problems.append(f"{where}: {key} is not an option: {foreign.reason}; drop it")
            continue
        else:
            try:
                new, entry = foreign.new, (_value(key.rpartition(".")[2], value), where)
            except ValueError as error:
                problems.append(f"{where}: {key} is {value!r}; expected {error}")
                continue
            logger.warning("%s: %s is read as %s: %s", where, key, new, foreign.reason)
        if new in given_as:
            first, second = sorted((given_as[new], key), key=lambda name: name == new)
            problems.append(f"{where}: {first} and {second} are both given; expected {new} alone")
        given_as[new] = key
        found[new] = entry
    return found


def _value(name: str, value: Any) -> Any:
    """The value of a foreign name in the spelling of the option that replaces it."""
    if name == "torch_dtype" and isinstance(value, str):
        return value.removeprefix("torch.")
    if name == "load_in_4bit":
        return "nf4" if converted(value, bool) else None
    if name == "loss_type":
        if not isinstance(value, str) or value not in LOSS_TYPES:
            raise ValueError(f"one of {', '.join(LOSS_TYPES)}")
        return LOSS_TYPES[value]
    if name == "warmup_ratio" and (
        not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1
    ):
        raise ValueError("a share of all steps, from 0 to below 1")
    return value


def _foreign(key: str) -> Foreign | None:
    section, dot, name = key.rpartition(".")
    if section in SECTIONS and name in options_of(section):
        return None
    if section and section not in SECTIONS:
        return None
    if not dot and name in options_of("training"):
        return Foreign(f"training.{name}", _FLAT)
    return FOREIGN.get(name)
