"""An adapter merged into its base, in fp32, once; then rounded to the dtype it is kept in."""

import tempfile
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefopt.command_line import WHOLE
from prefopt.four_bits import quantization_options, refuse_broken_blocks
from prefopt.pretrained import from_pretrained
from prefopt.recipe.load import RecipeError
from prefopt.use.load import Source, load_model, stop_ids


def merged_model(source: Source, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model without adapter, fp32, on the CPU: ``W + scale * B A`` for each adapted matrix, computed in fp32.

    Its generation config stops where the run's chat template ends a turn.

    Raises:
        RecipeError: the base is stored quantised, the adapter cannot be merged, or weights are not finite.
    """
    _refuse_quantised(source)
    model = load_model(source, dtype="float32", quantization=WHOLE)
    if source.base is not None:
        separate_tied_head(model)
        try:
            # safe_merge looks for values that are not finite before it writes them
            model = model.merge_and_unload(safe_merge=True)
        except (ValueError, AttributeError, NotImplementedError) as error:
            raise RecipeError(
                f"the adapter in {source.folder} cannot be merged: {str(error).strip()}"
            ) from None
    _check_finite(model, f"{source.folder} has weights")
    settled = model.generation_config
    stops = stop_ids(model, tokenizer, source.template_kwargs)
    settled.eos_token_id = stops[0] if len(stops) == 1 else stops
    try:
        settled.validate(strict=True)
    except ValueError:
        settled.do_sample = (
            True  # a temperature without it, as some published models have, cannot be saved again
        )
    return model


def separate_tied_head(model: nn.Module) -> None:
    """Give head and embedding a matrix each where they share one and an adapter sits on either.

    Merged into the shared matrix, a change of the one would also be made to the other.
    """
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = [
        isinstance(module, BaseTunerLayer) or hasattr(module, "modules_to_save")
        for module in (head, embedding)
    ]
    if not base.config.get_text_config().tie_word_embeddings or not any(adapted):
        return
    inner = getattr(head, "base_layer", head)
    if not hasattr(inner, "modules_to_save"):
        inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    base.config.get_text_config().tie_word_embeddings = False
    base.config.tie_word_embeddings = False


def save_merged(
    source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str
) -> None:
    """Merged weights (safetensors), configuration, generation config, tokenizer and chat template."""
    _save(_rounded(merged_model(source, tokenizer), source, dtype), tokenizer, folder)


def save_four_bit(
    source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str
) -> None:
    """The merged weights in bitsandbytes' NF4 with doubly quantised scales; head and embedding are not quantised."""
    model = merged_model(source, tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        refuse_broken_blocks(model, "--format merged-4bit", "--format merged")
    model = _rounded(model, source, dtype)
    compute = torch.bfloat16 if model.dtype == torch.float32 else model.dtype
    with tempfile.TemporaryDirectory(dir=folder, prefix="merged-") as scratch:
        _save(model, tokenizer, Path(scratch))
        del model
        quantised = AutoModelForCausalLM.from_pretrained(
            scratch,
            dtype=compute,
            trust_remote_code=source.trust_remote_code,
            **quantization_options(compute, device),
        )
        _save(quantised, tokenizer, folder)


def _rounded(model: PreTrainedModel, source: Source, dtype: str) -> PreTrainedModel:
    """The model in the dtype it is to be kept in."""
    kind = getattr(torch, dtype) if dtype != "auto" else config_of(source).dtype or torch.float32
    model.to(kind)
    _check_finite(model, f"--dtype {str(kind).removeprefix('torch.')} gives weights")
    return model


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.config._name_or_path = ""  # a path of this machine has no place in what is published
    try:
        model.save_pretrained(folder)
    except (ValueError, SafetensorError) as error:  # a full disk is one of the latter
        raise RecipeError(f"the merged model cannot be saved: {str(error).strip()}") from None
    tokenizer.save_pretrained(folder)


def _refuse_quantised(source: Source) -> None:
    config = config_of(source)
    if getattr(config, "quantization_config", None) is not None:
        raise RecipeError(
            f"{source.weights} is stored quantised, and an adapter merged into that would be rounded with it; name the base "
            "that it was made of by --base"
        )


def config_of(source: Source) -> PretrainedConfig:
    """The configuration of the base, or of the whole model."""
    return from_pretrained(
        AutoConfig,
        source.weights,
        f"cannot read the configuration of {source.weights}",
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
    )


def _check_finite(model: nn.Module, what: str) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise RecipeError(f"{what} that are not finite, the first in {name}")
