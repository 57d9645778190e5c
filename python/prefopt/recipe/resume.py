"""The contents of a run folder, and whether a recipe may resume it."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from prefopt.errors import TRACEBACK_NAME, UserError
from prefopt.files import LOCK_NAME, TEMPORARY
from prefopt.options import SECTIONS, Training
from prefopt.paths import RECIPE_NAME, SOURCES, absolute_paths, is_missing
from prefopt.recipe.load import load_recipe
from prefopt.recipe.memory import NAME as MEMORY
from prefopt.recipe.schema import Recipe
from prefopt.redact import redacted
from prefopt.train.checkpoint import PARTIAL
from prefopt.train.run_folder import RECORD, read_record

# What a resumed run may change: budget, logging, saving, and when to evaluate. The rest is the experiment.
MAY_CHANGE = {
    "training": "max_steps num_train_epochs logging_steps report_to eval_strategy eval_steps save_strategy save_steps "
    "save_total_limit",
    "training.extra": "disable_tqdm eval_delay eval_on_start log_level log_level_replica logging_first_step "
    "logging_strategy run_name save_only_model push_to_hub hub_model_id hub_revision hub_strategy "
    "hub_private_repo hub_always_push",
}
# Written before the first log, checkpoint or saved model: a new start may overwrite them.
LEFT_BY_A_START = {*(RECORD, RECIPE_NAME, "bad_rows.jsonl", MEMORY, PARTIAL, LOCK_NAME, TRACEBACK_NAME)}


@dataclass(frozen=True)
class Previous:
    """The run that a folder holds; ``changes`` as in ``RunFolder``."""

    folder: Path
    record: dict
    has_checkpoint: bool
    changes: dict[str, list]

    def finished_at(self, training: Training) -> int | None:
        """The step of a run that has everything ``training`` asks for, its report included; None for any other."""
        steps = self.record.get("steps", {})
        if not self.record.get("complete") or steps.get("done") is None:
            return None
        planned = training.max_steps
        if planned <= 0:
            planned = math.ceil(training.num_train_epochs * steps["per_epoch"])
        return steps["done"] if steps["done"] >= planned else None

    def with_its_fraction(self, recipe: Recipe) -> Recipe:
        """The recipe, with this run's share of held-out prompts where it names none."""
        if recipe.data.eval_fraction is not None:
            return recipe
        fraction = load_recipe(self.folder / RECIPE_NAME).data.eval_fraction
        return replace(recipe, data=replace(recipe.data, eval_fraction=fraction))

    def refuse_other_rows(self, record: dict, name: str) -> None:
        """Compare the rows and the number of processes with those that ``record`` has now.

        Raises:
            UserError: they differ.
        """
        problems = []
        for key, option in (("train", "data.path"), ("eval", "data.eval_path")):
            before, now = (one.get("data", {}).get(key, {}) for one in (self.record, record))
            if "fingerprint" in before and before["fingerprint"] != now.get("fingerprint"):
                counts = f"{before.get('rows')} rows then, {now.get('rows')} now"
                problems.append(f"the rows of {option}, or the tokenizer that encodes them, have changed ({counts})")
        before, now = (one.get("world_size") for one in (self.record, record))
        if before not in (None, now):
            problems.append(f"it was trained by {before} processes, now there are {now}")
        if problems:
            raise UserError(
                f"{name}: --resume cannot continue the run in {self.folder}: {'; '.join(problems)}. Restore them, or "
                "start a new run in another folder"
            )


def refuse_used(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder that holds more than a start that failed before its first log has left."""
    if not _is_unused(folder):
        raise UserError(
            f"{recipe.name}: training.output_dir {folder} is not empty; choose another folder, or continue the run "
            "with --resume"
        )


def previous_run(recipe: Recipe, content: dict, folder: Path) -> Previous | None:
    """The run in ``folder``, which ``recipe`` is to continue; None if there is none. Writes nothing.

    Args:
        recipe: as it was given.
        content: its sections as they would be stored.
        folder: its run folder.

    Raises:
        UserError: the folder holds something else, or a run of another recipe.
    """
    stored = folder / RECIPE_NAME
    if not stored.is_file():
        if _is_unused(folder):
            return None
        raise UserError(
            f"{recipe.name}: training.output_dir {folder} has no {RECIPE_NAME}, so there is no run to resume; choose "
            "another folder"
        )
    before = absolute_paths(redacted(sections_of(load_recipe(stored))))
    if content["data"]["eval_fraction"] is None:
        content["data"]["eval_fraction"] = before["data"]["eval_fraction"]
    changes = differences(before, content)
    refused = {key: pair for key, pair in changes.items() if not _may_change(key, pair[0])}
    if refused:
        lines = (f"  {key}: {json.dumps(a)} in the run, {json.dumps(b)} now" for key, (a, b) in refused.items())
        raise UserError(
            f"{recipe.name}: --resume continues the run in {folder}, but the recipe differs from its {RECIPE_NAME}:\n"
            + "\n".join(lines)
            + "\nSet these options back, or start a new run in another folder"
        )
    previous = Previous(folder, read_record(folder), get_last_checkpoint(str(folder)) is not None, changes)
    finished = previous.finished_at(recipe.training) is not None
    if previous.record.get("complete") and not finished and not previous.has_checkpoint:
        raise UserError(
            f"{recipe.name}: the run in {folder} is finished and has no checkpoint to continue from "
            "(training.save_strategy); start a new run in another folder"
        )
    return previous


def differences(before: dict, now: dict) -> dict[str, list]:
    """{dotted key: [before, now]} of two recipes' sections; the run folder itself is not compared.

    Example:
        >>> differences({"loss": {"beta": 0.1}, "lora": None}, {"loss": {"beta": 0.2}, "lora": {"r": 8}})
        {'loss.beta': [0.1, 0.2], 'lora': [None, {'r': 8}]}
    """
    found: dict[str, list] = {}
    before, now = json.loads(json.dumps([before, now]))  # tuples become the lists that YAML has
    for section, options in now.items():
        if options is None or before[section] is None:
            values = {section: [before[section], options]}
        else:
            first, second = (_flat(section, one) for one in (before[section], options))
            values = {key: [first.get(key), second.get(key)] for key in first | second}
        found |= {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    found.pop("training.output_dir", None)
    return found


def _is_unused(folder: Path) -> bool:
    return not folder.is_dir() or all(
        one.name in LEFT_BY_A_START or TEMPORARY.fullmatch(one.name) or _before_training(one)
        for one in folder.iterdir()
    )


def _before_training(file: Path) -> bool:
    """Whether these are metrics of the evaluation before the first step and no others."""
    return file.name == "metrics.jsonl" and '"loss"' not in file.read_text(encoding="utf-8", errors="replace")


def _flat(section: str, options: dict) -> dict[str, Any]:
    extra = options.get("extra", {})
    return {f"{section}.{key}": value for key, value in options.items() if key != "extra"} | {
        f"{section}.extra.{key}": value for key, value in extra.items()
    }


def sections_of(recipe: Recipe) -> dict[str, dict | None]:
    """A recipe as nested dictionaries."""
    sections = {name: getattr(recipe, name) for name in SECTIONS}
    return {name: None if one is None else asdict(one) for name, one in sections.items()}


def _may_change(key: str, before: Any) -> bool:
    section, _, option = key.rpartition(".")
    # a file that was moved has a new path; its rows are compared nevertheless
    moved = key in SOURCES and isinstance(before, str) and is_missing(before)
    return moved or option in MAY_CHANGE.get(section, "").split()
