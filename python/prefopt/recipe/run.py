"""A recipe carried out: data, model, training, evaluation, saving, report."""

import dataclasses
import json
import logging
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from prefopt.data.labels import label_table
from prefopt.data.tokenize import Tokenized
from prefopt.errors import DataError, UserError, first_line, is_first_rank, traceback_in
from prefopt.files import only_writer, write_whole
from prefopt.models import require_bitsandbytes
from prefopt.option_values import show
from prefopt.options import options_of
from prefopt.paths import RECIPE_NAME, absolute_paths
from prefopt.recipe.extra import checked_extra
from prefopt.recipe.memory import measured
from prefopt.recipe.models import (
    adapter_config,
    check_targets,
    load_model,
    load_tokenizer,
    quantize_for,
)
from prefopt.recipe.ready import LIBRARY_ERRORS, check_device, check_inputs, check_names, try_libraries
from prefopt.recipe.resume import Previous, previous_run, refuse_used, sections_of
from prefopt.recipe.rows import has_eval, load_data, settled, with_plan, with_validation
from prefopt.recipe.schema import Recipe
from prefopt.redact import redacted
from prefopt.report import write_report
from prefopt.report.read import read_run
from prefopt.report.summary import closing_lines
from prefopt.train import PreferenceConfig, PreferenceTrainer
from prefopt.train.methods import METHODS

__all__ = ["load_data", "load_model", "preference_config", "run", "write_recipe"]

logger = logging.getLogger(__name__)


def run(recipe: Recipe, *, resume: bool = False) -> Path:
    """Train as the recipe says.

    What can fail early does: options, then the run folder, then the rows, then the weights.

    Args:
        recipe: from ``load_recipe`` or ``make_recipe``.
        resume: continue the run in the run folder from its newest whole checkpoint. A finished run is left as it is.

    Returns:
        The run folder, with the model or adapter, metrics, report and card.

    Raises:
        UserError: options that cannot be combined, a run folder in use, a run of another recipe or of other rows, a
            model that cannot be loaded.
        CheckpointError: the run folder has checkpoints, and none of them is whole.
        DataError: rows that cannot be trained on.
    """
    config = preference_config(recipe)
    check_device(recipe, config)
    folder = Path(recipe.training.output_dir).expanduser()
    check_inputs(recipe, folder)
    # The first process of a distributed run holds the lock for all.
    lock = only_writer(folder, f"{recipe.name}: training.output_dir") if is_first_rank() else None
    with lock or nullcontext():
        return _run(recipe, config, folder, resume)


def _run(recipe: Recipe, config: PreferenceConfig, folder: Path, resume: bool) -> Path:
    previous = _previous(recipe, config, folder, resume)
    step = previous and previous.finished_at(recipe.training)
    if step is not None:
        logger.warning("%s: training is finished (step %d); nothing is changed", folder, step)
        return folder
    tokenizer = load_tokenizer(recipe)
    with config.main_process_first(local=False, desc="data"):  # the others read what it has built
        recipe = with_plan(recipe)
    if previous is not None:
        recipe = previous.with_its_fraction(recipe)
    train, held_out = load_data(recipe, tokenizer)
    recipe = settled(recipe, held_out)
    trainer = make_trainer(recipe, config, tokenizer, train, held_out)
    checkpoint = None
    if previous is not None:
        previous.refuse_other_rows(trainer.run_folder.record, recipe.name)
        checkpoint = trainer.verified(previous.has_checkpoint or None)
        trainer.run_folder.changes = previous.changes
    if trainer.is_world_process_zero():
        write_recipe(recipe, config, folder)
    with traceback_in(folder):
        # Before the first step, so that the verdict has what the model was like.
        trainer.args.eval_on_start |= held_out is not None and checkpoint is None
        with measured(folder, trainer.args.device, writes=trainer.is_world_process_zero()):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(folder))
        if held_out is not None:
            metrics = trainer.evaluate()
            # without a reference model, or with another one, the margin before training is not 0
            from_zero = config.spec.needs_reference and recipe.model.ref_path is None
            if trainer.is_world_process_zero() and from_zero:
                _write_summary(folder, metrics, held_out)
        if trainer.is_world_process_zero():
            write_report(folder)
            print("\n".join(closing_lines(read_run(folder))), flush=True)
    trainer.run_folder.update(complete=True)
    return folder


def preference_config(recipe: Recipe) -> PreferenceConfig:
    """The trainer's configuration; every option that does not fit is named with its dotted key."""
    training = dataclasses.asdict(recipe.training)
    extra = training.pop("extra")
    own = options_of("training").keys() | options_of("loss").keys() | {"max_length", "on_bad_row"}
    problems = [f"training.extra.{key} has a place of its own: {_home(key)}" for key in extra if key in own]
    if recipe.training.eval_strategy != "no" and not has_eval(recipe):
        problems.append("training.eval_strategy needs rows: set data.eval_path or data.eval_fraction")
    if recipe.data.eval_path is not None and recipe.data.eval_fraction:
        problems.append("data.eval_path and data.eval_fraction are both set; expected one of them")
    try:
        label_table(recipe.data.label_map)
    except DataError as error:
        problems.append(f"data.{error}")
    if recipe.model.ref_path is not None and not METHODS[recipe.loss.method].needs_reference:
        problems.append(f"model.ref_path is set, but {recipe.loss.method} has no reference model; drop it")
    elif recipe.lora is not None and recipe.model.ref_path is not None:
        problems.append("model.ref_path with lora: the reference is the model without the adapter; drop one of them")
    if all(isinstance(key, str) and key.isidentifier() for key in extra):
        extra = checked_extra(extra, problems)
    else:
        problems.append("training.extra has keys that are not names")
    problems += check_names(recipe)
    if problems:
        raise UserError("\n".join(f"{recipe.name}: {problem}" for problem in problems))
    quantize_for(recipe)  # refuses 4 bits that cannot be trained
    if "bnb" in recipe.training.optim or "8bit" in recipe.training.optim:
        require_bitsandbytes(f"{recipe.name}: training.optim is {recipe.training.optim}")
    options = training | dataclasses.asdict(recipe.loss) | extra
    options |= {"max_length": recipe.data.max_length, "on_bad_row": recipe.data.on_bad_row}
    options["activation_checkpointing"] = options.pop("gradient_checkpointing")  # its older, better-known name
    try:
        config = PreferenceConfig(**options)
    except UserError as error:
        raise UserError(f"{recipe.name}: {_dotted(str(error), extra)}") from None
    except Exception as error:  # whatever transformers and accelerate raise
        culprit = _culprit(options)
        where = f"{_key(culprit, extra)} is {show(options[culprit])}: " if culprit else ""
        if not culprit and extra:
            where = f"training.extra with {', '.join(extra)}: "
        raise UserError(f"{recipe.name}: {where}{first_line(error)}") from error
    problems = try_libraries(config)
    if problems:
        raise UserError("\n".join(f"{recipe.name}: {problem}" for problem in problems))
    return config


def _culprit(options: dict[str, Any]) -> str | None:
    """The option without which the configuration is accepted, if it is a single one."""
    for name in reversed(options):  # first those of training.extra
        try:
            PreferenceConfig(**{key: value for key, value in options.items() if key != name})
        except LIBRARY_ERRORS:
            continue
        return name
    return None


def write_recipe(recipe: Recipe, config: PreferenceConfig, folder: Path) -> Path:
    """Write the recipe that repeats the run: every option spelled out, local paths absolute, secrets left out."""
    content = _spelled_out(recipe, config)
    path = folder / RECIPE_NAME
    head = "".join(f"# {line}\n" for note in recipe.notes for line in note.splitlines())
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(path, head + text)
    return path


def make_trainer(
    recipe: Recipe,
    config: PreferenceConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Tokenized,
    held_out: Tokenized | None,
) -> PreferenceTrainer:
    """The trainer of a recipe, with its model, reference and adapter loaded."""
    model = load_model(recipe)
    if recipe.lora is not None:
        check_targets(model, recipe.lora.target_modules, f"{recipe.name}: lora.target_modules")
    reference = None if recipe.model.ref_path is None else load_model(recipe, reference=True)
    try:
        return PreferenceTrainer(
            model,
            config,
            train,
            held_out,
            processing_class=tokenizer,
            ref_model=reference,
            peft_config=None if recipe.lora is None else adapter_config(recipe.lora),
        )
    except DataError:
        raise
    except ValueError as error:
        raise UserError(f"{recipe.name}: {error}") from error


def _spelled_out(recipe: Recipe, config: PreferenceConfig) -> dict:
    """The sections as they are stored.

    Where null stood for the method's default, that is in its place; what is still null has no place in the method.
    """
    content = sections_of(recipe)
    content["loss"] = {name: getattr(config, name) for name in options_of("loss")}
    content["training"] = asdict(recipe.training) | {"sampler": config.sampler}
    return absolute_paths(redacted(content))


def _previous(recipe: Recipe, config: PreferenceConfig, folder: Path, resume: bool) -> Previous | None:
    """The run to continue; a folder in use is refused unless it is to be resumed."""
    if not resume:
        # The other processes of a distributed run may find what the first has already written.
        if is_first_rank():
            refuse_used(recipe, folder)
        return None
    previous = previous_run(recipe, _spelled_out(with_validation(recipe), config), folder)
    if previous is None or not previous.has_checkpoint:
        logger.warning("%s has no checkpoint; training starts at the beginning", folder)
    return previous


def _write_summary(folder: Path, metrics: dict, held_out: Tokenized) -> None:
    """What the report shows first: how far apart desirable and undesirable held-out rows are in reward."""
    margin = metrics.get("eval_rewards/margins")
    if margin is None:  # held-out rows of one class have no margin
        return
    summary = {
        "metric": "reward margin on held-out rows",
        "before": 0.0,  # policy and reference are one model before the first step
        "after": margin,
        "n": held_out.counts["rows"],
    }
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def _home(option: str) -> str:
    """The dotted key of an option of ``PreferenceConfig``."""
    sections = ("loss", "training", "data")  # not lora, which has an alpha of its own
    return next((f"{one}.{option}" for one in sections if option in options_of(one)), option)


def _key(option: str, extra: dict) -> str:
    return f"training.extra.{option}" if option in extra else _home(option)


def _dotted(message: str, extra: dict) -> str:
    """The trainer's problems, one a line and each beginning with an option, with the dotted keys of a recipe."""
    lines = []
    for line in message.splitlines():
        name, _, rest = line.strip().partition(" ")
        lines.append(f"  {_key(name, extra)} {rest}" if line.startswith("  ") else line)
    return "\n".join(lines)
