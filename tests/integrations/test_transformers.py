"""Heads of causal LMs: found, checked against the model's own logits, and scored without building them."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    Qwen3Config,
)

from prefopt_kernels.integrations.transformers import (
    check_lm_head,
    completion_logprobs,
    lm_head_of,
    pack_completions,
)

EPS = torch.finfo(torch.float32).eps
SIZES = {
    "vocab_size": 97,
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
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied qwen3": lambda: Qwen3Config(head_dim=16, tie_word_embeddings=True, **SIZES),
    "softcap": lambda: Gemma2Config(head_dim=16, final_logit_softcapping=3.0, **SIZES),
    "scale": lambda: CohereConfig(logit_scale=0.3, **SIZES),
    "divided": lambda: GraniteConfig(logits_scaling=4.0, **SIZES),
    "bias": lambda: PhiConfig(**SIZES),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    if model.lm_head.bias is not None:  # zero at the start, where nobody would miss it
        nn.init.normal_(model.lm_head.bias)
    return model.eval()


def batch(vocab: int = 97):
    """Three padded sequences with completions of 4, 1 and 3 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (3, 9), generator=generator)
    attention = torch.ones_like(ids)
    completion = torch.zeros_like(ids)
    for row, (start, end) in enumerate(((5, 9), (6, 7), (2, 5))):
        completion[row, start:end] = 1
        ids[row, end:] = 0
        attention[row, end:] = 0
    return ids, attention, completion


def plain(model: nn.Module, ids, attention, completion) -> torch.Tensor:
    """Log-probabilities of the completion's tokens from the model's own logits."""
    logp = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float().log_softmax(-1)
    logp = logp.gather(2, ids[:, 1:, None])[..., 0]
    return logp[completion[:, 1:].bool()]


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_gradients_are_those_of_the_models_own_logits(name):
    model = make(name)
    head = lm_head_of(model)
    check_lm_head(model, head)
    ids, attention, completion = batch()
    packing = pack_completions(ids, completion)
    ours = completion_logprobs(model, ids, attention, packing, head=head, outputs=("entropy",))
    expected = plain(model, ids, attention, completion)
    assert ours.logp.shape == ours.entropy.shape == (8,)
    assert packing.cu_seqlens.tolist() == [0, 4, 5, 8]
    # logits up to some tens, sums of 32 products in fp32
    torch.testing.assert_close(ours.logp, expected, rtol=32 * EPS, atol=32 * EPS * 10)

    for value in (ours.logp, expected):
        model.zero_grad()
        value.square().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if value is ours.logp:
            mine = grads
    assert set(mine) == set(grads)
    for key, grad in grads.items():
        error = (mine[key] - grad).norm() / grad.norm().clamp(min=EPS)
        assert error < 100 * EPS, key  # a hundred roundings: layers, tokens, the softmax


def test_the_head_is_left_with_nothing_to_do():
    model = make("llama")
    ids, attention, completion = batch()
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    completion_logprobs(model, ids, attention, pack_completions(ids, completion))
    handle.remove()
    assert [shape.numel() for shape in shapes] == [0]
    # and afterwards the model is as before
    assert model(input_ids=ids).logits.shape == (3, 9, 97)
    assert not model.lm_head._forward_pre_hooks


def test_the_formula_is_read_from_the_configuration():
    assert lm_head_of(make("softcap")).softcap == 3.0
    assert lm_head_of(make("scale")).logit_scale == pytest.approx(0.3)
    assert lm_head_of(make("divided")).logit_scale == 0.25
    tied = make("tied qwen3")
    assert lm_head_of(tied).weight is tied.model.embed_tokens.weight
    assert lm_head_of(make("bias")).bias is not None
    assert lm_head_of(make("llama")).bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["scale", "softcap", "shift"])
def test_unknown_processing_of_the_logits_is_refused(what, dtype):
    """The same configuration, but the model does something of its own after its head."""
    model = make("llama", dtype)
    check_lm_head(model, lm_head_of(model))
    change = {
        "scale": lambda z: z * 1.25,
        "softcap": lambda z: 30.0 * torch.tanh(z / 30.0),
        "shift": lambda z: z + 1.5 * z.abs().amax(),
    }[what]
    forward = model.forward

    def changed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = changed
    with pytest.raises(ValueError, match="processes its logits in a way that is not supported yet"):
        check_lm_head(model, lm_head_of(model))


def test_an_adapter_in_front_of_the_head_counts_and_one_on_it_is_refused():
    ids, attention, completion = batch()
    packing = pack_completions(ids, completion)
    base = make("llama")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    head = lm_head_of(model)
    check_lm_head(model, head)
    on = completion_logprobs(model, ids, attention, packing, head=head).logp
    with model.disable_adapter():
        off = completion_logprobs(model, ids, attention, packing, head=head).logp
    untouched = completion_logprobs(base, ids, attention, packing).logp
    torch.testing.assert_close(on, plain(model, ids, attention, completion), rtol=1e-5, atol=1e-5)
    assert torch.equal(off, untouched) and (on - off).abs().max() > 0.01

    for refused, name in (
        (LoraConfig(target_modules=["q_proj", "lm_head"]), "llama"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]), "tied qwen3"),
    ):
        with pytest.raises(ValueError, match=r"an adapter \(\w+\) sits on .* lm_head"):
            lm_head_of(get_peft_model(make(name), refused))


def test_a_head_that_peft_trains_as_a_whole_is_scored_with_the_copy_in_use():
    ids, attention, completion = batch()
    packing = pack_completions(ids, completion)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(make("llama"), config).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.3)
        model.base_model.model.lm_head.modules_to_save["default"].weight[::2] *= 1.5
    head = lm_head_of(model)
    check_lm_head(model, head)
    for context in (None, model.disable_adapter()):
        if context is None:
            ours = completion_logprobs(model, ids, attention, packing, head=head).logp
            expected = plain(model, ids, attention, completion)
        else:
            with context:
                off = completion_logprobs(model, ids, attention, packing, head=head).logp
                expected_off = plain(model, ids, attention, completion)
    torch.testing.assert_close(ours, expected, rtol=32 * EPS, atol=32 * EPS * 10)
    torch.testing.assert_close(off, expected_off, rtol=32 * EPS, atol=32 * EPS * 10)
    assert (ours - off).abs().max() > 0.01


def test_prompt_tuning_is_refused_because_it_moves_the_tokens():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(make("llama"), config).eval()
    ids, attention, completion = batch()
    with pytest.raises(ValueError, match="prompt tuning is not supported"):
        check_lm_head(model, lm_head_of(model))
    with pytest.raises(ValueError, match=r"\(3, 12, 32\) .* for input_ids of shape \(3, 9\)"):
        completion_logprobs(model, ids, attention, pack_completions(ids, completion))


def test_models_without_a_usable_head_are_refused():
    with pytest.raises(ValueError, match="Linear has no output embedding"):
        lm_head_of(nn.Linear(2, 2))
    model = make("llama")
    model.lm_head = nn.Linear(32, 97, bias=False)
    model.lm_head.weight = nn.Parameter(
        torch.zeros(97 * 16, 1, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match="leave the head out of quantisation"):
        lm_head_of(model)
    with pytest.raises(ValueError, match=r"input_ids has shape \(3,\)"):
        pack_completions(torch.zeros(3), torch.zeros(3))
