"""Weights in 4 bits, by bitsandbytes: NF4 with doubly quantised scales; head and embedding stay as they are."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from prefopt.errors import UserError, first_line
from prefopt.pretrained import from_pretrained

BLOCK = 64  # weights that share a scale


def refuse_without_bitsandbytes(key: str) -> None:
    """Say how to get it, before anything is downloaded."""
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{key}, which needs the package bitsandbytes: pip install bitsandbytes")


def compute_dtype(training: Mapping[str, Any], dtype: str) -> str:
    """The dtype in which matrices of 4 bits are multiplied: that of autocast, or that of the other weights.

    Args:
        training: a recipe's section of that name.
        dtype: of the weights that are not quantised, or "auto".

    Example:
        >>> compute_dtype({"bf16": False, "fp16": True}, "bfloat16"), compute_dtype({}, "auto")
        ('float16', 'float32')
    """
    if training.get("bf16") or training.get("fp16"):
        return "bfloat16" if training.get("bf16") else "float16"
    return "float32" if dtype == "auto" else dtype


def quantization_options(compute: torch.dtype, device: int | str) -> dict[str, Any]:
    """Arguments of ``from_pretrained``; the weights are quantised on the device where they will be used."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def check_blocks(path: str, asked: str, instead: str, *, revision: str | None, trust_remote_code: bool) -> None:
    """``refuse_broken_blocks`` for a model that is not loaded yet: its shapes are enough."""
    failure = f"{asked}: cannot read the configuration of {path}"
    options = {"trust_remote_code": trust_remote_code}
    config = from_pretrained(AutoConfig, path, failure, revision=revision, **options)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{failure}: {first_line(error)}") from None
    refuse_broken_blocks(model, asked, instead)


def refuse_broken_blocks(model: PreTrainedModel, asked: str, instead: str) -> None:
    """Refuse rows that bitsandbytes 0.50 does not quantise rightly on a CPU: it loses the weights without a word.

    Args:
        model: not quantised; its shapes alone matter.
        asked, instead: what was asked for, and what to ask for instead, in the message.

    Raises:
        UserError: a linear layer's rows are no whole number of blocks.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and module.in_features % BLOCK:
            raise UserError(
                f"{asked}: rows of {name} have {module.in_features} weights, no multiple of {BLOCK}, which "
                f"bitsandbytes quantises wrongly on a CPU; use a GPU, or {instead}"
            )
