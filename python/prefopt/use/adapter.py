"""An adapter merged into its base, also where head and embedding share one matrix; the vocabulary it was trained on."""

from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Merge the active adapter in place; the merged model computes what the adapter computed beside the weights.

    PEFT merges the adapters of a tied head and embedding into the matrix that they share, where a change of one would
    also change the other, or would be applied twice. So the head gets its own matrix first. The two stay tied only
    where their adapters are tied as well.

    Raises:
        ValueError, AttributeError, NotImplementedError, KeyError: PEFT cannot merge it.
    """
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    shared = set() if head is None else _storages(head) & _storages(embedding)
    tied = bool(shared) and _storages(head) == _storages(embedding)
    if shared:
        if not tied or isinstance(head, BaseTunerLayer):  # LoRA adds to the matrix once per layer
            _separate(head, shared)
        _set_tied(base, False)
    for layer in (head, embedding):
        tokens = getattr(layer, "base_layer", None)
        if isinstance(tokens, TrainableTokensWrapper):  # PEFT would merge into a copy of its weight
            layer.base_layer = tokens.unload_and_optionally_merge_module(
                merge=True, safe_merge=True, adapter_names=None
            )
    # safe_merge checks that the merged values are finite
    merged = model.merge_and_unload(safe_merge=True)
    if tied:
        merged.get_output_embeddings().weight = merged.get_input_embeddings().weight
        _set_tied(merged, True)
    return merged


def vocabulary_rows(folder: Path) -> int | None:
    """Rows of the embedding or head that an adapter holds besides its own matrices; None if it holds neither."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (it cannot be iterated)
            layer, _, name = key.rpartition(".")
            if name == "weight" and "lora_" not in layer and set(EMBEDDING_LAYER_NAMES) & set(layer.split(".")):
                return file.get_slice(key).get_shape()[0]
    return None


def _storages(module: nn.Module) -> set[int]:
    """Where a layer's weights and its adapters' are in memory; its bias has no counterpart to be tied to."""
    return {
        parameter.untyped_storage().data_ptr()
        for name, parameter in module.named_parameters()
        if "lora_" in name or name.rpartition(".")[2] != "bias"
    }


def _separate(head: nn.Module, shared: set[int]) -> None:
    for module in head.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.untyped_storage().data_ptr() in shared:
                own = parameter.detach().clone()
                setattr(module, name, nn.Parameter(own, requires_grad=False))


def _set_tied(model: PreTrainedModel, tied: bool) -> None:
    model.config.get_text_config().tie_word_embeddings = tied
    model.config.tie_word_embeddings = tied
