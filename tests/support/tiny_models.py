"""Tiny tokenizers, models and rows for the tests of `prefopt`: no network, a few seconds, fp32.

The tokenizer is a ByteLevel BPE trained on the sentences below, so every text encodes without an unknown token. The
models have random weights with a large spread (``initializer_range=0.2``): with the usual 0.02 every token would be
about equally likely, and a test of log-probabilities would hardly notice a wrong one.
"""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    set_seed,
)

PAD, BOS, EOS = "<|pad|>", "<|start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ROWS: list[tuple[str, str, bool]] = [  # prompt, completion, label; every prompt is its own group
    ("Which planet is the largest?", "Jupiter is the largest planet.", True),
    ("How do I boil an egg?", "Put it on the roof and sing.", False),
    ("ما هي عاصمة مصر؟", "عاصمة مصر هي القاهرة.", True),
    ("What do plants need to grow?", "They need water, light and some soil.", True),
    ("Why is the sea salty?", "No.", False),
    ("Name three colours.", "Red, green and yellow.", True),
    ("كم عدد أيام الأسبوع؟", "تسعة أيام، على ما أظن.", False),
    ("Who painted the ceiling of the Sistine Chapel?", "Michelangelo painted it.", True),
    (
        "Is it safe to look at the sun?",
        "Yes, stare at it for as long as you like, it is good for you.",
        False,
    ),
    ("What is the boiling point of water?", "One hundred degrees Celsius at sea level.", True),
    ("How many legs has a spider?", "Eleven and a half.", False),
    ("What does a baker make?", "A baker makes bread and cakes.", True),
    ("هل الأرض كروية؟", "نعم، الأرض كروية تقريبا.", True),
    ("What is the opposite of cold?", "The opposite of cold is Tuesday.", False),
    ("Where do penguins live?", "Most of them live in the far south.", True),
    ("Translate 'good morning' into French.", "Bonjour.", True),
    ("How far away is the moon?", "You can reach it with a ladder, but bring a coat.", False),
    ("ما لون السماء؟", "لا أعرف ولا يهمني.", False),
    ("What is seven times six?", "Seven times six is forty-two.", True),
    ("Which metal is liquid at room temperature?", "Wood.", False),
]


def make_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """ByteLevel BPE with a ChatML template, distinct pad, bos and eos, right padding; saved to ``path``."""
    core = Tokenizer(tokenizer_models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420,
        special_tokens=[PAD, BOS, "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{prompt} {completion}" for prompt, completion, _ in ROWS]
    core.train_from_iterator([*texts, "system user assistant"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        model_max_length=256,
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(path)
    return tokenizer


def make_model(arch: str, vocab_size: int, path: str | Path, seed: int = 0) -> PreTrainedModel:
    """A two-layer random model, saved to ``path`` and loaded from there in fp32 (so ``config._name_or_path`` is set).

    ``arch`` is "qwen3", "llama" or "gemma2" (which has a softcap of 30 on the logits and a head tied to the embedding).
    """
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,
    }
    configs = {
        "qwen3": lambda: Qwen3Config(head_dim=12, tie_word_embeddings=False, **sizes),
        "llama": lambda: LlamaConfig(tie_word_embeddings=False, **sizes),
        "gemma2": lambda: Gemma2Config(head_dim=12, query_pre_attn_scalar=12, sliding_window=64, **sizes),
    }
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(configs[arch](), dtype=torch.float32)
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def make_rows(conversational: bool) -> list[dict]:
    """``ROWS`` as dictionaries: plain text, or chat messages of one user and one assistant turn."""
    if not conversational:
        return [{"prompt": prompt, "completion": completion, "label": label} for prompt, completion, label in ROWS]
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
            "label": label,
        }
        for prompt, completion, label in ROWS
    ]


def make_dataset(conversational: bool) -> Dataset:
    """``make_rows`` as a ``datasets.Dataset``."""
    return Dataset.from_list(make_rows(conversational))
