"""Architecture, metadata and tensors of a GGUF file, for the models whose layout is known here.

What differs between the two worlds, and would give wrong answers without a word:

- The llama of llama.cpp rotates neighbouring pairs of a head's values, Hugging Face's rotates the two halves: the rows
  of q and k change places (and their biases). Qwen's does as Hugging Face.
- A head that is tied to the embedding is not stored.
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
    """A tensor on its way into the file: its name there, its values (fp32), and how they are kept."""

    name: str
    values: torch.Tensor
    kind: str  # "F32", "F16" or "Q8_0"


def check_config(config: PretrainedConfig) -> None:
    """Refuse a model that the file could not describe.

    Raises:
        UserError: with the reason.
    """
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"--format gguf is written for {', '.join(ARCHITECTURES)}; this model is {config.model_type}: use --format "
            "merged, and llama.cpp's own converter if it knows the model"
        )
    rope = _rope(config)
    reasons = []
    if rope["rope_type"] not in ROPE_TYPES:
        reasons.append(f"rotary scaling {rope['rope_type']!r} (known: {', '.join(ROPE_TYPES)})")
    elif rope["rope_type"] == "llama3" and config.model_type != "llama":
        reasons.append(f"rotary scaling 'llama3' in a {config.model_type}")
    if rope.get("partial_rotary_factor", 1) != 1:
        reasons.append("a rotary embedding of a part of each head")
    if getattr(config, "use_sliding_window", False):
        reasons.append("sliding-window attention")
    if config.hidden_act != "silu":
        reasons.append(f"the activation {config.hidden_act!r}")
    if reasons:
        raise UserError(f"--format gguf cannot describe what this model has: {'; '.join(reasons)}. Use --format merged")


def add_metadata(writer: Any, config: PretrainedConfig) -> None:
    """Sizes and constants of the architecture, into a ``gguf.GGUFWriter``."""
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
    """Every tensor of the file, in its order there.

    Raises:
        UserError: a weight without a place in the file.
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
    """How a tensor is kept: vectors in F32, matrices as asked for, but F16 where q8_0's blocks do not fill a row.

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
    """(heads * D, ...) rows of each head from two halves to neighbouring pairs: 0, D/2, 1, D/2 + 1, ...

    Example:
        >>> interleaved(torch.arange(8), heads=2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def rope_divisors(model: PreTrainedModel) -> torch.Tensor:
    """(D / 2,) fp32: by what the rotary frequencies ``theta ** (-2 i / D)`` are divided to give the model's own."""
    half = _head_size(model.config) // 2
    theta = float(_rope(model.config)["rope_theta"])
    plain = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    return (plain / model.model.rotary_emb.inv_freq.double().cpu()).float()


def encoded(tensor: Stored) -> np.ndarray:
    """The values as they are written.

    Raises:
        UserError: values that F16 cannot hold.
    """
    import gguf

    values = tensor.values.float().cpu().contiguous().numpy()
    if tensor.kind == "F32":
        return values
    largest = float(np.abs(values).max(initial=0))
    scale = largest / 127 if tensor.kind == "Q8_0" else largest  # what is kept in F16
    if scale > float(np.finfo(np.float16).max):
        raise UserError(f"{tensor.name} has a weight of {largest:.3g}, too large for {tensor.kind}; use --quant f32")
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.kind])


def stored_bytes(tensor: Stored) -> int:
    """Bytes that ``encoded`` gives."""
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
