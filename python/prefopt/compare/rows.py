"""The same sequences for every method: as pairs, as two rated rows each, or their desirable halves alone."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from prefopt.compare.plan import paired
from prefopt.data import LabelBalancedSampler, LoadedRows, Tokenized
from prefopt.data.collate import SIDES
from prefopt.data.pairs import are_pairs, desirable_only
from prefopt.errors import DataError, UserError
from prefopt.evaluate.held_out import HeldOut
from prefopt.options import Loss
from prefopt.recipe.rows import load_data, with_plan
from prefopt.recipe.schema import Recipe
from prefopt.train.methods import ANSWERS, METHODS, PAIRS, RATED


@dataclass(frozen=True)
class Rows:
    """What all methods train on and are judged on: pairs if one of the methods needs them, rated rows otherwise."""

    train: Tokenized
    held_out: Tokenized

    @property
    def are_pairs(self) -> bool:
        """Whether they are pairs."""
        return are_pairs(self.train)

    def fingerprints(self) -> dict[str, str]:
        """Of both."""
        return {"train": self.train.fingerprint, "held_out": self.held_out.fingerprint}

    def shared_prompts(self) -> int:
        """How many prompts of the held-out rows are trained on."""
        return len(set(self.held_out.dataset["group"][:]) & set(self.train.dataset["group"][:]))


def load(recipe: Recipe, methods: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The recipe's rows in the form that serves all the methods.

    Raises:
        DataError: bad rows, or none that serve a method.
        UserError: the recipe sets no rows aside.
    """
    wanted = paired(methods) or [method for method in methods if METHODS[method].data == RATED]
    try:
        built = with_plan(replace(recipe, loss=Loss(method=wanted[0])))
        train, held_out = load_data(built, tokenizer)
    except DataError as error:
        raise DataError(f"for {', '.join(wanted)}: {error}", error.bad) from None
    if held_out is None:
        raise UserError(
            f"{recipe.name} sets no rows aside that the methods could be compared on; add --data.eval_fraction 0.1, or "
            "data.eval_path"
        )
    return Rows(train, held_out)


def rows_of(method: str, train: Tokenized, seed: int, window: int) -> Tokenized:
    """The rows of a method in the order of a seed, to be read one after the other.

    Args:
        method: from METHODS.
        train: pairs or, where no method needs them, rated rows.
        seed: of the order, the same for all methods.
        window: rated rows of an optimizer step, over which the labels are spread evenly where the rows are no pairs.
    """
    kind = METHODS[method].data
    if are_pairs(train):
        order = np.random.default_rng(seed).permutation(len(train.dataset))
        pairs = _ordered(train, order, seed)
        if kind == PAIRS:
            return pairs
        rated = as_rated(pairs)
    else:
        labels = train.dataset["label"][:]
        rated = _ordered(train, list(LabelBalancedSampler(labels, window, seed)), seed)
    return desirable_only(rated, "train") if kind == ANSWERS else rated


def as_rated(pairs: Tokenized) -> Tokenized:
    """Two rated rows of each pair, one after the other, the chosen one first; ``row`` counts them."""
    n = len(pairs.dataset)
    sides = []
    for side in SIDES:
        names = {f"{side}_{part}": part for part in ("prompt_ids", "completion_ids", "line")}
        half = pairs.dataset.select_columns([*names, "group"]).rename_columns(names)
        sides.append(half.add_column("label", [side == "chosen"] * n))
    order = np.arange(2 * n).reshape(2, n).T.ravel()  # a half of each in turn
    dataset = concatenate_datasets(sides).select(order).add_column("row", list(range(2 * n)))
    key = hashlib.sha256(f"rated|{pairs.fingerprint}".encode()).hexdigest()
    counts = pairs.counts | {"rows": 2 * n, "desirable": n, "undesirable": n}
    return replace(pairs, dataset=dataset, counts=counts, fingerprint=key)


def judged_on(held_out: Tokenized) -> HeldOut:
    """Held-out rows as the preference evaluation takes them; the number of a pair stands for its line."""
    if are_pairs(held_out):
        rated = as_rated(held_out)
        lines = [row // 2 for row in range(len(rated.dataset))]
    else:
        rated = held_out
        lines = list(range(1 + max(rated.dataset["row"][:])))
    loaded = LoadedRows(Dataset.from_dict({"line": lines}), name="held-out rows")
    return HeldOut(loaded, rated)


def sequences_of_steps(count: int, batch: int, accumulation: int, steps: int) -> list[int]:
    """How many rows (or pairs) each optimizer step has; the last one of an epoch may have fewer.

    Example:
        >>> sequences_of_steps(7, batch=2, accumulation=2, steps=4)
        [4, 3, 4, 3]
    """
    window = batch * accumulation
    epoch = [min(window, count - start) for start in range(0, count, window)]
    return [epoch[step % len(epoch)] for step in range(steps)]


def _ordered(rows: Tokenized, order: list[int] | np.ndarray, seed: int) -> Tokenized:
    key = hashlib.sha256(f"order {seed}|{rows.fingerprint}".encode()).hexdigest()
    return replace(rows, dataset=rows.dataset.select(order), fingerprint=key)
