"""Token ids without an embedding, found before training rather than as an index error, or a device-side assert, in it.

And a base whose vocabulary was resized under an adapter.
"""

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.vocabulary import padding_beyond, remedy, rows_beyond
from prefopt.errors import BadRow, DataError, UserError
from prefopt.train.inputs import Prepared

SHOWN = 10


def check_token_ids(
    models: list[PreTrainedModel],
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


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding; not read from its weight, of which ZeRO-3 and tensor parallelism keep a part."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return rows if isinstance(rows, int) else model.config.get_text_config().vocab_size


def check_token_indices(model: PreTrainedModel, peft_config: object) -> None:
    """Raise ``ValueError`` for tokens to train that the vocabulary does not have."""
    rows = embedding_rows(model)
    for name in ("trainable_token_indices", "token_indices"):
        named = getattr(peft_config, name, None) or []
        ids = [i for some in named.values() for i in some] if isinstance(named, dict) else named
        wrong = [i for i in ids if not 0 <= i < rows]
        if wrong:
            raise ValueError(
                f"peft_config.{name} has {wrong[0]}, and the vocabulary has {rows} rows; expected ids from 0 to "
                f"{rows - 1}: resize the model first (model.resize_token_embeddings), or correct the ids"
            )


def resized_from(base: PreTrainedModel) -> int | None:
    """Vocabulary rows of the published base of an adapter, if ``base`` has another number; otherwise None.

    Also None for a model without a name, one that is not on this machine, and one with code of its own.
    """
    config = base.config
    if not config._name_or_path:
        return None
    try:
        published = AutoConfig.from_pretrained(
            config._name_or_path,
            revision=getattr(config, "_commit_hash", None) or "main",
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError):
        return None
    rows = published.get_text_config().vocab_size
    return None if rows == embedding_rows(base) else rows
