"""Tokenizers and models of under a million parameters, made here: for the demo, and for `prefopt train --tiny`."""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocabulary: int,
    special: Sequence[str],
    eos: str,
    pad: str,
    bos: str | None = None,
    template: str | None = None,
    max_length: int,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``texts``, of at most ``vocabulary`` ids, ``special`` first."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        model_max_length=max_length,
        chat_template=template,
    )


def random_model(
    architecture: str, tokenizer: PreTrainedTokenizerFast, seed: int, **sizes: int | bool
) -> PreTrainedModel:
    """A causal LM with fp32 weights drawn from ``seed``; ``sizes`` are fields of the architecture's config."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sizes,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
