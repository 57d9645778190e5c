"""Tiny causal LMs of many families, all made from configurations, and batches for them."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
)

EPS = torch.finfo(torch.float32).eps
VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _gpt2() -> GPT2Config:
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(initializer_range=0.3, **sizes, **tokens, **dropout)


def _qwen3_moe() -> Qwen3MoeConfig:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    router = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    return Qwen3MoeConfig(head_dim=16, **experts, **router, **SIZES)


def _falcon_h1() -> FalconH1Config:
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    return FalconH1Config(lm_head_multiplier=0.4, mamba_chunk_size=4, **mamba, **SIZES)


def _gemma3_multimodal() -> Gemma3Config:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {"head_dim": 16, "layer_types": ["full_attention"], **SIZES}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(head_dim=16, **SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "tied qwen3": lambda: Qwen3Config(head_dim=16, tie_word_embeddings=True, **SIZES),
    "softcap gemma2": lambda: Gemma2Config(head_dim=16, final_logit_softcapping=3.0, **SIZES),
    "softcap gemma3": lambda: Gemma3TextConfig(head_dim=16, final_logit_softcapping=5.0, **SIZES),
    "multimodal gemma3": _gemma3_multimodal,
    "bias phi": lambda: PhiConfig(**SIZES),
    "tied gpt2": _gpt2,
    "scale cohere": lambda: CohereConfig(logit_scale=0.3, **SIZES),
    "divided granite": lambda: GraniteConfig(logits_scaling=4.0, **SIZES),
    "multiplier falcon_h1": _falcon_h1,
    "experts qwen3_moe": _qwen3_moe,
    "softcap recurrent_gemma": lambda: RecurrentGemmaConfig(  # two recurrent layers, one of attention
        logits_soft_cap=4.0, **SIZES | {"num_hidden_layers": 3}
    ),
    "softcap nanochat": lambda: NanoChatConfig(final_logit_softcapping=4.0, **SIZES),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of CONFIGS in evaluation mode, with random weights that are the same each time."""
    config = CONFIGS[name]()
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=dtype)
        if getattr(model.lm_head, "bias", None) is not None:
            nn.init.normal_(model.lm_head.bias)  # initialised to zero, which would hide an ignored bias
    return model.eval()


def batch(vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """Three padded sequences with completions of 4, 1 and 3 tokens: ids, attention mask, completion mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (3, 9), generator=generator)
    attention = torch.ones_like(ids)
    completion = torch.zeros_like(ids)
    for row, (start, end) in enumerate(((5, 9), (6, 7), (2, 5))):
        completion[row, start:end] = 1
        ids[row, end:] = 0
        attention[row, end:] = 0
    return ids, attention, completion


def plain_logprobs(model: nn.Module, ids: Tensor, attention: Tensor, completion: Tensor) -> Tensor:
    """Log-probabilities of the completion's tokens from the model's own logits."""
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -ids.shape[1] : -1]
    logp = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return logp[completion[:, 1:].bool()]


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """Every gradient of ``value``, by the parameter's name; the model is left without any."""
    model.zero_grad()
    value.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to a hundred roundings of each tensor's norm: layers, tokens, the softmax."""
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        error = (ours[name] - grad).norm() / grad.norm().clamp(min=EPS)
        assert error < 100 * EPS, f"{name}: {error:.1e}"


def exact_logprobs(model: nn.Module, ids: Tensor, attention: Tensor, completion: Tensor) -> Tensor:
    """Log-probabilities in fp64 from the hidden states that reach the head, by the head's own forward in fp64.

    For models that do nothing to their logits but scale them.
    """
    caught = []
    module = model.get_output_embeddings()
    handle = module.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=attention)
    handle.remove()
    (hidden,) = caught
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        logits = copy.deepcopy(module).double()(hidden.double())
    logits = logits * (getattr(model.config, "logit_scale", None) or 1.0)
    logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return logp[completion[:, 1:].bool()]
