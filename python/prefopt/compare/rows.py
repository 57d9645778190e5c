"""The same sequences for every method: as pairs, as unpaired rows, or the desirable answers alone."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from prefopt.data import LabelBalancedSampler, LoadedRows, Tokenized
from prefopt.data.collate import SIDES
from prefopt.data.pairs import are_pairs, desirable_only
from prefopt.errors import DataError, UserError
from prefopt.evaluate.held_out import HeldOut
from prefopt.options import Loss
from prefopt.recipe.rows import load_data, with_plan
from prefopt.recipe.schema import Recipe
from prefopt.train.methods import ANSWERS, METHODS, PAIRS, UNPAIRED


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows of all methods: pairs if one of the methods needs them, unpaired rows otherwise."""

    train: Tokenized
    held_out: Tokenized

    @property
    def are_pairs(self) -> bool:
        """Whether they are pairs."""
        return are_pairs(self.train)

    def shared_prompts(self) -> int:
        """Number of prompts of the held-out rows that are trained on."""
        return len(set(self.held_out.dataset["group"][:]) & set(self.train.dataset["group"][:]))


def load(recipe: Recipe, methods: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The recipe's rows in a form that suits all methods.

    Raises:
        DataError: bad rows, or none that suit a method.
        UserError: the recipe has no held-out rows.
    """
    by_data = {kind: [method for method in methods if METHODS[method].data == kind] for kind in (PAIRS, UNPAIRED)}
    wanted: list[Any] = by_data[PAIRS] or by_data[UNPAIRED]
    try:
        built = with_plan(replace(recipe, loss=Loss(method=wanted[0])))
        train, held_out = load_data(built, tokenizer)
    except DataError as error:
        raise DataError(f"for {', '.join(wanted)}: {error}", error.bad) from None
    if held_out is None:
        raise UserError(
            f"{recipe.name} has no held-out rows to compare the methods on; add --data.eval_fraction 0.1, or "
            "data.eval_path"
        )
    return Rows(train, held_out)


def rows_of(method: str, train: Tokenized, seed: int, window: int) -> Tokenized:
    """The rows of a method in the order of a seed.

    Args:
        method: from METHODS.
        train: pairs or, if no method needs them, unpaired rows.
        seed: of the order, which all methods share.
        window: unpaired rows of an optimizer step, over which the labels are balanced.
    """
    kind = METHODS[method].data
    if are_pairs(train):
        order = np.random.default_rng(seed).permutation(len(train.dataset))
        pairs = _ordered(train, order, seed)
        if kind == PAIRS:
            return pairs
        unpaired = as_unpaired(pairs)
    else:
        labels = train.dataset["label"][:]
        unpaired = _ordered(train, list(LabelBalancedSampler(labels, window, seed)), seed)
    return desirable_only(unpaired, "train") if kind == ANSWERS else unpaired


def as_unpaired(pairs: Tokenized) -> Tokenized:
    """Two unpaired rows of each pair, the chosen answer first; ``row`` counts them."""
    n = len(pairs.dataset)
    sides = []
    for side in SIDES:
        names = {f"{side}_{part}": part for part in ("prompt_ids", "completion_ids", "line")}
        half = pairs.dataset.select_columns([*names, "group"]).rename_columns(names)
        sides.append(half.add_column("label", [side == "chosen"] * n))
    order = np.arange(2 * n).reshape(2, n).T.ravel()  # alternating
    dataset = concatenate_datasets(sides).select(order).add_column("row", list(range(2 * n)))
    key = hashlib.sha256(f"rated|{pairs.fingerprint}".encode()).hexdigest()
    counts = pairs.counts | {"rows": 2 * n, "desirable": n, "undesirable": n}
    return replace(pairs, dataset=dataset, counts=counts, fingerprint=key)


def held_out_of(held_out: Tokenized) -> HeldOut:
    """Held-out rows for the preference evaluation; the line of a row is the number of its pair."""
    if are_pairs(held_out):
        rows = as_unpaired(held_out)
        lines = [row // 2 for row in range(len(rows.dataset))]
    else:
        rows = held_out
        lines = list(range(1 + max(rows.dataset["row"][:])))
    return HeldOut(LoadedRows(Dataset.from_dict({"line": lines}), name="held-out rows"), rows)


def sequences_of_steps(count: int, batch: int, accumulation: int, steps: int) -> list[int]:
    """Rows (or pairs) in each optimizer step; the last one of an epoch may have fewer.

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
