"""Token ids without an embedding, for example of tokens that were added to the tokenizer but not to the model."""

from transformers import PreTrainedTokenizerBase

from prefopt.data.tokenize import Tokenized
from prefopt.errors import BadRow

BATCH_ROWS = 10_000


def rows_beyond(tokenized: Tokenized, size: int, tokenizer: PreTrainedTokenizerBase | None = None) -> list[BadRow]:
    """The rows with a token id outside the embedding, each with its first such token.

    Args:
        tokenized: rows or pairs.
        size: rows of the embedding.
        tokenizer: names the token.
    """
    found: dict[int, BadRow] = {}
    columns = [name for name in tokenized.dataset.column_names if name.endswith("_ids")]
    for name in columns:
        side = name.removesuffix("prompt_ids").removesuffix("completion_ids")
        rows = tokenized.dataset.select_columns([name, f"{side}line"]).with_format("arrow")
        for batch in rows.iter(BATCH_ROWS):
            ids = batch[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            if not len(ids) or (ids.min() >= 0 and ids.max() < size):
                continue
            for row in batch.to_pylist():
                token = next((one for one in row[name] if not 0 <= one < size), None)
                if token is not None:
                    line = row[f"{side}line"]
                    reason = f"token {_named(token, tokenizer)} has no embedding: {_has(size)}"
                    found.setdefault(line, BadRow(tokenized.name, line, reason))
    return [found[line] for line in sorted(found)]


def padding_beyond(token: int | None, size: int, tokenizer: PreTrainedTokenizerBase | None = None) -> str | None:
    """A sentence about a padding token without an embedding; None if there is no such problem."""
    if token is None or 0 <= token < size:
        return None
    return f"pad_token_id is {_named(token, tokenizer)}: {_has(size)}"


def remedy(size: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """How to correct either problem, as one sentence."""
    count = "" if tokenizer is None else f" (the tokenizer has {len(tokenizer):,} tokens)"
    return (
        "Use the tokenizer that belongs to the model, or give the model a row for each token: "
        f"model.resize_token_embeddings(len(tokenizer)){count}, then save both together."
    )


def _has(size: int) -> str:
    return f"the model has {size:,}, for ids 0 to {size - 1}"


def _named(token: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None or token < 0:
        return str(token)
    return f"{token} ({tokenizer.convert_ids_to_tokens(token)!r:.60})"
