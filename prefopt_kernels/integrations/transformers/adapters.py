"""What a head computes with PEFT's layers on it, in the operands of ``linear_logprob``.

Each adapter is read in the state that it has at the call: active, switched off, or merged. PEFT is not imported: its
layers are known by what they carry and by their names. What is not known is refused, never left out.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefopt_kernels.parallel.dtensor import is_dtensor

LORA_LINEAR = "peft.tuners.lora.layer.Linear"
ROW_HOOKS = {"_adapter_names_pre_forward_hook", "_alora_offsets_pre_forward_hook"}  # of PEFT
FOUR_BIT = {"Linear4bit", "Params4bit", "Linear8bitLt", "Int8Params"}  # of bitsandbytes


class HeadOperands(NamedTuple):
    """``W h + r B (A h) + b`` in the terms of ``linear_logprob``."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora: tuple[Tensor, Tensor, float] | None  # A (R, H), B (V, R), r


def operands_of(module: nn.Module) -> HeadOperands:
    """The operands of a head's product as it stands: with its active adapters, or without those switched off.

    Raises:
        ValueError: the head is quantised, or one of its adapters cannot be written as ``r B A``.
    """
    _refuse_mixed_batch(module)
    if hasattr(module, "modules_to_save"):
        return operands_of(_saved_module_in_use(module))
    if hasattr(module, "token_adapter"):  # of trainable_token_indices, in a head tied to them
        return _with_trained_tokens(module.token_adapter)
    if hasattr(module, "trainable_tokens_delta"):
        return _with_trained_tokens(module)
    if hasattr(module, "base_layer"):
        return _with_lora(module)
    return HeadOperands(_dense_weight(module), getattr(module, "bias", None), None)


def _row_hooks(module: nn.Module) -> list[int]:
    """Keys of the forward pre-hooks by which PEFT gives a layer what differs by row, such as ``adapter_names``."""
    functions = {key: getattr(hook, "func", hook) for key, hook in module._forward_pre_hooks.items()}
    return [key for key, each in functions.items() if getattr(each, "__name__", "") in ROW_HOOKS]


def _refuse_mixed_batch(module: nn.Module) -> None:
    if _row_hooks(module):
        raise ValueError(
            "adapter_names, another adapter for each row, is not supported with an adapter on the lm_head; score "
            "each adapter's rows by themselves"
        )


def remove_row_hooks(model: nn.Module) -> None:
    """Remove PEFT's hooks for ``adapter_names`` from every layer.

    PEFT removes them after a forward pass that returns. After one that raises they stay, and each later call would use
    the adapters of the failed one.
    """
    for module in model.modules():
        for key in _row_hooks(module):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _saved_module_in_use(wrapper: nn.Module) -> nn.Module:
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    (name,) = wrapper.active_adapters  # PEFT allows one
    saved = wrapper.modules_to_save
    return saved[name] if name in saved else wrapper.original_module


def _dense_weight(module: nn.Module) -> Tensor:
    weight, kind = getattr(module, "weight", None), type(module).__name__
    if {kind, type(weight).__name__} & FOUR_BIT:
        raise ValueError(
            f"the lm_head is quantised ({kind}): its weight would have to be unpacked at every call; keep the head out "
            "of quantisation, with llm_int8_skip_modules=['lm_head'] in BitsAndBytesConfig. The layers below it may be "
            "4-bit"
        )
    shape = getattr(weight, "ds_shape", getattr(weight, "shape", ()))  # the first: ZeRO-3's, of the whole
    if not isinstance(weight, Tensor) or len(shape) != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"the lm_head ({kind}) has a weight that is {got}; expected a floating point (V, H) matrix: leave the head "
            "out of quantisation"
        )
    return weight


def _is_off(layer: nn.Module) -> bool:
    """Whether the layer's adapters add nothing: switched off, or part of the weight already."""
    if layer.disable_adapters or not layer.active_adapters:
        if layer.merged:
            layer.unmerge()  # as PEFT's own forward does, only earlier
        return True
    return layer.merged


def _with_lora(layer: nn.Module) -> HeadOperands:
    weight, bias, inner = operands_of(layer.base_layer)
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(layer).__mro__]
    if LORA_LINEAR not in kinds:
        raise ValueError(
            f"an adapter of type {kinds[0]} sits on the lm_head, and only plain LoRA "
            "can be scored there; take lm_head out of target_modules, or train all of it with "
            "modules_to_save=['lm_head']"
        )
    if _is_off(layer):
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
    return HeadOperands(weight, bias, _stacked(adapters))


def _stacked(adapters: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float] | None:
    """Several adapters as one of their ranks' sum: r1 B1 A1 + r2 B2 A2 = [B1 B2] [r1 A1; r2 A2]."""
    if len(adapters) < 2:
        return adapters[0] if adapters else None
    A = torch.cat([scale * A for A, _, scale in adapters])
    return A, torch.cat([B for _, B, _ in adapters], dim=1), 1.0


def _check_plain(layer: nn.Module, name: str) -> None:
    if name in layer.lora_variant:
        kind = type(layer.lora_variant[name]).__name__
        raise ValueError(
            f"adapter {name!r} on the lm_head is a {kind}, which is more than a product of two matrices; expected "
            "plain LoRA there (use_dora=False and no other variant)"
        )
    dropout = layer.lora_dropout[name]
    if dropout.training and getattr(dropout, "p", 0.0) > 0:
        raise ValueError(
            f"adapter {name!r} on the lm_head has dropout {dropout.p}, and the head scores hidden states without "
            "dropout; set lora_dropout=0, or p of this layer's lora_dropout to 0 to keep it elsewhere"
        )


def _with_trained_tokens(layer: nn.Module) -> HeadOperands:
    """Some rows of the weight are replaced: W + E (new - old), with the one-hot columns of those rows in E (V, R).

    So the weight is not copied, and only the trained rows get a gradient.
    """
    weight, bias, inner = operands_of(layer.base_layer)
    if _is_off(layer):
        return HeadOperands(weight, bias, inner)
    if inner is not None or bias is not None or not isinstance(layer.base_layer, nn.Linear):
        raise ValueError(
            "trainable_token_indices reaches the lm_head, which is tied to the embedding and has "
            f"{'a bias, that PEFT leaves out' if bias is not None else 'another adapter'}; expected a plain linear "
            "layer: take lm_head out of target_modules, or train both layers with modules_to_save"
        )
    if is_dtensor(weight):
        raise ValueError(
            "trainable_token_indices reaches a head that is spread over processes, which is not supported; expected "
            "the whole embedding to be trained, with modules_to_save, or a head that each process has whole"
        )
    rows, new = [], []
    for name in layer.active_adapters:
        rows += layer.token_indices[name]
        new.append(layer.trainable_tokens_delta[name])
    rows = torch.tensor(rows, device=weight.device)
    A = torch.cat(new).float() - weight[rows].float()
    E = torch.zeros(weight.shape[0], len(rows), dtype=weight.dtype, device=weight.device)
    E = E.scatter(0, rows[None], torch.ones_like(E[:1]))
    return HeadOperands(weight, bias, (A, E, 1.0))
