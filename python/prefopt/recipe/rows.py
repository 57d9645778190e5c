"""A recipe's rows: the data of a plan built once, read, checked, split and tokenised."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.data.build.choose import VALIDATION
from prefopt.data.build.manifest import MANIFEST, read_manifest
from prefopt.data.build.plan import Plan, make_plan
from prefopt.data.build.run import build
from prefopt.data.pairs import tokenize_pairs
from prefopt.data.read import LoadedRows, load_rows, split_by_group
from prefopt.data.sources import local_file
from prefopt.data.tokenize import Tokenized, tokenize_rows
from prefopt.data.write import file_digest
from prefopt.errors import DataError, UserError
from prefopt.options import EVAL_FRACTION, EVAL_FROM
from prefopt.paths import is_missing
from prefopt.recipe.schema import Recipe
from prefopt.train.methods import METHODS, PAIRS, UNPAIRED

logger = logging.getLogger(__name__)


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenized, Tokenized | None]:
    """Training rows and, if the recipe has any, evaluation rows; ``with_plan`` builds those of a plan first."""
    data = recipe.data
    refuse_missing_rows(recipe)
    options: dict[str, Any] = {
        "on_bad_row": data.on_bad_row,
        "label_map": data.label_map,
        "as_chat": data.as_chat,
    }
    train = load_rows(data.path, split=data.split, revision=data.revision, **options)
    held_out = None
    if data.eval_path is not None:
        held_out = load_rows(data.eval_path, split=data.eval_split, revision=data.eval_revision, **options)
    else:
        fraction, prompts = data.eval_fraction, train.counts["groups"]
        if fraction is None:
            fraction = EVAL_FRACTION if prompts >= EVAL_FROM else 0.0
            if not fraction and recipe.training.eval_strategy != "no":
                raise UserError(
                    f"{recipe.name}: training.eval_strategy needs rows, and {data.path} has {prompts} prompts, too few "
                    "to hold some out by default: set data.eval_path or data.eval_fraction"
                )
        if fraction:
            train, held_out = split_by_group(train, fraction, recipe.training.seed)
    encoded = _encode(recipe, train, tokenizer)
    for label in ("desirable", "undesirable"):
        if METHODS[recipe.loss.method].data == UNPAIRED and not encoded.counts[label]:
            raise DataError(
                f"{data.path} has no {label} rows among the {encoded.counts['rows']} to train on; "
                f"{recipe.loss.method} learns from the contrast and needs both"
            )
    return encoded, None if held_out is None else _encode(recipe, held_out, tokenizer)


def settled(recipe: Recipe, held_out: Tokenized | None) -> Recipe:
    """The recipe with the share of the prompts that were held out."""
    if recipe.data.eval_fraction is not None:
        return recipe
    fraction = 0.0 if held_out is None or recipe.data.eval_path is not None else EVAL_FRACTION
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, eval_fraction=fraction))


def refuse_missing_rows(recipe: Recipe) -> None:
    """Raise ``DataError`` for a path of rows where there is nothing; of a plan the rows may be built later."""
    data = recipe.data
    paths = {"data.path": None if data.plan else data.path, "data.eval_path": data.eval_path}
    for key, path in paths.items():
        if path is not None and is_missing(path):
            raise DataError(f"{recipe.name}: {key} is {path}, which does not exist; name the rows by --{key}")


def has_eval(recipe: Recipe) -> bool:
    """Whether there are, or may be, rows to evaluate on."""
    data = recipe.data
    return data.eval_path is not None or data.eval_fraction != 0 or _validates(recipe)


def with_plan(recipe: Recipe) -> Recipe:
    """The recipe with the rows of its plan in place: built into ``data.path``, or found there.

    A folder that is there is used as it is if it was built with the same arguments from the same files. The plan's
    validation split becomes ``data.eval_path`` if the recipe names no other evaluation rows.

    Raises:
        DataError: the folder was built with other arguments or from a file that has changed, or is none that was built;
            whatever ``build`` raises.
    """
    data = recipe.data
    if data.plan is None:
        return recipe
    plan, folder = make_plan([data.plan]), Path(data.path).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        _refuse_outdated(folder, plan, data.plan)
    else:
        print(f"data: building {data.plan} into {folder}", flush=True)
        print(build(plan, folder).table, flush=True)
    return with_validation(recipe)


def with_validation(recipe: Recipe) -> Recipe:
    """The recipe, evaluated on its plan's validation split where it names no other rows."""
    if not _validates(recipe):
        return recipe
    data = dataclasses.replace(recipe.data, eval_path=recipe.data.path, eval_split=VALIDATION)
    return dataclasses.replace(recipe, data=data)


def _refuse_outdated(folder: Path, plan: Plan, name: str) -> None:
    """Refuse a folder that the plan would not build again as it is."""
    manifest = read_manifest(folder)
    remedy = "remove the folder, or choose another data.path"
    # as JSON, for a tuple comes back as a list
    same = manifest["arguments"] == json.loads(json.dumps(plan.described()))
    if not same or len(manifest["sources"]) != len(plan.sources):
        raise DataError(
            f"{folder} was built with other arguments than data.plan {name} has now (see its {MANIFEST}); {remedy}"
        )
    for source, read in zip(plan.sources, manifest["sources"], strict=True):
        file, digest = local_file(source.path, source.split), read.get("sha256_of_file")
        if file is not None and digest is not None and file_digest(file)[0] != digest:
            raise DataError(
                f"{file} has changed since {folder} was built from it; {remedy}, or set data.plan to null to use the "
                "folder as it is"
            )


def _validates(recipe: Recipe) -> bool:
    """Whether the evaluation rows are the validation split of the plan."""
    data = recipe.data
    if data.plan is None or data.eval_path is not None or data.eval_fraction:
        return False
    return make_plan([data.plan]).validation > 0


def _encode(recipe: Recipe, loaded: LoadedRows, tokenizer: PreTrainedTokenizerBase) -> Tokenized:
    data = recipe.data
    tokenize = tokenize_pairs if METHODS[recipe.loss.method].data == PAIRS else tokenize_rows
    encoded = tokenize(
        loaded,
        tokenizer,
        max_length=data.max_length,
        on_bad_row=data.on_bad_row,
        chat_template_kwargs=data.chat_template_kwargs,
    )
    return dataclasses.replace(encoded, bad=[*loaded.bad, *encoded.bad])
