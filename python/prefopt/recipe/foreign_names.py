"""Keys of older or other configurations: what they are called here, or why they are refused. One table.

A key is looked up by its last part, wherever it stands: in a section, at the top level as in the flat files of transformers
and TRL, or on the command line.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from prefopt.options import SECTIONS, options_of

logger = logging.getLogger(__name__)

Entry = tuple[Any, str]  # a value and where it was said


class Old(NamedTuple):
    """Where the value goes (None: nowhere), why, and what becomes of it."""

    new: str | None
    reason: str
    value: Callable[[Any], Any] = lambda value: value


def _share(value: Any) -> Any:
    """A ratio as ``warmup_steps`` has it: below 1 it is a share of all steps."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1:
        return value
    raise ValueError("a share of all steps, from 0 to below 1")


def _method(value: Any) -> str:
    """TRL's names of losses."""
    names = {
        "kto": "kto",
        "apo_zero_unpaired": "apo_zero",
        "sigmoid": "dpo",
        "ipo": "ipo",
        "bco": "bco",
        "simpo": "simpo",
        "nll": "sft",
    }
    if isinstance(value, str) and value in names:
        return names[value]
    raise ValueError(f"one of {', '.join(names)}")


def _four_bits(value: Any) -> str | None:
    if isinstance(value, bool):
        return "nf4" if value else None
    raise ValueError("true or false")


def _dtype(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


_RENAMED = "transformers 5 renamed it"
_TRL = "TRL calls it so"
_FLAT = "this recipe has sections"
OLD = {
    # transformers
    "evaluation_strategy": Old("training.eval_strategy", _RENAMED),
    "per_gpu_train_batch_size": Old("training.per_device_train_batch_size", _RENAMED),
    "per_gpu_eval_batch_size": Old("training.per_device_eval_batch_size", _RENAMED),
    "activation_checkpointing": Old("training.gradient_checkpointing", "the older and better-known name is used here"),
    "no_cuda": Old("training.use_cpu", _RENAMED),
    "warmup_ratio": Old("training.warmup_steps", "transformers 5 takes a share of all steps there, below 1", _share),
    "torch_dtype": Old("model.dtype", _RENAMED, _dtype),
    # TRL and its scripts
    "model_name_or_path": Old("model.path", _TRL),
    "model_revision": Old("model.revision", _TRL),
    "dataset_name": Old("data.path", _TRL),
    "dataset_train_split": Old("data.split", _TRL),
    "dataset_test_split": Old("data.eval_split", _TRL),
    "load_in_4bit": Old("model.quantization", "the kind of 4 bits is named here", _four_bits),
    "lora_r": Old("lora.r", _TRL),
    "lora_alpha": Old("lora.alpha", _TRL),
    "lora_dropout": Old("lora.dropout", _TRL),
    "lora_target_modules": Old("lora.target_modules", _TRL),
    "loss_type": Old("loss.method", "a loss and the rows it learns from are one choice here", _method),
    "precompute_ref_log_probs": Old("loss.precompute_ref_logps", _TRL),
    # refused
    "max_prompt_length": Old(
        None,
        "a prompt is never cut here: one that leaves no room within data.max_length makes a bad row, which is reported",
    ),
    "max_completion_length": Old(None, "only data.max_length, of prompt and answer together, limits an answer"),
    "truncation_mode": Old(None, "an answer loses its end beyond data.max_length, a prompt nothing"),
    "use_liger_kernel": Old(None, "log-probabilities are always fused here; training.backend chooses by what"),
    "group_by_length": Old(None, "the order of the rows decides what they are compared with; see training.sampler"),
    "use_peft": Old(None, "a section lora, even an empty one (lora: {}), asks for an adapter"),
    "load_in_8bit": Old(None, "only 4 bits are tested here: model.quantization nf4"),
    "push_to_hub": Old(None, "nothing is uploaded here; `prefopt export` makes the folder for it"),
}


def translate(values: dict[str, Entry], problems: list[str]) -> dict[str, Entry]:
    """Old keys replaced by new ones, each with a warning; what is refused is added to ``problems``.

    A training option that stands at the top level, as in a flat file, goes to ``training``.

    Args:
        values: {dotted key: (value, where it was said)} of one file, or of the command line.
        problems: gets a sentence for each key that is refused, and for each that is given twice, by both its names.

    Example:
        >>> problems = []
        >>> translate({"training.warmup_ratio": (0.1, "r.yaml")}, problems), problems
        ({'training.warmup_steps': (0.1, 'r.yaml')}, [])
        >>> translate({"max_prompt_length": (256, "r.yaml")}, problems), problems[0][:42]
        ({}, 'r.yaml: max_prompt_length is not an option')
    """
    found: dict[str, Entry] = {}
    said_as: dict[str, str] = {}
    for key, (value, where) in values.items():
        old = _old(key)
        if old is None:
            new, entry = key, (value, where)
        elif old.new is None:
            problems.append(f"{where}: {key} is not an option: {old.reason}; drop it")
            continue
        else:
            try:
                new, entry = old.new, (old.value(value), where)
            except ValueError as error:
                problems.append(f"{where}: {key} is {value!r}; expected {error}")
                continue
            logger.warning("%s: %s is read as %s: %s", where, key, new, old.reason)
        if new in said_as:
            first, second = sorted((said_as[new], key), key=lambda name: name == new)
            problems.append(f"{where}: {first} and {second} are both given; expected {new} alone")
        said_as[new] = key
        found[new] = entry
    return found


def _old(key: str) -> Old | None:
    section, dot, name = key.rpartition(".")
    if section in SECTIONS and name in options_of(section):
        return None
    if section and section not in SECTIONS:
        return None
    if not dot and name in options_of("training"):
        return Old(f"training.{name}", _FLAT)
    return OLD.get(name)
