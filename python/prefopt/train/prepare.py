"""Checks and changes of a model before training: its adapter, its dropout, its 4-bit weights.

In place of ``peft.prepare_model_for_kbit_training``, for models in 4 bits:

- ``get_peft_model`` freezes the weights, as for every model;
- inputs take a gradient under activation checkpointing, as for every model with an adapter;
- norms, embedding and head are *not* cast to fp32. Frozen norms gain nothing, because the architectures square and sum
  in fp32. An fp32 head and embedding cost 4 bytes per weight (0.9 GB each for DeepSeek-R1-Distill-Qwen-1.5B), and fp32
  hidden states would keep the fused log-probabilities off the tensor cores. The adapter is fp32.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from prefopt.generation import make_savable
from prefopt.models import from_pretrained
from prefopt.train.config import PreferenceConfig
from prefopt.train.vocabulary import check_token_indices
from prefopt_kernels.integrations.transformers import lm_head_of

if TYPE_CHECKING:
    from peft import PeftConfig

# Training and evaluation, with and without gradient, adapter on and off, and each of them checkpointed or not.
COMPILED_VARIANTS = 16


def check_arguments(model: Any, args: object, train_dataset: object, ref_model: object, peft_config: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` for arguments that do not fit; changes nothing."""
    if not isinstance(args, PreferenceConfig):
        raise TypeError(f"args is a {type(args).__name__}; expected a PreferenceConfig")
    base = _base(model)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; expected a PreTrainedModel, loaded, or a PeftModel of one")
    if train_dataset is None:
        raise TypeError("train_dataset is None; expected rows to train on")
    args.check()
    if ref_model is not None and not args.spec.needs_reference:
        raise ValueError(f"ref_model is given; method {args.method!r} has no reference model, leave it out")
    _check_adapter(model, peft_config)
    lm_head_of(model)
    if ref_model is None or isinstance(ref_model, str):
        return
    if not isinstance(ref_model, nn.Module):
        raise TypeError(f"ref_model is a {type(ref_model).__name__}; expected a loaded model, or a folder or hub id")
    lm_head_of(ref_model)
    check_separate(model, ref_model, adapted_later=peft_config is not None)


def _check_adapter(model: PreTrainedModel, peft_config: object) -> None:
    if peft_config is None:
        return
    from peft import PeftConfig, PeftModel

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__}; expected a peft.PeftConfig such as LoraConfig")
    if isinstance(model, PeftModel):
        raise ValueError(
            "model is a PeftModel and peft_config is given; expected one of the two: merge the adapter first, or "
            "leave peft_config out"
        )
    check_token_indices(model, peft_config)


def _base(model: Any) -> Any:
    """The model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_best(args: PreferenceConfig, eval_sets: Iterable[str]) -> None:
    """Raise ``ValueError`` where there are several evaluation sets and the metric of the best checkpoint names none."""
    metric, names = (args.metric_for_best_model or "").removeprefix("eval_"), set(eval_sets) - {""}
    if not args.load_best_model_at_end or not names:
        return
    if not any(metric.startswith(f"{name}_") for name in names):
        expected = ", ".join(f"eval_{name}_loss" for name in sorted(names))
        raise ValueError(
            f"metric_for_best_model is {metric!r} and eval_dataset has several sets; expected a metric of one of them, "
            f"such as {expected}"
        )


def check_steps(args: PreferenceConfig, rows: int) -> None:
    """Raise ``ValueError`` for a run without a step."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise ValueError(
            f"dataloader_drop_last is True and train_dataset has {rows} rows, fewer than the {batch} of a batch: there "
            "is nothing to train on"
        )
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ValueError(
            f"num_train_epochs is {args.num_train_epochs} and max_steps {args.max_steps}; expected one of them above 0"
        )


def check_separate(model: nn.Module, ref_model: nn.Module, *, adapted_later: bool) -> None:
    """Raise ``ValueError`` if training ``model`` would change what ``ref_model`` computes.

    Frozen weights may be shared: they never change, and both models run in the same mode without dropout.

    Args:
        model, ref_model: on any device, meta included; their weights may be DTensors.
        adapted_later: ``model`` gets an adapter, which is put into its own modules, so that nothing may be shared.
    """
    hint = "leave ref_model out, or pass a model that was loaded or copied (copy.deepcopy) apart"
    if adapted_later:
        hint = "leave ref_model out: the reference is then the model without its adapter"
    if ref_model is model:
        raise ValueError(f"ref_model is the model itself, which training changes; {hint}")
    names = {
        _storage(parameter): name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or adapted_later
    }
    for tensor in (*ref_model.parameters(), *ref_model.buffers()):
        if _storage(tensor) in names:
            raise ValueError(
                f"ref_model shares the memory of {names[_storage(tensor)]} with model, so that training changes both; "
                f"{hint}"
            )


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    """Equal for two tensors that share memory; unique for a tensor without memory, such as one on meta."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    try:
        pointer = local.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor subclass that has no storage of its own
        pointer = 0
    return tensor.device, pointer or id(tensor)


def load_reference(path: str, model: PreTrainedModel) -> PreTrainedModel:
    """The reference from a folder or the hub, in the dtype and with the attention of ``model``.

    Raises:
        UserError: it cannot be loaded.
    """
    base = _base(model)
    return from_pretrained(
        AutoModelForCausalLM,
        path,
        f"ref_model: cannot load a causal language model from {path}",
        dtype=base.dtype,
        attn_implementation=base.config._attn_implementation,
    )


@contextmanager
def unchanged_if_refused(*models: nn.Module | None) -> Iterator[None]:
    """Undo changes of models on an exception: adapters, hooks, dropout, modes, ``requires_grad``; not their device.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Dropout(0.1))
        >>> try:
        ...     with unchanged_if_refused(model):
        ...         disable_dropout(model)
        ...         raise ValueError
        ... except ValueError:
        ...     model[0].p
        0.1
    """
    present = [model for model in models if model is not None]
    fields = [vars(module) for model in present for module in model.modules()]
    for name in ("config", "generation_config"):
        fields += [vars(getattr(model, name)) for model in present if getattr(model, name, None)]
    inner = [  # but not buffers, which a move to another device replaces
        value for each in fields for name, value in each.items() if isinstance(value, dict) and name != "_buffers"
    ]
    kept = [(each, dict(each)) for each in [*fields, *inner]]
    trained = [(p, p.requires_grad) for model in present for p in model.parameters()]
    try:
        yield
    except BaseException:
        for each, content in kept:
            each.clear()
            each.update(content)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def ready(
    model: PreTrainedModel, ref_model: nn.Module | None, args: PreferenceConfig, peft_config: "PeftConfig | None"
) -> PreTrainedModel:
    """The model to train: in its adapter, without dropout, with a gradient where something can take one."""
    keep_gradients_of_four_bits(model)
    if peft_config is not None:
        model = with_adapter(model, peft_config, args.seed)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient; nothing to train")
    if args.disable_dropout:
        for module in [model] if ref_model is None else [model, ref_model]:
            disable_dropout(module)
    if not hasattr(model, "peft_config"):  # an adapter is saved without a generation config
        if getattr(model, "generation_config", None) is not None:
            make_savable(model, model.name_or_path or type(model).__name__)
    elif args.activation_checkpointing:
        model.enable_input_require_grads()
    return model


def with_adapter(model: PreTrainedModel, peft_config: "PeftConfig", seed: int) -> PreTrainedModel:
    """The model inside a new adapter; the same seed gives the same one."""
    from peft import get_peft_model

    set_seed(seed)
    with warnings.catch_warnings():
        # peft asks transformers for an attribute by its former name; nothing a user could act on
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return cast(PreTrainedModel, get_peft_model(model, peft_config))


def compile_layers(model: nn.Module, plugin: TorchDynamoPlugin) -> None:
    """Compile the repeated layers of a model in place, each by itself; equal layers share a graph.

    The head is not compiled, because a hook scores its input. In place, because a wrapper would rename the weights.
    Sizes are symbolic from the start, because a batch may have any length.

    Raises:
        ValueError: no list of layers is found.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(
            f"torch_compile is True; {type(model).__name__} has no nn.ModuleList of layers to compile; set it to False"
        )
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILED_VARIANTS)
    for layer in layers:
        layer.compile(backend=plugin.backend.value.lower(), mode=plugin.mode, dynamic=True)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in _layers(child)]


def keep_gradients_of_four_bits(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU, for the packed form has no gradient.

    On CPUs with AVX512-BF16 the first forward pass in evaluation mode packs a layer's weights permanently; later steps
    would silently lose the gradient that passes through the layer.

    Raises:
        ValueError: a layer was packed before it came here.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"model was evaluated before, which packed the 4-bit weights of {name} for inference; load it again, "
                "and train it before it is evaluated"
            )
        module.support_avx512bf16_for_cpu = False


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0: layers, and the probabilities that attention modules keep as numbers.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        >>> disable_dropout(model)
        >>> model[1].p
        0.0
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def pad_token_id(tokenizer: PreTrainedTokenizerBase | None, model: Any) -> int:  # a model, perhaps with an adapter
    """The padding id; padding is masked, so the end-of-sequence id serves if there is no other."""
    config = model.config.get_text_config()
    for source in (tokenizer, config):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            if isinstance(value, list):
                value = value[0]
            if value is not None:
                return int(value)
    return 0
