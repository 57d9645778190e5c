"""Architecture, metadata and tensors of a GGUF file.

Differences from Hugging Face's layout:

- llama: llama.cpp rotates adjacent pairs of a head's values and Hugging Face its two halves, so the rows (and biases)
  of q and k are permuted. Qwen needs no permutation.
- A tied head is not stored.
- Llama 3.1's scaling of the rotary frequencies is a tensor of divisors.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from prefopt.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")
BLOCK = 32  # values that share a scale in q8_0


class Stored(NamedTuple):
    """A tensor to be written: its name in the file, its values (fp32), and its type."""

    name: str
    values: torch.Tensor
    kind: str  # "F32", "F16" or "Q8_0"


def check_config(config: PretrainedConfig) -> None:
    """Raise ``UserError`` for a model that the file cannot describe."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"--format gguf supports {', '.join(ARCHITECTURES)}; this model is {config.model_type}: use --format "
            "merged, and llama.cpp's own converter if it knows the model"
        )
    rope = _rope(config)
    reasons = []
    if rope["rope_type"] not in ROPE_TYPES:
        reasons.append(f"rotary scaling {rope['rope_type']!r} (known: {', '.join(ROPE_TYPES)})")
    elif rope["rope_type"] == "llama3" and config.model_type != "llama":
        reasons.append(f"rotary scaling 'llama3' in a {config.model_type}")
    if rope.get("partial_rotary_factor", 1) != 1:
        reasons.append("a partial rotary embedding")
    if getattr(config, "use_sliding_window", False):
        reasons.append("sliding-window attention")
    if config.hidden_act != "silu":
        reasons.append(f"the activation {config.hidden_act!r}")
    if reasons:
        raise UserError(f"--format gguf does not support this model's {'; '.join(reasons)}. Use --format merged")


def add_metadata(writer: Any, config: PretrainedConfig) -> None:
    """Write the sizes and constants of the architecture to a ``gguf.GGUFWriter``."""
    import gguf

    rope, head = _rope(config), _head_size(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def tensors(model: PreTrainedModel, quant: str) -> Iterator[Stored]:
    """Every tensor of the file, in order.

    Raises:
        UserError: a weight that the file cannot store.
    """
    import gguf

    config = model.config
    arch = architecture(config.model_type)
    places = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    if _rope(config)["rope_type"] == "llama3":
        yield Stored("rope_freqs.weight", rope_divisors(model), "F32")
    for name, weight in model.named_parameters():  # names a tied head once, by the embedding
        place = places.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise UserError(f"--format gguf has no place for {name} of a {config.model_type}; use --format merged")
        values = weight.detach()
        if config.model_type == "llama" and ".self_attn." in name:
            if ".q_proj." in name:
                values = interleaved(values, config.num_attention_heads)
            elif ".k_proj." in name:
                values = interleaved(values, config.num_key_value_heads)
        yield Stored(place, values, kind_of(tuple(values.shape), quant))


def kind_of(shape: tuple[int, ...], quant: str) -> str:
    """Type of a tensor: F32 for vectors, ``quant`` for matrices, but F16 instead of q8_0 for rows of partial blocks.

    Example:
        >>> kind_of((64,), "q8_0"), kind_of((64, 96), "q8_0"), kind_of((64, 48), "q8_0")
        ('F32', 'Q8_0', 'F16')
    """
    if len(shape) == 1:
        return "F32"
    if quant == "q8_0" and shape[-1] % BLOCK:
        return "F16"
    return quant.upper()


def interleaved(values: torch.Tensor, heads: int) -> torch.Tensor:
    """(heads * D, ...) rows of each head, permuted from two halves to adjacent pairs: 0, D/2, 1, D/2 + 1, ...

    Example:
        >>> interleaved(torch.arange(8), heads=2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def rope_divisors(model: PreTrainedModel) -> torch.Tensor:
    """(D / 2,) fp32: quotient of ``theta ** (-2 i / D)`` and the model's rotary frequencies."""
    half = _head_size(model.config) // 2
    theta = float(_rope(model.config)["rope_theta"])
    plain = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    return (plain / model.model.rotary_emb.inv_freq.double().cpu()).float()


def encoded(tensor: Stored) -> np.ndarray:
    """The bytes to write; raises ``UserError`` for values beyond F16."""
    import gguf

    values = tensor.values.float().cpu().contiguous().numpy()
    if tensor.kind == "F32":
        return values
    largest = float(np.abs(values).max(initial=0))
    scale = largest / 127 if tensor.kind == "Q8_0" else largest  # stored in F16
    if scale > float(np.finfo(np.float16).max):
        raise UserError(f"{tensor.name} has a weight of {largest:.3g}, too large for {tensor.kind}; use --quant f32")
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.kind])


def stored_bytes(tensor: Stored) -> int:
    """Number of bytes of ``encoded``."""
    count = tensor.values.numel()
    if tensor.kind == "Q8_0":
        return count // BLOCK * (BLOCK + 2)  # int8 each, and an F16 scale for the block
    return count * {"F32": 4, "F16": 2}[tensor.kind]


def architecture(model_type: str) -> Any:
    """The ``gguf.MODEL_ARCH`` of a model type."""
    import gguf

    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == model_type)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0} | dict(config.rope_parameters or {})


def _head_size(config: PretrainedConfig) -> int:
    size = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads
