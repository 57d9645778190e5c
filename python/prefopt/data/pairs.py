"""Rows for the methods that want no thumbs: pairs with both their answers in one row, or desirable answers alone.

``load_rows`` makes two rated rows of a pair, because most of what a row can have wrong concerns one answer. Here the
two come together again. What is left, rows that were rated one by one, or that `prefopt data build` has made of pairs,
is paired by its prompt: a desirable answer with an undesirable one to the very same prompt. Nobody may have compared
those two; that they have different labels is all such a pair says, and the counts tell how many there are.
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

from prefopt.data.collate_pairs import SIDES
from prefopt.data.read import LoadedRows
from prefopt.data.rows import DataError
from prefopt.data.tokenize import Tokenized, tokenize_rows

logger = logging.getLogger(__name__)


def tokenize_pairs(
    loaded: LoadedRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    on_bad_row: str = "stop",
    chat_template_kwargs: Mapping | None = None,
) -> Tokenized:
    """``tokenize_rows``, and the two answers of each pair put beside each other, then those of rows with the same
    prompt.

    Rows of a prompt are paired in the order of a hash of their answers, each at most once; so the pairs do not depend
    on the order of the rows. An answer with both labels is in no pair.

    Args:
        loaded, tokenizer, max_length, on_bad_row, chat_template_kwargs: as for ``tokenize_rows``.

    Returns:
        ``Tokenized`` with a row for each pair: ``chosen_prompt_ids``, ``chosen_completion_ids``,
        ``rejected_prompt_ids``, ``rejected_completion_ids``, ``chosen_line``, ``rejected_line``, ``group`` and ``row``,
        the number of the pair. ``counts`` are of the rows in pairs, but for ``rows`` and ``pairs``, the number of
        pairs, ``paired_by_prompt``, how many of them were made of rows that are no pair in the data, and
        ``without_pair``, rows that were left out.

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
    line, group, label = (np.asarray(loaded.rows[name][:]) for name in ("line", "group", "label"))
    # The halves of a pair stand one after the other and come from one line, which no other two rows do.
    same = (line[:-1] == line[1:]) & (group[:-1] == group[1:])
    first = np.flatnonzero(same & label[:-1] & ~label[1:])  # in loaded.rows
    place = np.full(len(line), -1)
    place[np.asarray(tokenized.dataset["row"][:])] = np.arange(len(tokenized.dataset))
    chosen, rejected = place[first], place[first + 1]
    whole = (chosen >= 0) & (rejected >= 0)
    chosen, rejected = chosen[whole].tolist(), rejected[whole].tolist()
    numbers = np.flatnonzero(whole).tolist()
    single = np.setdiff1d(np.arange(len(tokenized.dataset)), [*chosen, *rejected])
    matched = _by_prompt(loaded, tokenized, single.tolist())
    chosen += [good for good, _ in matched]
    rejected += [bad for _, bad in matched]
    numbers += range(len(first), len(first) + len(matched))
    left_out = len(tokenized.dataset) - 2 * len(chosen)
    if not chosen:
        raise DataError(
            f"{loaded.name} has no pairs to train on; expected rows {{prompt, chosen, rejected}}, or rated rows with a "
            f"desirable and an undesirable answer to the same prompt; found {len(tokenized.dataset)} rated ones"
        )
    if matched:
        logger.warning(
            "%s: %d pairs were made of answers to the same prompt that were rated one by one",
            loaded.name,
            len(matched),
        )
    if left_out:
        logger.warning("%s: %d rows are not half of a pair and are left out", loaded.name, left_out)
    dataset = _beside(tokenized.dataset, chosen, rejected)
    dataset = dataset.add_column("row", numbers)
    counts = tokenized.counts | _counts(dataset, max_length)
    counts |= {
        "pairs": len(dataset),
        "paired_by_prompt": len(matched),
        "without_pair": left_out,
    }
    key = hashlib.sha256(f"pairs, also by prompt|{tokenized.fingerprint}".encode()).hexdigest()
    return replace(tokenized, dataset=dataset, counts=counts, fingerprint=key)


def _by_prompt(loaded: LoadedRows, tokenized: Tokenized, single: Sequence[int]) -> list[tuple[int, int]]:
    """(desirable, undesirable) of the given rows that share a prompt, in the order of the desirable ones."""
    rows = loaded.rows.select(np.asarray(tokenized.dataset["row"][:])[list(single)])
    prompts: dict[str, dict[str, dict[bool, int]]] = defaultdict(lambda: defaultdict(dict))
    for place, row in zip(single, rows, strict=True):
        answer = hashlib.sha256(json.dumps(row["completion"]).encode()).hexdigest()
        prompts[json.dumps(row["prompt"])][answer].setdefault(row["label"], place)
    pairs = []
    for answers in prompts.values():
        sides: dict[bool, list[int]] = {True: [], False: []}
        for _, places in sorted(answers.items()):
            if len(places) == 1:  # with both labels it says nothing
                ((label, place),) = places.items()
                sides[label].append(place)
        pairs += zip(sides[True], sides[False], strict=False)
    return sorted(pairs)


def are_pairs(tokenized: Tokenized) -> bool:
    """Whether the rows are those of ``tokenize_pairs``."""
    return "rejected_completion_ids" in tokenized.dataset.column_names


def desirable_only(tokenized: Tokenized, name: str) -> Tokenized:
    """The desirable rows, chosen answers of pairs included; ``counts`` says how many others were left out.

    Args:
        tokenized: of ``tokenize_rows``.
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
    lengths = _lengths(dataset, "", tokenized.max_length)
    counts = tokenized.counts | lengths
    counts |= {
        "rows": len(kept),
        "undesirable": 0,
        "groups": len(set(dataset["group"][:])),
        "undesirable_left_out": left_out,
    }
    key = hashlib.sha256(f"desirable|{tokenized.fingerprint}".encode()).hexdigest()
    return replace(tokenized, dataset=dataset, counts=counts, fingerprint=key)


def _beside(rows: Dataset, chosen: list[int], rejected: list[int]) -> Dataset:
    """One row for each pair of positions."""
    sides = []
    for side, positions in zip(SIDES, (chosen, rejected), strict=True):
        columns = ["prompt_ids", "completion_ids", "line"] + (["group"] if side == "chosen" else [])
        names = {name: f"{side}_{name}" for name in columns if name != "group"}
        sides.append(rows.select(positions).select_columns(columns).rename_columns(names))
    return concatenate_datasets(sides, axis=1)


def _counts(pairs: Dataset, max_length: int | None) -> dict[str, int]:
    sides = [_lengths(pairs, f"{side}_", max_length) for side in SIDES]
    counts = {name: sides[0][name] + sides[1][name] for name in sides[0]}
    return counts | {
        "rows": len(pairs),
        "desirable": len(pairs),
        "undesirable": len(pairs),
        "groups": len(set(pairs["group"][:])),
    }


def _lengths(rows: Dataset, side: str, max_length: int | None) -> dict[str, int]:
    """The counts of tokens that ``tokenize_rows`` makes, of some rows."""
    prompt, completion = (
        np.array([len(ids) for ids in rows[f"{side}{name}"]]) for name in ("prompt_ids", "completion_ids")
    )
    limit = np.iinfo(np.int64).max if max_length is None else max_length
    lost = np.maximum(prompt + completion - limit, 0)
    return {
        "truncated": int((lost > 0).sum()),
        "truncated_tokens": int(lost.sum()),
        "prompt_tokens": int(prompt.sum()),
        "completion_tokens": int((completion - lost).sum()),
    }
