"""Read a GGUF file back: compare every tensor with the model's weights, and the sizes with its configuration."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from prefopt.errors import UserError
from prefopt.export.gguf_model import BLOCK, kind_of, tensors

SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def read_back_gguf(path: Path, model: PreTrainedModel, quant: str) -> None:
    """Read the file with the gguf package, one tensor at a time, and its sizes with transformers.

    Args:
        path: the file.
        model: the written model, fp32.
        quant: of its matrices.

    Raises:
        UserError: a tensor is missing, unknown or off by more than the rounding of its type, or a size differs.
    """
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in tensors(model, quant):
        found = stored.pop(tensor.name, None)
        if found is None:
            raise _differs(f"it has no {tensor.name}")
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        original = tensor.values.float().cpu()
        if values.shape != original.shape:
            raise _differs(f"{tensor.name} is {values.shape}, expected {tuple(original.shape)}")
        error = torch.tensor(values).sub_(original).abs_()
        del values
        if not (error <= rounding_of(original, kind_of(tuple(original.shape), quant))).all():
            raise _differs(f"{tensor.name} is off by {error.max():.2g}")
    if stored:
        raise _differs(f"{next(iter(stored))} has no place in the model")
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    for name in SIZES:
        found, expected = getattr(config, name), getattr(model.config, name)
        if found != expected:
            raise _differs(f"{name} is {found}, expected {expected}")


def rounding_of(values: Tensor, kind: str) -> Tensor:
    """Largest error of each stored value of ``values`` (fp32), by the definition of its type.

    Example:
        >>> rounding_of(torch.tensor([[1.0, -3.0]]), "F16").tolist()
        [[0.00048828125, 0.00146484375]]
    """
    if kind == "F32":
        return torch.zeros_like(values)
    if kind == "F16":  # to nearest; below 2**-14 the numbers are 2**-24 apart
        return (2.0**-11 * values.abs()).clamp_min(2.0**-25)
    largest = values.view(-1, BLOCK).abs().amax(1, keepdim=True)
    # To the nearest multiple of the scale, largest / 127, which is computed in fp32 and stored in F16. Below 2**-14 the
    # scale is off by up to 2**-25, times a multiple of up to 127.
    scale = (largest * 2.0**-11).clamp_min(127 * 2.0**-25)
    error = (largest / 254 + scale) * (1 + 2.0**-20)
    return error.expand(-1, BLOCK).reshape(values.shape)


def _differs(what: str) -> UserError:
    return UserError(f"the GGUF file, read again, is not the model: {what}; nothing was exported")
