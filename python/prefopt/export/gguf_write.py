"""Write a GGUF file of a merged model, one tensor at a time."""

from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.export.gguf_model import (
    add_metadata,
    architecture,
    check_config,
    encoded,
    stored_bytes,
    tensors,
)
from prefopt.export.gguf_tokenizer import Vocabulary, read_tokenizer
from prefopt.export.merge import config_of
from prefopt.generation import end_of_turn
from prefopt.runs import Source

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def check_gguf(source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ``UserError`` for a model or tokenizer that the file cannot store, before its weights are loaded."""
    config = config_of(source)
    check_config(config)
    read_tokenizer(tokenizer, config.vocab_size)


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    quant: str,
    template_kwargs: dict | None = None,
) -> list[str]:
    """Write model and tokenizer into one file.

    ``quant`` is the type of matrices: f32; f16, rounded to nearest, ``|error| <= 2**-11 |w|``; or q8_0, blocks of 32
    along a row in which each value is a multiple of ``d = max|w| / 127``, stored in f16, so ``|error| <= max|w| (1 /
    254 + 2**-11)``. Vectors (norms, biases) are always f32.

    Args:
        model: of a checked configuration, without adapter.
        tokenizer: of the same run.
        path: the new file.
        quant: "f32", "f16" or "q8_0".
        template_kwargs: arguments of the chat template, as in training.

    Returns:
        Notes for the user of the file.

    Raises:
        UserError: a weight or tokenizer that the file cannot store.
    """
    import gguf

    check_config(model.config)
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    vocabulary = read_tokenizer(tokenizer, rows, end_of_turn(tokenizer, template_kwargs))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture(model.config.model_type)])
    try:
        writer.add_name(path.stem)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[quant]])
        if quant == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_metadata(writer, model.config)
        writer.add_vocab_size(rows)
        _add_tokenizer(writer, vocabulary)
        odd = _write_tensors(writer, model, quant)
    finally:
        writer.close()
    return vocabulary.notes + odd


def _add_tokenizer(writer: Any, vocabulary: Vocabulary) -> None:
    import gguf

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([gguf.TokenType[kind] for kind in vocabulary.types])
    writer.add_token_merges(vocabulary.merges)
    for name, token_id in vocabulary.ids.items():
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _write_tensors(writer: Any, model: PreTrainedModel, quant: str) -> list[str]:
    """Write the header of all tensors, then the values one by one, so that only one is in memory twice."""
    import gguf

    found = list(tensors(model, quant))  # views of the weights, save for llama's q and k
    for tensor in found:
        writer.add_tensor_info(
            tensor.name,
            tuple(tensor.values.shape),
            np.dtype(np.float32),
            stored_bytes(tensor),
            raw_dtype=gguf.GGMLQuantizationType[tensor.kind],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tqdm(found, desc="writing tensors", unit="tensor", delay=1):
        writer.write_tensor_data(encoded(tensor))
    odd = sum(tensor.kind == "F16" for tensor in found) if quant == "q8_0" else 0
    return [f"{odd} matrices are kept in f16: their rows are no multiple of 32"] if odd else []
