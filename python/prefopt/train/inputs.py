"""Tokenised rows from every form of data that the trainer takes, and the rows that were left out."""

import logging
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.data.pairs import are_pairs, desirable_only, tokenize_pairs
from prefopt.data.read import LoadedRows, load_rows
from prefopt.data.rows import CHAT, TEXT
from prefopt.data.tokenize import Tokenized, tokenize_rows
from prefopt.errors import BadRow
from prefopt.train.config import PreferenceConfig
from prefopt.train.methods import ANSWERS, PAIRS

logger = logging.getLogger(__name__)

COLUMNS = (  # what the collator and the estimate of the reference point read
    "prompt_ids",
    "completion_ids",
    "label",
    "group",
    "row",
    "ref_logps",
    "ref_kl_logps",
    "kl_partner",
    "kl_completion_ids",
    "chosen_prompt_ids",
    "chosen_completion_ids",
    "rejected_prompt_ids",
    "rejected_completion_ids",
    "ref_chosen_logps",
    "ref_rejected_logps",
)


@dataclass(frozen=True)
class Prepared:
    """Token ids, and what run.json says about where they came from."""

    tokenized: Tokenized
    bad: list[BadRow]

    def summary(self) -> dict:
        """Counts, fingerprint and the form of the rows, JSON-ready."""
        return {
            "fingerprint": self.tokenized.fingerprint,
            "format": CHAT if self.tokenized.conversational else TEXT,
            **self.tokenized.counts,
            "bad": len(self.bad),
        }


def prepare_rows(data: Any, tokenizer: PreTrainedTokenizerBase | None, args: PreferenceConfig, name: str) -> Prepared:
    """Bring data into the form that ``args.method`` learns from, and tokenise what is not yet tokenised.

    Args:
        data: ``Tokenized``, ``LoadedRows``, or whatever ``load_rows`` reads: a ``datasets.Dataset`` of raw rows, a list
            of them, a path or a hub id.
        tokenizer: needed unless ``data`` is ``Tokenized``.
        args: for method, max_length and on_bad_row.
        name: of the argument, for messages.

    Raises:
        ValueError: no tokenizer for raw rows; rows tokenised for another ``max_length``, or rows for a method of pairs
            and vice versa.
        DataError: bad rows, or none of the kind that the method learns from.
    """
    kind = args.spec.data
    if isinstance(data, Tokenized):
        if data.max_length != args.max_length:
            raise ValueError(
                f"{name} was tokenised with max_length {data.max_length}, the configuration says {args.max_length}; "
                "expected the same"
            )
        if are_pairs(data) != (kind == PAIRS):
            made = "tokenize_pairs" if kind == PAIRS else "tokenize_rows"
            raise ValueError(
                f"{name} was not tokenised for method {args.method!r}, which learns from {kind}; expected the rows "
                f"themselves, or the result of {made}"
            )
        tokenized, bad = data, data.bad
    else:
        if tokenizer is None:
            raise ValueError(f"processing_class is None and {name} is not tokenised; expected the model's tokenizer")
        loaded = data if isinstance(data, LoadedRows) else load_rows(data, on_bad_row=args.on_bad_row)
        tokenize = tokenize_pairs if kind == PAIRS else tokenize_rows
        tokenized = tokenize(loaded, tokenizer, max_length=args.max_length, on_bad_row=args.on_bad_row)
        bad = [*loaded.bad, *tokenized.bad]
    if kind == ANSWERS:
        tokenized = desirable_only(tokenized, name)
    return Prepared(tokenized, bad)
