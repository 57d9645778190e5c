"""Merge an adapter into its base in fp32, then round once to the stored dtype."""

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefopt.errors import UserError
from prefopt.export.readback import (
    Snapshot,
    check_four_bits,
    check_logits,
    probe_logits,
    read_back,
    snapshot,
)
from prefopt.generation import make_savable, stop_ids
from prefopt.models import choose_device, four_bit_options, from_pretrained, load_weights, merge_adapter
from prefopt.options import WHOLE
from prefopt.runs import Source, load_model


def merged_model(source: Source, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Merge on the CPU in fp32: ``W + scale * B A`` for each adapted matrix.

    The end of turn of the run's chat template is added to the stop tokens of the generation config.

    Raises:
        UserError: the base is stored quantised, the adapter cannot be merged, weights are not finite, or the merged
            model differs from base and adapter.
    """
    _refuse_quantised(source)
    model = load_model(source, dtype="float32", quantization=WHOLE)
    if source.base is not None:
        expected = probe_logits(model)
        failed = f"the adapter in {source.folder} cannot be merged"
        try:
            model = merge_adapter(cast(PeftModel, model))
        except (ValueError, AttributeError, NotImplementedError, KeyError, RuntimeError) as error:
            raise UserError(f"{failed}: {str(error).strip()}") from None
    _check_finite(model, f"{source.folder} has weights")
    if source.base is not None:
        check_logits(model, probe_logits(model), expected, f"{failed}: the merged model")
    merged = cast(PreTrainedModel, model)
    stops = stop_ids(merged, tokenizer, source.template_kwargs)
    cast(Any, merged).generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
    make_savable(merged, source.weights)
    return merged


def save_merged(source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> None:
    """Write the merged model (safetensors), configurations, tokenizer and chat template, and read them back.

    Raises:
        UserError: it cannot be merged or saved, or differs when it is loaded again.
    """
    read_back(folder, _write(source, tokenizer, folder, dtype), source.trust_remote_code)


def _write(source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> Snapshot:
    """``save_merged`` without reading back; frees its model, so that only one is in memory at a time."""
    model = merged_model(source, tokenizer)
    kind = _stored_dtype(source, dtype)
    # only parameters: rotary frequencies are not stored, and are fp32 in a loaded model
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind)
    _check_finite(model, f"--dtype {str(kind).removeprefix('torch.')} gives weights")
    _save(model, tokenizer, folder)
    return snapshot(model)


def save_four_bit(source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> None:
    """Write the merged model in NF4 of bitsandbytes; head and embedding are not quantised."""
    kind = _stored_dtype(source, dtype)
    compute = torch.bfloat16 if kind == torch.float32 else kind
    code: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    options = four_bit_options(
        source.weights,
        compute,
        choose_device("auto"),
        "--format merged-4bit",
        "--format merged",
        revision=source.revision,
        **code,
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix="merged-") as scratch:
        save_merged(source, tokenizer, Path(scratch), dtype)
        quantised = load_weights(scratch, str(compute).removeprefix("torch."), **code, **options)
        _save(quantised, tokenizer, folder)
        del quantised
        check_four_bits(folder, Path(scratch), compute, source.trust_remote_code)


def _stored_dtype(source: Source, dtype: str) -> torch.dtype:
    """The dtype of the stored weights."""
    return getattr(torch, dtype) if dtype != "auto" else cast(Any, config_of(source)).dtype or torch.float32


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.config._name_or_path = ""  # a local path
    try:
        model.save_pretrained(folder)
    except (ValueError, SafetensorError) as error:  # a full disk raises the latter
        raise UserError(f"the merged model cannot be saved: {str(error).strip()}") from None
    tokenizer.save_pretrained(folder)


def _refuse_quantised(source: Source) -> None:
    config = config_of(source)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{source.weights} is stored quantised, and merging would round the adapter with it; name the unquantised "
            "base by --base"
        )


def config_of(source: Source) -> PretrainedConfig:
    """The configuration of the base, or of a fully trained model."""
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
            raise UserError(f"{what} that are not finite, the first in {name}")
