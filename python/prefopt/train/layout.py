"""The distributed layouts that the trainer supports: whole, FSDP2 and DeepSpeed's ZeRO."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

WHOLE, FSDP2, LOADED_IN_SHARDS, ZERO, ZERO_3 = (
    "whole on each process",
    "FSDP2",
    "FSDP2 while loading",
    "ZeRO-1 or ZeRO-2",
    "ZeRO-3",
)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # sections of DeepSpeed's configuration


class Layout:
    """How the model of ``trainer`` is distributed.

    Args:
        trainer: built; its model is not wrapped yet.

    Raises:
        ValueError: an unsupported layout.
    """

    def __init__(self, trainer: Trainer):
        refuse_unsupported(trainer)
        self.accelerator = trainer.accelerator
        if trainer.is_fsdp_enabled:
            self.kind = FSDP2
        elif trainer.is_distributed_loading_by_transformers:
            self.kind = LOADED_IN_SHARDS
        elif trainer.is_deepspeed_enabled:
            stage = self._deepspeed_config().get("zero_optimization", {}).get("stage")
            self.kind = ZERO_3 if stage == 3 else ZERO
        else:
            self.kind = WHOLE
        # an engine places the policy itself; otherwise Trainer decides
        self._moves = trainer.place_model_on_device or self.by_engine

    @property
    def in_lockstep(self) -> bool:
        """Whether a forward pass needs all processes, because each of them has a part of every weight."""
        return self.kind in (FSDP2, LOADED_IN_SHARDS, ZERO_3)

    @property
    def by_engine(self) -> bool:
        """Whether the model must be called through DeepSpeed's engine."""
        return self.kind in (ZERO, ZERO_3)

    @property
    def may_copy(self) -> bool:
        """Whether the model, as it came, can be copied."""
        return self.kind != LOADED_IN_SHARDS

    @property
    def prepared_later(self) -> bool:
        """Whether Trainer places the model's weights only when it starts to train."""
        return self.kind in (FSDP2, ZERO, ZERO_3)

    def frozen(self, model: nn.Module) -> nn.Module:
        """A model that is never trained, sharded like the policy, or on the device of this process."""
        if self.kind == FSDP2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(self.accelerator, model)
        if self.kind == ZERO_3:
            import deepspeed

            config = _without_training(self._deepspeed_config())
            engine, *_ = deepspeed.initialize(model=model, config=config)
            return engine
        if self._moves:
            model = model.to(self.accelerator.device)
        if self.kind == ZERO:  # the engine casts the policy's weights, so equal models stay equal
            config = self._deepspeed_config()
            dtypes = [HALF[name] for name in HALF if config.get(name, {}).get("enabled") is True]
            model = model.to(dtypes[0]) if dtypes else model
        return model

    def check_prepared(self, model: nn.Module) -> None:
        """Raise ``ValueError`` for a model that accelerate should have sharded, and has not yet."""
        if self.kind == FSDP2 and not isinstance(model, FSDPModule):
            raise ValueError(
                "evaluate was called before train: accelerate shards a model only together with its optimizer; train "
                "first, or evaluate on one process"
            )

    def check_compilable(self) -> None:
        """Raise ``ValueError`` where compiled layers are untested."""
        processes = self.accelerator.num_processes
        if self.kind != WHOLE or processes > 1:
            raise ValueError(
                f"torch_compile is True with {processes} processes and the model {self.kind}, which is not supported; "
                "set torch_compile to False, or train on one process"
            )

    def _deepspeed_config(self) -> dict:
        return self.accelerator.state.deepspeed_plugin.deepspeed_config


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise ``ValueError`` for an unsupported layout."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "several GPUs are visible to one process, which Trainer would use through nn.DataParallel; start with "
            "torchrun or accelerate launch, or make one GPU visible"
        )
    reason = _why_not(trainer)
    if reason is not None:
        raise ValueError(f"{reason}; expected one process, DDP, FSDP2, or DeepSpeed's ZeRO, as in docs/distributed.md")


def _why_not(trainer: Trainer) -> str | None:
    parallel, model = trainer.accelerator.parallelism_config, cast(PreTrainedModel, trainer.model)
    loaded = trainer.is_distributed_loading_by_transformers
    layout = getattr(model.config, "distributed_config", None) if loaded else None
    for sizes, name, what in (
        (parallel, "cp_size", "context parallelism (a sequence cut over processes)"),
        (parallel, "sp_size", "sequence parallelism"),
        (parallel, "tp_size", "tensor parallelism"),
        (layout, "tp_size", "tensor parallelism"),
        (layout, "pp_size", "pipeline parallelism"),
        (layout, "ep_size", "expert parallelism"),
    ):
        size = getattr(sizes, name, None) or 1
        if size > 1:
            return f"{name} is {size}: {what} is not supported"
    if parallel is not None:
        return "a parallelism_config is given, which is not supported"
    if trainer.is_fsdp_enabled:
        return _why_not_fsdp(trainer.accelerator.state.fsdp_plugin)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return (
            "the model's weights were partitioned by DeepSpeed while it was loaded, and the trainer reads them "
            "whole first; set zero3_init_flag: false"
        )
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if sharded and not loaded:
        return "the model's weights are DTensors already; pass it whole, and let accelerate shard it"
    return None


def _why_not_fsdp(plugin) -> str | None:
    if plugin.fsdp_version != 2:
        return f"fsdp_version is {plugin.fsdp_version}, which is not supported; set fsdp_version: 2"
    if plugin.cpu_ram_efficient_loading:
        return (
            "fsdp_cpu_ram_efficient_loading is on, which gives the weights to the first process only, and the trainer "
            "reads them on each; set it to false"
        )
    return None


def _without_training(config: dict) -> dict:
    """DeepSpeed's configuration for a model without an optimizer; what is still "auto" is left to its defaults."""
    config = copy.deepcopy(config)
    for section in ("optimizer", "scheduler"):
        config.pop(section, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    config = _settled(config)
    config.pop("train_batch_size", None)
    config.pop("gradient_accumulation_steps", None)
    return config | {"train_micro_batch_size_per_gpu": 1}  # it must have one; no batch is counted


def _settled(config: dict) -> dict:
    return {
        name: _settled(value) if isinstance(value, dict) else value for name, value in config.items() if value != "auto"
    }


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """PEFT's ``disable_adapter`` without its check of every layer at each call, also for a model sharded by FSDP2.

    PEFT turns the adapter's ``requires_grad`` off and on again, and FSDP2 has two parameters for each weight, the
    whole one and its shard. Both changes must reach the same one, or the shard stays without a gradient.
    """
    tuner = model.base_model
    if not hasattr(tuner, "disable_adapter_layers"):  # prompt learning
        with model.disable_adapter():
            yield
        return
    sharded = [
        module
        for module in model.modules()
        if isinstance(module, FSDPModule) and any(p.requires_grad for p in cast(nn.Module, module).parameters())
    ]
    tuner.disable_adapter_layers()
    try:
        yield
        for module in sharded:
            module.reshard()
    finally:
        tuner.enable_adapter_layers()
