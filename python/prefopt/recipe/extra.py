"""``training.extra``: options of transformers.TrainingArguments without a key of their own, and their checks."""

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from accelerate.utils import GradientAccumulationPlugin, ParallelismConfig
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels

from prefopt.option_values import converted, in_bounds, nearest, show
from prefopt.recipe.foreign_names import FOREIGN
from prefopt.train import PreferenceConfig

BOUNDS = {
    "adam_beta1": {"least": 0, "below": 1},
    "adam_beta2": {"least": 0, "below": 1},
    "adam_epsilon": {"least": 0},
    "data_seed": {"least": 0, "below": 2**32},
    "dataloader_num_workers": {"least": 0},
    "dataloader_prefetch_factor": {"least": 1},
    "ddp_timeout": {"least": 1},
    "eval_accumulation_steps": {"least": 1},
    "eval_delay": {"least": 0},
    "torch_empty_cache_steps": {"least": 1},
}
CHOICES = {name: Literal[tuple(trainer_log_levels)] for name in ("log_level", "log_level_replica")}


def checked_extra(extra: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The options in the types of TrainingArguments; one sentence in ``problems`` for each that is wrong.

    Names that TrainingArguments does not have pass: the configuration reports them beside what else is wrong with it.
    """
    hints, found = get_type_hints(PreferenceConfig), {}
    for name, value in extra.items():
        foreign = FOREIGN.get(name)
        if foreign is not None and foreign.new is None and value not in (None, False):
            problems.append(f"training.extra.{name} is not an option: {foreign.reason}; drop it")
        try:
            found[name] = _typed(value, CHOICES.get(name, hints.get(name)))
            in_bounds(found[name], BOUNDS.get(name, {}))
        except ValueError as error:
            problems.append(f"training.extra.{name} is {show(value)}; expected {error}")
    _check_accelerator(found.get("accelerator_config"), problems)
    return found


def _typed(value: Any, hint: Any) -> Any:
    """The value in the type of a field of TrainingArguments; as it is where there is no such field."""
    if hint is None:
        return value
    kinds = get_args(hint) if get_origin(hint) not in (None, list, dict, Literal) else (hint,)
    kinds = tuple(kind for kind in kinds if kind is not ParallelismConfig)  # no plain value
    if any(isinstance(kind, enum.EnumMeta) for kind in kinds):  # and str, which it is given as
        kinds = tuple(kind for kind in kinds if kind is not str)
    expected = []
    for kind in kinds:
        try:
            return _as(value, kind)
        except ValueError as error:
            expected.append(str(error))
    raise ValueError(" or ".join(expected))


def _as(value: Any, kind: Any) -> Any:
    if isinstance(kind, enum.EnumMeta):
        members: Mapping[str, enum.Enum] = kind.__members__
        return converted(value, Literal[tuple(one.value for one in members.values())])
    if get_origin(kind) is dict:
        kind = dict
    if get_origin(kind) is Literal and get_args(kind) == (False,):
        kind = bool
    return converted(value, kind)


def _check_accelerator(config: Any, problems: list[str]) -> None:
    key = "training.extra.accelerator_config"
    if isinstance(config, str) and not config.startswith("{") and not Path(config).is_file():
        problems.append(f"{key} is {show(config)}; expected keys with values or a .json file")
    if not isinstance(config, Mapping):
        return
    steps = config.get("gradient_accumulation_kwargs")
    for where, given, kind in (
        (key, config, AcceleratorConfig),
        (f"{key}.gradient_accumulation_kwargs", steps, GradientAccumulationPlugin),
    ):
        known = [one.name for one in dataclasses.fields(kind)]
        for name in given if isinstance(given, Mapping) else ():
            if name not in known:
                near = nearest(name, known) or f"; expected some of {', '.join(known)}"
                problems.append(f"{where}.{name} is unknown{near}")
