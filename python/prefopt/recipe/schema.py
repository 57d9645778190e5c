"""A whole recipe."""

from dataclasses import dataclass, field

from prefopt.options import Data, Lora, Loss, Model, Training


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run.

    ``name`` identifies it in messages: its file, or "recipe". ``notes`` become comments at the head of the run's
    recipe.
    """

    model: Model
    data: Data
    training: Training
    lora: Lora | None = None
    loss: Loss = field(default_factory=Loss)
    name: str = "recipe"
    notes: tuple[str, ...] = ()
