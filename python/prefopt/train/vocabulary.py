"""Token ids without an embedding, found before training rather than as an index error, or a device-side assert, in it."""

from torch import nn
from transformers import PreTrainedTokenizerBase

from prefopt.data import DataError
from prefopt.data.rows import BadRow
from prefopt.data.vocabulary import padding_beyond, remedy, rows_beyond
from prefopt.errors import UserError
from prefopt.train.inputs import Prepared

SHOWN = 10


def check_token_ids(
    models: list[nn.Module],
    tokenizer: PreTrainedTokenizerBase | None,
    sets: list[Prepared],
    pad_token_id: int | None = None,
) -> None:
    """Refuse rows and padding with an id that one of the models has no embedding for.

    Raises:
        DataError: with the first ten rows, by file, line and token.
        UserError: the padding token.
    """
    size = min(map(embedding_rows, models))
    padding = padding_beyond(pad_token_id, size, tokenizer)
    if padding is not None:
        raise UserError(
            f"{padding}. Choose a padding token that the model has (tokenizer.pad_token = tokenizer.eos_token will do: "
            "padding is masked), or resize the model: model.resize_token_embeddings(len(tokenizer))"
        )
    bad: list[BadRow] = [row for one in sets for row in rows_beyond(one.tokenized, size, tokenizer)]
    if bad:
        shown = "\n".join(f"  {row}" for row in bad[:SHOWN])
        more = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        rows = "1 row has" if len(bad) == 1 else f"{len(bad)} rows have"
        raise DataError(
            f"{rows} tokens without an embedding:\n{shown}{more}\n{remedy(size, tokenizer)}",
            bad,
        )


def embedding_rows(model: nn.Module) -> int:
    """Rows of the input embedding; not read from its weight, of which ZeRO-3 and tensor parallelism keep a part."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return rows if isinstance(rows, int) else model.config.get_text_config().vocab_size
