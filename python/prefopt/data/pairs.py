"""Tokenised data for the methods without binary labels: pairs, or desirable answers only.

``load_rows`` splits a pair into two unpaired rows, since most checks concern one answer; here the two are joined again.
Remaining rows, which are unpaired in the source or were split by `prefopt data build`, are paired by prompt: a
desirable with an undesirable answer to the same prompt. Such a pair was not compared by an annotator;
``paired_by_prompt`` counts them.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from prefopt.data.collate import SIDES
from prefopt.data.read import LoadedRows
from prefopt.data.tokenize import Tokenized, token_counts, tokenize_rows
from prefopt.errors import DataError

logger = logging.getLogger(__name__)


def tokenize_pairs(
    loaded: LoadedRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    on_bad_row: str = "stop",
    chat_template_kwargs: Mapping | None = None,
) -> Tokenized:
    """``tokenize_rows``, then join the two answers of each pair, and pair the remaining rows by prompt.

    Rows of a prompt are paired in the order of a hash of their answers, each at most once, so the pairs do not depend
    on the order of the rows. An answer that occurs with both labels is not used.

    Args:
        loaded, tokenizer, max_length, on_bad_row, chat_template_kwargs: as for ``tokenize_rows``.

    Returns:
        ``Tokenized`` with a row for each pair: ``chosen_prompt_ids``, ``chosen_completion_ids``,
        ``rejected_prompt_ids``, ``rejected_completion_ids``, ``chosen_line``, ``rejected_line``, ``group`` and ``row``,
        the number of the pair. ``counts`` covers the rows in pairs; ``rows`` and ``pairs`` are the number of pairs,
        ``paired_by_prompt`` those joined by prompt, and ``without_pair`` the rows left out.

    Raises:
        DataError: as ``tokenize_rows``; and no pairs.
    """
    tokenized = tokenize_rows(
        loaded,
        tokenizer,
        max_length=max_length,
        on_bad_row=on_bad_row,
        chat_template_kwargs=chat_template_kwargs,
    )
    total = len(tokenized.dataset)
    line, group, label = (np.asarray(loaded.rows[name][:]) for name in ("line", "group", "label"))
    # the two rows of a pair are adjacent and share a line
    same = (line[:-1] == line[1:]) & (group[:-1] == group[1:])
    first = np.flatnonzero(same & label[:-1] & ~label[1:])  # in loaded.rows
    place = np.full(len(line), -1)  # in tokenized.dataset
    place[np.asarray(tokenized.dataset["row"][:])] = np.arange(total)
    whole = (place[first] >= 0) & (place[first + 1] >= 0)
    pairs = np.stack([place[first], place[first + 1]], axis=1)[whole]  # (P, 2)
    single = np.setdiff1d(np.arange(total), pairs)
    matched = _by_prompt(loaded, tokenized, single.tolist())
    positions = [*map(tuple, pairs.tolist()), *matched]
    left_out = total - 2 * len(positions)
    if not positions:
        raise DataError(
            f"{loaded.name} has no pairs to train on; expected rows {{prompt, chosen, rejected}}, or unpaired rows "
            f"with a desirable and an undesirable answer to the same prompt; found {total} unpaired rows"
        )
    if matched:
        logger.warning(
            "%s: %d pairs were made of unpaired answers to the same prompt",
            loaded.name,
            len(matched),
        )
    if left_out:
        logger.warning("%s: %d rows are not half of a pair and are left out", loaded.name, left_out)
    dataset = _joined(tokenized.dataset, positions)
    numbers = [*np.flatnonzero(whole).tolist(), *range(len(first), len(first) + len(matched))]
    dataset = dataset.add_column("row", numbers)
    chosen, rejected = (token_counts(dataset, max_length, f"{side}_") for side in SIDES)
    counts = tokenized.counts | {name: chosen[name] + rejected[name] for name in chosen}
    counts |= {
        "rows": len(dataset),
        "desirable": len(dataset),
        "undesirable": len(dataset),
        "groups": len(set(dataset["group"])),
        "pairs": len(dataset),
        "paired_by_prompt": len(matched),
        "without_pair": left_out,
    }
    key = hashlib.sha256(f"pairs, also by prompt|{tokenized.fingerprint}".encode()).hexdigest()
    return replace(tokenized, dataset=dataset, counts=counts, fingerprint=key)


def are_pairs(tokenized: Tokenized) -> bool:
    """Whether the rows are those of ``tokenize_pairs``."""
    return "rejected_completion_ids" in tokenized.dataset.column_names


def desirable_only(tokenized: Tokenized, name: str) -> Tokenized:
    """The desirable rows, including the chosen answers of pairs; ``counts`` has the number of rows left out.

    Args:
        tokenized: from ``tokenize_rows``.
        name: of the data, for messages.

    Raises:
        DataError: there are none.
    """
    kept = np.flatnonzero(np.asarray(tokenized.dataset["label"][:])).tolist()
    left_out = len(tokenized.dataset) - len(kept)
    if not kept:
        raise DataError(f"{name} has no desirable rows to train on; all {left_out} are undesirable")
    if not left_out:
        return tokenized
    logger.warning("%s: %d undesirable rows are left out", name, left_out)
    dataset = tokenized.dataset.select(kept)
    counts = tokenized.counts | token_counts(dataset, tokenized.max_length)
    counts |= {
        "rows": len(kept),
        "undesirable": 0,
        "groups": len(set(dataset["group"])),
        "undesirable_left_out": left_out,
    }
    key = hashlib.sha256(f"desirable|{tokenized.fingerprint}".encode()).hexdigest()
    return replace(tokenized, dataset=dataset, counts=counts, fingerprint=key)


def _by_prompt(loaded: LoadedRows, tokenized: Tokenized, single: Sequence[int]) -> list[tuple[int, int]]:
    """(desirable, undesirable) positions with the same prompt, in the order of the desirable ones."""
    rows = loaded.rows.select(np.asarray(tokenized.dataset["row"][:])[list(single)])
    prompts: dict[str, dict[str, dict[bool, int]]] = defaultdict(lambda: defaultdict(dict))
    for place, row in zip(single, rows, strict=True):
        answer = hashlib.sha256(json.dumps(row["completion"]).encode()).hexdigest()
        prompts[json.dumps(row["prompt"])][answer].setdefault(row["label"], place)
    pairs: list[tuple[int, int]] = []
    for answers in prompts.values():
        sides: dict[bool, list[int]] = {True: [], False: []}
        for _, places in sorted(answers.items()):
            if len(places) == 1:  # both labels contradict each other
                ((label, place),) = places.items()
                sides[label].append(place)
        pairs += zip(sides[True], sides[False], strict=False)
    return sorted(pairs)


def _joined(rows: Dataset, positions: Sequence[tuple[int, ...]]) -> Dataset:
    """One row for each pair of positions (chosen, rejected)."""
    sides = []
    for number, side in enumerate(SIDES):
        names = {name: f"{side}_{name}" for name in ("prompt_ids", "completion_ids", "line")}
        columns = [*names, "group"] if side == "chosen" else [*names]
        chosen = rows.select([pair[number] for pair in positions])
        sides.append(chosen.select_columns(columns).rename_columns(names))
    return concatenate_datasets(sides, axis=1)
