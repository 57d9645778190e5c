"""The recipe of each run: what all methods share, and which options a method does not take."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.options import OPTIONS, SECTIONS, Loss, in_force
from prefopt.recipe.schema import Recipe
from prefopt.redact import redacted
from prefopt.train.methods import METHODS, PAIRS, UNPAIRED

WARMUP = 10  # steps at the start that are not timed: caches, compilation, the first allocations
FEWEST_TIMED = 50  # steps; with fewer there is no figure of time


@dataclass(frozen=True)
class Plan:
    """What all runs share: ``sequences`` per micro-batch of methods that see both labels, and optimizer ``steps``."""

    recipe: Recipe
    methods: tuple[str, ...]
    sequences: int
    steps: int

    @property
    def timed(self) -> int:
        """Steps that are timed."""
        return max(0, self.steps - WARMUP)

    def batch(self, method: str) -> int:
        """Rows, pairs or answers of a method in a micro-batch."""
        return self.sequences if METHODS[method].data == UNPAIRED else self.sequences // 2

    def seen(self, method: str) -> int:
        """Sequences that a method trains on in an optimizer step."""
        batch = self.batch(method) * self.recipe.training.gradient_accumulation_steps
        return 2 * batch if METHODS[method].data == PAIRS else batch


def sequences_of(recipe: Recipe, methods: tuple[str, ...]) -> int:
    """Sequences in a micro-batch of the recipe; a pair has two.

    Raises:
        UserError: they cannot be halved into pairs, or into desirable and undesirable answers.
    """
    batch = recipe.training.per_device_train_batch_size
    if METHODS[recipe.loss.method].data == PAIRS:
        return 2 * batch
    halved = [method for method in methods if METHODS[method].data != UNPAIRED]
    if batch % 2 and halved:
        raise UserError(
            f"{recipe.name}: training.per_device_train_batch_size is {batch}; expected an even number of rows, which "
            f"{', '.join(halved)} can see as pairs (accumulate fewer micro-batches to keep the rows of a step)"
        )
    return batch


def steps_of(recipe: Recipe, count: int, batch: int) -> int:
    """Optimizer steps of the recipe, as ``transformers.Trainer`` counts them.

    Args:
        count: of the rows or pairs to train on.
        batch: rows or pairs in a micro-batch.

    Example:
        >>> from prefopt.recipe import make_recipe
        >>> content = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "training": {"output_dir": "run"}}
        >>> recipe = make_recipe(content, {"training.gradient_accumulation_steps": 4})
        >>> steps_of(recipe, 33, 2)  # 17 micro-batches: four steps of four, and one of one
        5
    """
    training = recipe.training
    if training.max_steps > 0:
        return training.max_steps
    an_epoch = math.ceil(math.ceil(count / batch) / training.gradient_accumulation_steps)
    return math.ceil(training.num_train_epochs * an_epoch)


def loss_of(recipe: Recipe, method: str) -> tuple[Loss, list[str]]:
    """The recipe's loss with another method, and the options that do not apply to it.

    Another method gets an option only if its default is the same: with another default (simpo's beta is per token,
    cpo's alpha weighs a likelihood) the name has another meaning. Options that the recipe's own method does not take go
    to every method that takes them.

    Example:
        >>> from prefopt.recipe import make_recipe
        >>> content = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "training": {"output_dir": "run"}}
        >>> recipe = make_recipe(content, {"loss.method": "enhanced_kto", "loss.beta": 0.3, "loss.alpha": 0.5})
        >>> loss, left_out = loss_of(recipe, "cpo")
        >>> loss.beta, loss.alpha, left_out
        (0.3, None, ['loss.alpha 0.5'])
    """
    home, needs_reference = recipe.loss.method, METHODS[method].needs_reference
    kept: dict[str, Any] = {"method": method}
    given: dict[str, Any] = {"method": home}
    left_out = []
    for name in OPTIONS:  # a switch comes before the options it enables
        value = getattr(recipe.loss, name)
        if value is None:
            continue
        here, there = in_force(given), in_force(kept)
        given[name] = value
        if name in there and (method == home or name not in here or here[name] == there[name]):
            kept[name] = value
        elif name not in here or value != here[name]:
            left_out.append(f"loss.{name} {value}")
    precompute = recipe.loss.precompute_ref_logps
    if precompute and not needs_reference:
        left_out.append("loss.precompute_ref_logps true")
    if recipe.model.ref_path is not None and not needs_reference:
        left_out.append(f"model.ref_path {recipe.model.ref_path}")
    return Loss(**kept, precompute_ref_logps=precompute and needs_reference), left_out


def recipe_of(plan: Plan, method: str, seed: int, folder: Path) -> Recipe:
    """The recipe of one run: its method, seed and batch size, and no files but metrics."""
    recipe = plan.recipe
    loss, _ = loss_of(recipe, method)
    training = replace(
        recipe.training,
        output_dir=str(folder),
        seed=seed,
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch(method),
        sampler="sequential",  # the rows are already in the order that all methods share
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        extra=recipe.training.extra | {"disable_tqdm": True},
    )
    reference = recipe.model.ref_path if METHODS[method].needs_reference else None
    model = replace(recipe.model, ref_path=reference)
    return replace(recipe, model=model, loss=loss, training=training, name=f"{recipe.name}, {method}")


def settings_of(plan: Plan, fingerprints: dict[str, str]) -> dict[str, Any]:
    """The settings that must be equal to continue a comparison, for JSON."""
    options = {
        f"{name}.{key}": value
        for name in SECTIONS
        if (section := getattr(plan.recipe, name)) is not None
        for key, value in redacted(asdict(section)).items()
    }
    options.pop("training.output_dir")
    return {"methods": list(plan.methods), "steps": plan.steps, "rows": fingerprints, **options}
