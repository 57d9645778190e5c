"""Tiny models with random weights, with the architecture and chat template of each model family in the recipes.

The templates are written for this package and behave as the real ones do. Qwen3's puts an empty thought before the last
answer, and before a new answer if thinking is off. DeepSeek-R1-Distill's opens an answer with a thought that a rendered
conversation does not have. SmolLM2's base model has no template.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from prefopt.demo.build import random_model, train_tokenizer
from prefopt.errors import UserError

VOCABULARY = 1024
POSITIONS = 4096
# All rows of matrices are whole blocks of 64, which bitsandbytes needs on a CPU.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}

QWEN3 = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' and loop.last -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{%- endif -%}"
)
R1 = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<|User|>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<|Assistant|>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{%- else -%}{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\n' }}{%- endif -%}"
)


class Family(NamedTuple):
    """A pattern of model names, the architecture, special tokens (eos, pad, others) and the chat template."""

    pattern: str
    architecture: str
    special: tuple[str, ...]
    bos: str | None
    template: str | None
    tied: bool


FAMILIES = (
    Family(
        r"(^|/)qwen3-",
        "qwen3",
        ("<|im_end|>", "<|endoftext|>", "<|im_start|>"),
        None,
        QWEN3,
        tied=True,
    ),
    Family(
        r"deepseek-r1-distill-qwen",
        "qwen2",
        (
            "<|end_of_sentence|>",
            "<|endoftext|>",
            "<|begin_of_sentence|>",
            "<|User|>",
            "<|Assistant|>",
        ),
        "<|begin_of_sentence|>",
        R1,
        tied=False,
    ),
    Family(
        r"smollm2",
        "llama",
        ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"),
        None,
        None,
        tied=True,
    ),
)


def family_of(name: str) -> Family:
    """The family of a model, by its name.

    Raises:
        UserError: it is none of those in the recipes.

    Example:
        >>> family_of("Qwen/Qwen3-1.7B").architecture
        'qwen3'
    """
    found = [family for family in FAMILIES if re.search(family.pattern, name.lower())]
    if not found:
        raise UserError(
            f"--tiny has no stand-in for model.path {name}; expected a Qwen3, SmolLM2 or DeepSeek-R1-Distill-Qwen"
        )
    return found[0]


def save_tiny(family: Family, texts: Iterable[str], folder: Path, seed: int) -> None:
    """Save a tokenizer trained on the texts, and a model with random fp32 weights drawn from the seed."""
    tokenizer = train_tokenizer(
        texts,
        vocabulary=VOCABULARY,
        special=family.special,
        eos=family.special[0],
        pad=family.special[1],
        bos=family.bos,
        template=family.template,
        max_length=POSITIONS,
    )
    head = {"head_dim": 32} if family.architecture == "qwen3" else {}
    model = random_model(family.architecture, tokenizer, seed, tie_word_embeddings=family.tied, **SIZES, **head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
