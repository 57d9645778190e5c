"""The frozen reference: the model without its adapter, a second model, or scores computed beforehand.

Whichever it is, it is fixed when the trainer is built, before a checkpoint is loaded: a resumed run keeps the reference
it started with. A checkpoint carries the fingerprint of the reference's weights, and ``resume`` refuses another one.
"""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from prefopt.train.layout import adapter_off


class AdapterOff:
    """A PEFT model with its adapters switched off."""

    kind = "adapter off"

    def __init__(self, model: Any):  # a PeftModel
        self.model = model

    @contextmanager
    def running(self, training: bool) -> Iterator[nn.Module]:
        """The model in the policy's mode, with its adapters off."""
        with adapter_off(self.model):
            yield self.model

    def fingerprint(self) -> str:
        """Of the weights that are not an adapter's."""
        adapters = tuple(f".{name}" for name in self.model.peft_config)
        return weights_fingerprint(self.model, without=adapters)


class FrozenModel:
    """A second model that is never trained."""

    def __init__(self, model: nn.Module, kind: str):
        self.model = model.requires_grad_(False)
        self.kind = kind

    @contextmanager
    def running(self, training: bool) -> Iterator[nn.Module]:
        """The reference, in the mode of the policy: quantised layers compute differently in training and evaluation."""
        self.model.train(training)
        yield self.model

    def fingerprint(self) -> str:
        """Of all weights."""
        return weights_fingerprint(self.model)


class TheModelItself:
    """The policy before its first step, to compute scores with and not to keep."""

    kind = "precomputed from the starting model"

    def __init__(self, model: nn.Module):
        self.model = model

    @contextmanager
    def running(self, training: bool) -> Iterator[nn.Module]:
        """The model as it is now."""
        was_training = self.model.training
        self.model.train(training)
        yield self.model
        self.model.train(was_training)

    def fingerprint(self) -> str:
        """Of all weights, as they are now."""
        return weights_fingerprint(self.model)


Reference = AdapterOff | FrozenModel | TheModelItself


def choose_reference(
    model: PreTrainedModel,
    ref_model: nn.Module | None,
    *,
    fresh_adapter: bool,
    precompute: bool,
    may_copy: bool = True,
) -> Reference:
    """What plays the reference.

    Args:
        model: the policy, before training.
        ref_model: a given reference, or None.
        fresh_adapter: the trainer made the adapter itself, so the model without it is the starting point.
        precompute: scores are computed before training; no copy is needed for that.
        may_copy: False where the model's weights are in shards already.

    Raises:
        ValueError: there is no ``ref_model``, and the model is a PEFT model whose adapter already changes it, or would
            have to be copied and cannot be.
    """
    if ref_model is not None:
        return FrozenModel(ref_model, "ref_model")
    if hasattr(model, "disable_adapter"):
        if not fresh_adapter and _adapter_changes(model):
            raise ValueError(
                "model is a PEFT model whose adapter already changes its outputs, so the reference could be the model "
                "with it or without it; pass ref_model, or merge the adapter (merge_and_unload) and pass peft_config"
            )
        return AdapterOff(model)
    if precompute:
        return TheModelItself(model)
    if not may_copy:
        raise ValueError(
            "model was sharded while loading and cannot be copied for a reference; pass ref_model, loaded in the same "
            "way, or train an adapter (peft_config), or set precompute_ref_logps"
        )
    return FrozenModel(copy.deepcopy(model), "copy of the starting model")


@torch.no_grad()
def _adapter_changes(model: Any) -> bool:
    """Whether a few tokens come out differently without the adapter."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    was_training = model.training
    model.eval()
    on = model(input_ids=ids, use_cache=False).logits
    with model.disable_adapter():
        off = model(input_ids=ids, use_cache=False).logits
    model.train(was_training)
    return not torch.equal(on, off)


def weights_fingerprint(module: nn.Module, without: tuple[str, ...] = ()) -> str:
    """sha256 of names, shapes, dtypes and bytes of all parameters and saved buffers.

    Args:
        module: on any device; where its weights are DTensors, every process has to ask.
        without: leave out names in which one of these parts ends the name or is followed by a dot.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = weights_fingerprint(layer)
        >>> with torch.no_grad():
        ...     _ = layer.bias.add_(1)
        >>> weights_fingerprint(layer) == before
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if any(f"{part}." in f"{name}." for part in without):
            continue
        if not isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor!r}".encode())
            continue
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
