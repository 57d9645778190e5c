"""A head with PEFT layers on it as operands of ``linear_logprob``.

Each adapter is read in its state at the time of the call: active, disabled or merged. PEFT is not imported: its layers
are recognised by their attributes and class names. Unknown adapters are refused, never ignored.
"""

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from prefopt_kernels.parallel.dtensor import is_dtensor
from prefopt_kernels.parallel.vocab import Lora

PeftLayer: TypeAlias = Any  # PEFT is not imported
LORA_LINEAR = "peft.tuners.lora.layer.Linear"
ROW_HOOKS = {"_adapter_names_pre_forward_hook", "_alora_offsets_pre_forward_hook"}  # of PEFT
FOUR_BIT = {"Linear4bit", "Params4bit", "Linear8bitLt", "Int8Params"}  # of bitsandbytes


class HeadOperands(NamedTuple):
    """``W h + r B (A h) + b`` as operands of ``linear_logprob``."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    lora: Lora | None = None  # A (R, H), B (V, R), r


def operands_of(module: PeftLayer) -> HeadOperands:
    """The operands of a head's product in its present state, with its active adapters.

    Raises:
        ValueError: the head is quantised, or an adapter on it cannot be written as ``r B A``.
    """
    if _row_hooks(module):
        raise ValueError(
            "adapter_names, which selects an adapter per row, is not supported with an adapter on the lm_head; score "
            "the rows of each adapter separately"
        )
    if hasattr(module, "modules_to_save"):
        active = None if module.disable_adapters or not module.active_adapters else module.active_adapters[0]
        saved = module.modules_to_save
        return operands_of(saved[active] if active in saved else module.original_module)
    if hasattr(module, "token_adapter"):  # trainable_token_indices with a tied head
        return _with_trained_tokens(module.token_adapter)
    if hasattr(module, "trainable_tokens_delta"):
        return _with_trained_tokens(module)
    if hasattr(module, "base_layer"):
        return _with_lora(module)
    return HeadOperands(_dense_weight(module), getattr(module, "bias", None))


def _row_hooks(module: nn.Module) -> list[int]:
    """Keys of the forward pre-hooks by which PEFT passes per-row arguments, such as ``adapter_names``, to a layer."""
    functions = {key: getattr(hook, "func", hook) for key, hook in module._forward_pre_hooks.items()}
    return [key for key, each in functions.items() if getattr(each, "__name__", "") in ROW_HOOKS]


def remove_row_hooks(model: nn.Module) -> None:
    """Remove PEFT's hooks for ``adapter_names`` from every layer.

    PEFT removes them only after a forward pass without an exception; otherwise later calls would use the adapters of
    the failed one.
    """
    for module in model.modules():
        for key in _row_hooks(module):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _dense_weight(module: nn.Module) -> Tensor:
    weight, kind = getattr(module, "weight", None), type(module).__name__
    if {kind, type(weight).__name__} & FOUR_BIT:
        raise ValueError(
            f"the lm_head is quantised ({kind}), and its weight would have to be dequantised at every call; exclude "
            "the head from quantisation, with llm_int8_skip_modules=['lm_head'] in BitsAndBytesConfig. The layers "
            "below it may be 4-bit"
        )
    shape = getattr(weight, "ds_shape", getattr(weight, "shape", ()))  # ds_shape: the full shape under ZeRO-3
    if not isinstance(weight, Tensor) or len(shape) != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"the lm_head ({kind}) has a weight that is {got}; expected a floating point (V, H) matrix: exclude the "
            "head from quantisation"
        )
    return weight


def _is_inactive(layer: PeftLayer) -> bool:
    """Whether the layer's adapters add nothing: disabled, or merged into the weight."""
    if layer.disable_adapters or not layer.active_adapters:
        if layer.merged:
            layer.unmerge()  # as PEFT's own forward would
        return True
    return layer.merged


def _with_lora(layer: PeftLayer) -> HeadOperands:
    weight, bias, inner = operands_of(layer.base_layer)
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(layer).__mro__]
    if LORA_LINEAR not in kinds:
        raise ValueError(
            f"the lm_head has an adapter of type {kinds[0]}; only plain LoRA is supported there: remove lm_head from "
            "target_modules, or train the whole head with modules_to_save=['lm_head']"
        )
    if _is_inactive(layer):
        return HeadOperands(weight, bias, inner)
    adapters = [] if inner is None else [inner]
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        _check_plain(layer, name)
        A, B, scale = layer.lora_A[name].weight, layer.lora_B[name], layer.scaling[name]
        adapters.append((A, B.weight, float(scale)))
        if B.bias is not None:  # lora_bias=True
            extra = scale * B.bias
            bias = (extra if bias is None else bias + extra).to(weight.dtype)
    if len(adapters) < 2:
        return HeadOperands(weight, bias, adapters[0] if adapters else None)
    # one adapter of the summed rank: r1 B1 A1 + r2 B2 A2 = [B1 B2] [r1 A1; r2 A2]
    A = torch.cat([scale * A for A, _, scale in adapters])
    return HeadOperands(weight, bias, (A, torch.cat([B for _, B, _ in adapters], dim=1), 1.0))


def _check_plain(layer: PeftLayer, name: str) -> None:
    if name in layer.lora_variant:
        kind = type(layer.lora_variant[name]).__name__
        raise ValueError(
            f"adapter {name!r} on the lm_head is a {kind}, which is not a product of two matrices; expected plain LoRA "
            "there (use_dora=False and no other variant)"
        )
    dropout = layer.lora_dropout[name]
    if dropout.training and getattr(dropout, "p", 0.0) > 0:
        raise ValueError(
            f"adapter {name!r} on the lm_head has dropout {dropout.p}, and the head scores hidden states without "
            "dropout; set lora_dropout=0, or only this layer's lora_dropout p to 0"
        )


def _with_trained_tokens(layer: PeftLayer) -> HeadOperands:
    """W + E (new - old) for replaced rows of the weight; E (V, R) has the one-hot columns of those rows.

    The weight is not copied, and only the trained rows get a gradient.
    """
    weight, bias, inner = operands_of(layer.base_layer)
    if _is_inactive(layer):
        return HeadOperands(weight, bias, inner)
    if inner is not None or bias is not None or not isinstance(layer.base_layer, nn.Linear):
        raise ValueError(
            "trainable_token_indices applies to the lm_head, which is tied to the embedding and has "
            f"{'a bias, which PEFT ignores' if bias is not None else 'another adapter'}; expected a plain linear "
            "layer: remove lm_head from target_modules, or train both layers with modules_to_save"
        )
    if is_dtensor(weight):
        raise ValueError(
            "trainable_token_indices applies to an lm_head that is sharded over ranks, which is not supported; "
            "expected the whole embedding to be trained, with modules_to_save, or a replicated head"
        )
    indices: list[int] = []
    for name in layer.active_adapters:
        indices += layer.token_indices[name]
    rows = torch.tensor(indices, device=weight.device)
    new = torch.cat([layer.trainable_tokens_delta[name] for name in layer.active_adapters])
    A = new.float() - weight[rows].float()
    E = torch.zeros(weight.shape[0], len(rows), dtype=weight.dtype, device=weight.device)
    E = E.scatter(0, rows[None], torch.ones_like(E[:1]))
    return HeadOperands(weight, bias, (A, E, 1.0))
