"""What the trainer takes as data, brought into one form, with everything that was left out on the way."""

import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from prefopt.data import BadRow, LoadedRows, Tokenized, load_rows, tokenize_rows
from prefopt.train.config import PreferenceConfig

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
)


@dataclass(frozen=True)
class Prepared:
    """Token ids, and what run.json says about where they came from."""

    tokenized: Tokenized
    bad: list[BadRow]

    def summary(self) -> dict:
        """Counts and fingerprint, JSON-ready."""
        return {
            "fingerprint": self.tokenized.fingerprint,
            **self.tokenized.counts,
            "bad": len(self.bad),
        }


def prepare_rows(
    data: object, tokenizer: PreTrainedTokenizerBase | None, args: PreferenceConfig, name: str
) -> Prepared:
    """Tokenise what is not yet tokenised.

    Args:
        data: ``Tokenized``, ``LoadedRows``, or whatever ``load_rows`` reads: a ``datasets.Dataset`` of raw rows, a list
            of them, a path or a hub id.
        tokenizer: needed unless ``data`` is ``Tokenized``.
        args: for max_length and on_bad_row.
        name: of the argument, for messages.

    Raises:
        ValueError: no tokenizer for raw rows; or rows tokenised for another ``max_length``.
        DataError: bad rows.
    """
    if isinstance(data, Tokenized):
        if data.max_length != args.max_length:
            raise ValueError(
                f"{name} was tokenised with max_length {data.max_length}, the configuration says {args.max_length}; "
                "expected the same"
            )
        return Prepared(data, data.bad)
    if tokenizer is None:
        raise ValueError(
            f"processing_class is None and {name} is not tokenised; expected the model's tokenizer"
        )
    loaded = data if isinstance(data, LoadedRows) else load_rows(data, on_bad_row=args.on_bad_row)
    tokenized = tokenize_rows(
        loaded, tokenizer, max_length=args.max_length, on_bad_row=args.on_bad_row
    )
    return Prepared(tokenized, [*loaded.bad, *tokenized.bad])
