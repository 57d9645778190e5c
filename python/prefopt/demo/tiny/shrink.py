"""A recipe made tiny: what must shrink is overridden, said and written down; all else is the recipe's own."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from prefopt.errors import UserError
from prefopt.recipe.load import load_recipe
from prefopt.recipe.schema import Recipe

STEPS = 20
LEARNING_RATE = 2e-3  # an adapter on weights that are random moves little in so few steps
INPUTS = "-inputs"  # behind the run folder's name: model, sources, plan and built rows
MARKER = "tiny.json"


def tiny_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe on a tiny model and embedded rows, both of which are made here, beside the run folder.

    The model has the architecture and the chat template of the real one's family; the rows have the published schemas
    of the plan's sources and go through its converters and stages.

    Args:
        path, overrides: as for ``load_recipe``; an override wins over what would shrink.

    Returns:
        The recipe, whose ``notes`` list what was changed. RUN-inputs then holds the model, the sources and the plan.

    Raises:
        UserError: as ``load_recipe``; a model whose family is not known here; RUN-inputs is something else.
    """
    given = dict(overrides or {})
    whole = load_recipe(path, given)
    changes = {
        key: value for key, value in shrunk(whole, given).items() if key not in given and value != _value(whole, key)
    }
    notes = [f"{whole.name} --tiny: a trial of the whole way, not the published run. Changed:"]
    notes += [f"  {key} {_shown(_value(whole, key))} -> {_shown(value)}" for key, value in changes.items()]
    recipe = dataclasses.replace(_changed(whole, changes), notes=tuple(notes))
    if changes.keys() & {"model.path", "data.path", "data.plan"}:
        _write_inputs(whole, _inputs(recipe.training.output_dir))
    return recipe


def shrunk(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option that --tiny sets, with its value, whether it differs from the recipe's or not."""
    folder = recipe.training.output_dir
    if "training.output_dir" not in given:
        folder += "-tiny"
    inputs = _inputs(folder)
    planned = recipe.data.plan is not None
    return {
        "model.path": str(inputs / "model"),
        "model.revision": None,
        "model.dtype": "float32",
        "data.plan": str(inputs / "plan.yaml") if planned else None,
        "data.path": str(inputs / ("data" if planned else "rows.jsonl")),
        "training.output_dir": folder,
        "training.learning_rate": LEARNING_RATE,
        "training.max_steps": STEPS,
        "training.bf16": False,
        "training.fp16": False,
        "training.use_cpu": True,
        "training.logging_steps": 1,
    }


def _inputs(folder: str) -> Path:
    # absolute, so that recipe and adapter can be used from any folder
    path = Path(folder).expanduser().resolve()
    return path.with_name(path.name + INPUTS)


def _write_inputs(whole: Recipe, folder: Path) -> None:
    """Model, sources and plan; a second start finds them again, as do other processes."""
    said = {"model": whole.model.path, "plan": whole.data.plan, "seed": whole.training.seed}
    named = hashlib.sha256(os.fsencode(folder)).hexdigest()
    # torchrun starts all processes at once: the first one here writes, the others wait
    with FileLock(Path(tempfile.gettempdir()) / f"prefopt-{named[:16]}.lock"):
        if folder.exists():
            if _read(folder / MARKER) != said:
                raise UserError(
                    f"{folder} is there and not what --tiny makes for {whole.name}; remove it, or choose another "
                    "training.output_dir"
                )
            return
        from prefopt.demo.tiny.inputs import (
            write_inputs,
        )  # torch and transformers take seconds to import

        write_inputs(whole, folder, {MARKER: json.dumps(said, indent=2) + "\n"})


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with the options at dotted keys replaced."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        options = dataclasses.replace(getattr(recipe, section), **{name: value})
        recipe = dataclasses.replace(recipe, **{section: options})
    return recipe


def _value(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
