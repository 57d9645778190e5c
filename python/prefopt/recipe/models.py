"""The model, tokenizer, chat template and adapter of a recipe."""

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from prefopt.errors import UserError
from prefopt.models import (
    GGUF,
    PACKAGED,
    compute_dtype,
    four_bit_options,
    from_pretrained,
    gguf_file,
    load_weights,
    require_bitsandbytes,
)
from prefopt.option_values import show
from prefopt.options import Lora
from prefopt.paths import absolute, is_path
from prefopt.recipe.schema import Recipe

# Turns as plain text, for a base model without a template, whose chat tokens, if any, are untrained. An answer ends in
# the EOS token, with nothing after it.
DIALOGUE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else '\n\n' }}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ 'Human: ' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
TEMPLATES = {"dialogue": DIALOGUE}
ALL_LINEAR = "all-linear"


def load_model(recipe: Recipe, *, reference: bool = False) -> PreTrainedModel:
    """Load the recipe's model, or its reference model ``model.ref_path``, which is never quantised.

    Raises:
        UserError: it cannot be loaded, or not in 4 bits.
    """
    chosen = recipe.model
    key = f"{recipe.name}: model.{'ref_path' if reference else 'path'}"
    code: dict[str, Any] = {"trust_remote_code": chosen.trust_remote_code}
    if reference:
        assert chosen.ref_path is not None
        return load_weights(located(chosen.ref_path, key), chosen.dtype, key=key, **code)
    code["revision"] = chosen.revision
    path, options = located(chosen.path, key), {}
    compute = quantize_for(recipe)
    if compute is not None:
        cpu = recipe.training.use_cpu or not torch.cuda.is_available()
        device = "cpu" if cpu else torch.cuda.current_device()  # the one that the trainer's arguments have chosen
        options = four_bit_options(path, getattr(torch, compute), device, key, "model.quantization null", **code)
    return load_weights(path, chosen.dtype, key=key, **code, **options)


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with the recipe's chat template if there is one."""
    key = f"{recipe.name}: model.path"
    path = located(recipe.model.path, key)
    tokenizer = from_pretrained(
        AutoTokenizer,
        path,
        f"{key}: cannot load a tokenizer from {path}",
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    template = chat_template(recipe)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def quantize_for(recipe: Recipe) -> str | None:
    """The dtype in which 4-bit matrices are multiplied; None without quantization.

    Raises:
        UserError: 4 bits without an adapter, or without bitsandbytes.
    """
    if recipe.model.quantization is None:
        return None
    key = f"{recipe.name}: model.quantization is {recipe.model.quantization}"
    if recipe.lora is None:
        raise UserError(
            f"{key} and lora is null; weights in 4 bits take no gradient: expected an adapter (lora: {{}}), or "
            "model.quantization null"
        )
    require_bitsandbytes(key)
    return compute_dtype(vars(recipe.training), recipe.model.dtype)


def adapter_config(lora: Lora) -> LoraConfig:
    """The configuration of the adapter for peft."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=cast(int, lora.alpha),  # a float, which peft takes as well
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )


def check_targets(model: PreTrainedModel, targets: str | list[str], key: str) -> None:
    """Refuse targets that match no layer, or a layer that LoRA cannot adapt; ``key`` names the option in messages.

    Raises:
        UserError: no layer matches, or one that matches is not linear.
    """
    if targets == ALL_LINEAR:
        return
    layers = {name: module for name, module in model.named_modules() if name}
    linear = {name.rpartition(".")[2] for name, one in layers.items() if isinstance(one, nn.Linear)}
    expected = f"expected {ALL_LINEAR} or a list of some of {', '.join(sorted(linear))}"
    is_pattern = isinstance(targets, str)
    for target in [targets] if isinstance(targets, str) else targets:
        config = LoraConfig(target_modules=target if is_pattern else [target])
        matched = [name for name in layers if check_target_module_exists(config, name)]
        if not matched:
            what = "a pattern that is no layer's whole name" if is_pattern else "which no layer has"
            raise UserError(f"{key} is {show(target)}, {what}; {expected}")
        other = next((name for name in matched if not _can_adapt(layers[name])), None)
        if other is not None:
            kind = type(layers[other]).__name__
            raise UserError(f"{key} is {show(target)}, which matches {other}, a {kind}; {expected}")


def _can_adapt(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding, Conv1D))  # supported by peft's LoRA


def located(path: str, key: str) -> str:
    """A hub id or a packaged model, or the absolute path of a folder or file, for the adapter's configuration."""
    if path in PACKAGED:
        try:
            gguf_file(path)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        return path
    try:
        place = Path(path).expanduser()
        if place.is_dir() or (place.suffix.lower() == GGUF and place.is_file()):
            return absolute(path)
        missing = is_path(path) or place.is_file()
    except OSError as error:
        raise UserError(f"{key} is {show(path)}: {error.strerror}") from None
    if missing:
        raise UserError(f"{key} is {path}, which is not a folder; expected a model's folder, a .gguf file or a hub id")
    return path


def chat_template(recipe: Recipe) -> str | None:
    """The recipe's chat template; None for the tokenizer's own.

    Raises:
        UserError: it is neither a name nor a readable file.
    """
    named, key = recipe.data.chat_template, f"{recipe.name}: data.chat_template"
    if named is None or named in TEMPLATES:
        return named and TEMPLATES[named]
    try:
        return Path(named).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{key} is {show(named)}; expected {', '.join(TEMPLATES)} or a .jinja file") from None
    except OSError as error:
        raise UserError(f"{key} is {show(named)}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{key} {named} is not UTF-8: {error}") from None
