"""Checks before any model or data is loaded: missing files, packages and devices, and bad options."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from prefopt.data.build.plan import make_plan
from prefopt.data.sources import FILES, open_rows
from prefopt.data.template import template_problems
from prefopt.errors import DataError, UserError, first_line
from prefopt.option_values import nearest, show
from prefopt.options import Lora
from prefopt.recipe.models import chat_template, located
from prefopt.recipe.rows import refuse_missing_rows
from prefopt.recipe.schema import Recipe
from prefopt.train import PreferenceConfig
from prefopt_kernels import explain

# What torch, transformers and the packages of optimizers raise for bad arguments, which they check as they like.
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Optimizers that are made from the whole model; here only their package is checked.
OF_A_MODEL = ("apollo", "galore", "lomo")
UNKNOWN_LENGTH = 10_000  # steps for a scheduler's trial where the recipe counts epochs


def check_names(recipe: Recipe) -> list[str]:
    """One sentence for each name in the recipe that transformers or re would refuse."""
    training, found = recipe.training, []
    for key, value, kind in (
        ("optim", training.optim, OptimizerNames),
        ("lr_scheduler_type", training.lr_scheduler_type, SchedulerType),
    ):
        known = [one.value for one in kind]
        if value not in known:
            longer = next((one for one in known if one.startswith(value)), value)
            hint = nearest(longer, known) or f"; expected one of {', '.join(known)}"
            found.append(f"training.{key} is {show(value)}, which transformers does not have{hint}")
    named = [training.report_to] if isinstance(training.report_to, str) else training.report_to
    if named not in (["none"], ["all"]):
        found += [problem for name in named if (problem := _of_tracker(name))]
    if recipe.lora is not None:
        found += _of_targets(recipe.lora)
    key = "data.chat_template_kwargs"
    return found + template_problems(recipe.data.chat_template_kwargs, key)


def try_libraries(config: PreferenceConfig) -> list[str]:
    """One sentence for each option that torch or transformers refuses in a trial on one weight and one row."""
    return [*_try_optimizer(config), *_try_loader(config), *_try_checkpointing(config)]


def check_device(recipe: Recipe, config: PreferenceConfig) -> None:
    """Raise ``UserError`` for what the device of this process cannot do."""
    device = config.device
    if config.fp16 and device.type == "cpu":
        raise UserError(
            f"{recipe.name}: training.fp16 is true on a CPU, which would train in float32; set it to false, or "
            "training.bf16 to true"
        )
    if config.backend != "auto":
        hidden = torch.zeros(2, 8, device=device)
        why_not = explain(hidden, torch.zeros(16, 8, device=device))[config.backend]
        if why_not is not None:
            raise UserError(
                f"{recipe.name}: training.backend is {config.backend}, which cannot run here: {why_not}; auto takes "
                "the fastest that can"
            )


def check_inputs(recipe: Recipe, folder: Path) -> None:
    """Raise ``UserError`` or ``DataError`` for a missing file or folder, or a run folder that cannot be written."""
    if not str(folder).isprintable():  # transformers does not find checkpoints in such a folder
        raise UserError(
            f"{recipe.name}: training.output_dir is {str(folder)!r}, which has characters that cannot be printed"
        )
    _check_writable(folder, f"{recipe.name}: training.output_dir")
    cache = recipe.training.extra.get("reference_cache_dir")
    if cache is not None:
        _check_writable(Path(cache), f"{recipe.name}: training.extra.reference_cache_dir")
    located(recipe.model.path, f"{recipe.name}: model.path")
    if recipe.model.ref_path is not None:
        located(recipe.model.ref_path, f"{recipe.name}: model.ref_path")
    chat_template(recipe)
    data = recipe.data
    refuse_missing_rows(recipe)
    if data.plan is None:
        _with_key("data.path", recipe, lambda: open_rows(data.path, data.split, data.revision))
    else:
        _with_key("data.plan", recipe, lambda: _check_plan(str(data.plan), Path(data.path).expanduser()))
    if data.eval_path is not None:
        _with_key(
            "data.eval_path",
            recipe,
            lambda: open_rows(data.eval_path, data.eval_split, data.eval_revision),
        )


def _with_key(key: str, recipe: Recipe, check: Callable[[], Any]) -> None:
    try:
        check()
    except DataError as error:
        raise DataError(f"{recipe.name}: {key}: {error}") from None
    except OSError as error:  # such as a name that is too long
        raise DataError(f"{recipe.name}: {key}: {error.strerror}") from None


def _check_plan(name: str, folder: Path) -> None:
    plan = make_plan([name])
    if folder.is_dir() and any(folder.iterdir()):
        return  # built before; its sources may be gone
    for source in plan.sources:
        path = Path(source.path).expanduser()
        if path.suffix.lower() in FILES and not path.exists():
            raise DataError(f"there is no file {source.path}, which is the source {source.name}")


def _check_writable(folder: Path, key: str) -> None:
    try:
        there = folder.absolute()
        while not there.exists():
            there = there.parent
    except OSError as error:
        raise UserError(f"{key} cannot be written: {error.strerror}") from None
    if not there.is_dir():
        raise UserError(f"{key} is {folder}, but {there} is a file; expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key} is {folder}, but {there} cannot be written to")


def _of_tracker(name: str) -> str | None:
    if name not in INTEGRATION_TO_CALLBACK:
        expected = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        hint = nearest(name, INTEGRATION_TO_CALLBACK) or f"; expected none, all or some of {expected}"
        return f"training.report_to has {show(name)}, which transformers does not have{hint}"
    # transformers does not list these two as available, whether they are installed or not
    if name in ("azure_ml", "flyte") or name in get_available_reporting_integrations():
        return None
    return f"training.report_to has {name}, which is not installed: pip install {name}, or leave it out"


def _of_targets(lora: Lora) -> list[str]:
    if not isinstance(lora.target_modules, str):
        return []
    try:
        re.compile(lora.target_modules)
    except re.error as error:
        return [f"lora.target_modules is {show(lora.target_modules)}, which is no regular expression: {error}"]
    return []


def _try_optimizer(config: PreferenceConfig) -> list[str]:
    name = OptimizerNames(config.optim).value
    try:
        optimizer = _optimizer(config, name)
    except LIBRARY_ERRORS as error:
        return [f"training.optim is {name}: {first_line(error)}"]
    if optimizer is None:
        return []
    name, kwargs = SchedulerType(config.lr_scheduler_type).value, cast(dict, config.lr_scheduler_kwargs or {})
    steps = config.max_steps if config.max_steps > 0 else UNKNOWN_LENGTH
    try:
        get_scheduler(name, optimizer, 0, steps, kwargs)  # computes the first learning rate
    except LIBRARY_ERRORS as error:
        reason = first_line(error)
        if kwargs:
            key = "training.extra.lr_scheduler_kwargs"
            return [f"{key} is {show(kwargs)}, which {name} refuses: {reason}"]
        return [
            f"training.lr_scheduler_type is {name}: {reason}; set what it needs in training.extra.lr_scheduler_kwargs"
        ]
    return []


def _try_loader(config: PreferenceConfig) -> list[str]:
    try:
        DataLoader(
            cast(Dataset, [0]),
            num_workers=config.dataloader_num_workers,
            prefetch_factor=config.dataloader_prefetch_factor,
            persistent_workers=config.dataloader_persistent_workers,
            multiprocessing_context=config.dataloader_multiprocessing_context,
        )
    except LIBRARY_ERRORS as error:
        return [f"training.extra has options of the data loader that it refuses: {first_line(error)}"]
    return []


def _try_checkpointing(config: PreferenceConfig) -> list[str]:
    kwargs = cast(dict, config.activation_checkpointing_kwargs)  # __post_init__ parses text
    if not config.activation_checkpointing or not kwargs:
        return []
    try:
        checkpoint(torch.nn.Identity(), torch.zeros(1), **({"use_reentrant": False} | kwargs))
    except LIBRARY_ERRORS as error:
        key = "training.extra.gradient_checkpointing_kwargs"
        return [f"{key} is {show(kwargs)}: {first_line(error)}"]
    return []


def _optimizer(config: PreferenceConfig, name: str) -> torch.optim.Optimizer | None:
    """The optimizer of one weight; None for one that needs the model."""
    needs_model = any(kind in name for kind in OF_A_MODEL)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(config)
    except ImportError:
        raise
    except Exception:  # an optimizer made from the whole model fails without it in its own way
        if needs_model:
            return None
        raise
    return None if needs_model else kind([torch.nn.Parameter(torch.zeros(1))], **options)
