"""What happens to a model before it is trained: checks, its adapter, its dropout, its 4-bit weights.

Of what ``peft.prepare_model_for_kbit_training`` does to a model in 4 or 8 bits, this much is done here:

- its weights are frozen: ``get_peft_model`` does that for every model;
- inputs take a gradient under activation checkpointing: for every model with an adapter;
- norms, embedding and head are *not* made fp32. Frozen norms gain nothing, as the architectures square and sum in fp32
  anyway; an fp32 head and embedding cost 4 bytes for each of vocabulary x hidden (0.9 GB each for DeepSeek-R1-Distill-Qwen-1.5B),
  and hidden states that came out in fp32 would take the fused log-probabilities off the matrix units. The adapter is fp32.
"""

import warnings

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from prefopt.train.config import PreferenceConfig


def check_arguments(
    model: object, args: object, train_dataset: object, ref_model: object = None
) -> None:
    """Raise ``TypeError`` for the arguments that everything else relies on, ``ValueError`` for one that has no use."""
    if not isinstance(args, PreferenceConfig):
        raise TypeError(f"args is a {type(args).__name__}; expected a PreferenceConfig")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a PreTrainedModel, loaded, or a PeftModel of one"
        )
    if train_dataset is None:
        raise TypeError("train_dataset is None; expected rows to train on")
    args.check()
    if ref_model is not None and not args.spec.needs_reference:
        raise ValueError(
            f"ref_model is given; method {args.method!r} has no reference model, leave it out"
        )


def ready(
    model: nn.Module, ref_model: nn.Module | None, args: PreferenceConfig, peft_config: object
) -> nn.Module:
    """The model to train: in its adapter, without dropout, with a gradient where something can take one."""
    keep_gradients_of_four_bits(model)
    if peft_config is not None:
        model = with_adapter(model, peft_config, args.seed)
    if args.disable_dropout:
        for module in [model] if ref_model is None else [model, ref_model]:
            disable_dropout(module)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"no parameter of {type(model).__name__} requires a gradient; nothing to train"
        )
    if hasattr(model, "peft_config") and args.activation_checkpointing:
        model.enable_input_require_grads()
    return model


def with_adapter(model: nn.Module, peft_config: object, seed: int) -> nn.Module:
    """The model inside a new adapter; the same seed gives the same one."""
    from peft import PeftConfig, PeftModel, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}; expected a peft.PeftConfig such as LoraConfig"
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "model is a PeftModel and peft_config is given; expected one of the two: merge the adapter first, or "
            "leave peft_config out"
        )
    set_seed(seed)
    with warnings.catch_warnings():
        # peft asks transformers for an attribute by its former name; nothing a user could act on
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return get_peft_model(model, peft_config)


def keep_gradients_of_four_bits(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU, for the packed form has no gradient.

    On CPUs with AVX512-BF16 the first forward pass in evaluation mode packs a layer's weights for good; every later step
    would train without the gradient that passes through that layer, and without a word.

    Raises:
        ValueError: a layer was packed before it came here.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"model was evaluated before, which packed the 4-bit weights of {name} for inference; load it again, and "
                "train it before it is evaluated"
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


def pad_token_id(tokenizer: PreTrainedTokenizerBase | None, model: nn.Module) -> int:
    """The id to fill rows up with: masked everywhere, so the end of sequence does if there is no other."""
    config = model.config.get_text_config()
    for source in (tokenizer, config):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            if isinstance(value, list):
                value = value[0]
            if value is not None:
                return int(value)
    return 0
