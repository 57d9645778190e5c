"""Heads with PEFT on them, and models in 4 bits: equal to PEFT's own forward, or refused with the reason."""

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn

from prefopt_kernels.integrations.transformers import (
    check_lm_head,
    completion_logprobs,
    lm_head_of,
    pack_completions,
    patch_forward,
)
from support.causal_lm import (
    EPS,
    assert_same_gradients,
    batch,
    exact_logprobs,
    gradients,
    make,
    plain_logprobs,
)
from support.numerics import assert_as_good_as_torch

ON_HEAD = {"target_modules": ["q_proj", "lm_head"], "r": 4, "lora_alpha": 6}
TASK = {"task_type": "CAUSAL_LM"}
CASES = {  # family, configuration
    "before the head": ("llama", lambda: LoraConfig(target_modules=["q_proj"], **TASK)),
    "on the head": ("llama", lambda: LoraConfig(**ON_HEAD, **TASK)),
    "on a tied head": ("tied qwen3", lambda: LoraConfig(**ON_HEAD, **TASK)),
    "on a capped head": ("softcap gemma2", lambda: LoraConfig(use_rslora=True, **ON_HEAD, **TASK)),
    "on a scaled head": ("scale cohere", lambda: LoraConfig(**ON_HEAD, **TASK)),
    "with a bias": (
        "bias phi",
        lambda: LoraConfig(lora_bias=True, **ON_HEAD, **TASK),
    ),
    "whole head": (
        "llama",
        lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **TASK),
    ),
    "tokens": (
        "tied qwen3",
        lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[7, 3, 90], **TASK),
    ),
    "tokens and an adapter": (
        "tied qwen3",
        lambda: LoraConfig(trainable_token_indices=[7, 3, 90], **ON_HEAD, **TASK),
    ),
    "prompt tuning": ("llama", lambda: PromptTuningConfig(num_virtual_tokens=3, **TASK)),
    "p-tuning": (
        "llama",
        lambda: PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, **TASK),
    ),
    "prefix tuning": ("llama", lambda: PrefixTuningConfig(num_virtual_tokens=3, **TASK)),
}
cases = pytest.mark.parametrize("case", CASES)


def moved(model: nn.Module, seed: int = 5) -> nn.Module:
    """Add noise to the trainable parameters, because a new adapter adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    name, config = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return moved(get_peft_model(make(name, dtype), config())).eval()


def scores(model: nn.Module, head=None) -> torch.Tensor:
    ids, attention, completion = batch()
    packing = pack_completions(ids, completion)
    return completion_logprobs(model, ids, attention, packing, head=head).logp


def assert_same_scores(ours: torch.Tensor, expected: torch.Tensor) -> None:
    # logits up to some tens, sums of 32 products in fp32
    torch.testing.assert_close(ours, expected, rtol=32 * EPS, atol=32 * EPS * 10)


@cases
def test_scores_and_gradients_equal_pefts_forward(case):
    model = adapted(case)
    head = lm_head_of(model)
    check_lm_head(model, head)
    ours, expected = scores(model, head), plain_logprobs(model, *batch())
    assert_same_scores(ours, expected)
    weights = torch.linspace(-1.0, 1.0, len(ours))
    grads = gradients(model, (weights * ours).sum())
    assert_same_gradients(grads, gradients(model, (weights * expected).sum()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == trained and all(grad.abs().sum() > 0 for grad in grads.values())
    with torch.no_grad(), model.disable_adapter():
        off, expected_off = scores(model, head), plain_logprobs(model, *batch())
    assert_same_scores(off, expected_off)
    assert_same_scores(off, scores(make(CASES[case][0])))
    assert (ours - off).abs().max() > 0.01


@cases
def test_a_patched_model_has_pefts_loss_and_gradients(case):
    model = adapted(case).train()
    ids, attention, completion = batch()
    inputs = {"input_ids": ids, "attention_mask": attention}
    inputs["labels"] = torch.where(completion.bool(), ids, -100)
    expected = model(**inputs).loss
    expected_grads = gradients(model, expected)
    with patch_forward(model) as fused:
        outputs = model(**inputs)
        grads = gradients(model, outputs.loss)
        with model.disable_adapter():
            off = model(**inputs).loss
    assert outputs.logits is None and fused.calls == 2
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(grads, expected_grads)
    torch.testing.assert_close(off, make(CASES[case][0])(**inputs).loss, rtol=1e-5, atol=0)
    assert model(**inputs).logits is not None


def test_operands_of_adapters():
    head = lm_head_of(adapted("on the head"))
    A, B, scale = head.lora
    assert A.shape == (4, 32) and B.shape == (97, 4) and scale == 1.5
    assert A.requires_grad and B.requires_grad and not head.weight.requires_grad
    model = adapted("tokens")
    A, E, scale = lm_head_of(model).lora
    assert scale == 1.0 and not E.requires_grad and E.sum(0).tolist() == [1.0] * 3
    assert E.argmax(0).tolist() == [7, 3, 90]  # in the order in which they were named
    assert lm_head_of(model).weight is model.get_input_embeddings().token_adapter.base_layer.weight
    assert lm_head_of(adapted("prompt tuning")).virtual_tokens == 3
    assert lm_head_of(adapted("prefix tuning")).virtual_tokens == 3


def test_several_active_adapters_add_up():
    model = adapted("on the head")
    other = {"target_modules": ["lm_head"], "r": 2, "lora_alpha": 8}
    model.add_adapter("other", LoraConfig(**other, **TASK))
    head = lm_head_of(model)
    seen = []
    for names in ("other", "default", ["default", "other"]):
        model.base_model.set_adapter(names)
        moved(model, seed=len(names))
        ours, expected = scores(model, head), plain_logprobs(model, *batch())
        assert_same_scores(ours, expected)
        assert_same_gradients(gradients(model, ours.sum()), gradients(model, expected.sum()))
        seen.append(ours.detach())
    A, B, scale = head.lora
    assert A.shape == (6, 32) and B.shape == (97, 6) and scale == 1.0
    assert (seen[0] - seen[1]).abs().max() > 0.01 and (seen[1] - seen[2]).abs().max() > 0.01


@pytest.mark.parametrize("case", ["on the head", "tokens"])
def test_a_merged_adapter_is_part_of_the_weight(case):
    model = adapted(case)
    head = lm_head_of(model)
    before = scores(model, head)
    model.merge_adapter()
    assert head.lora is None
    assert_same_scores(scores(model, head), before)
    with model.disable_adapter():  # PEFT takes it out again
        assert_same_scores(scores(model, head), scores(make(CASES[case][0])))
    merged = model.merge_and_unload()
    assert_same_scores(scores(merged), before)


def test_modules_to_save_uses_the_active_copy():
    model = adapted("whole head")
    head = lm_head_of(model)
    assert head.weight is head.module.modules_to_save["default"].weight
    with model.disable_adapter():
        assert head.weight is head.module.original_module.weight
    model.add_adapter("no head", LoraConfig(target_modules=["q_proj"], **TASK))
    model.set_adapter("no head")
    assert_same_scores(scores(model, head), plain_logprobs(model, *batch()))


@pytest.mark.parametrize("case", ["on the head", "with a bias", "tokens"])
def test_a_bf16_model_keeps_its_adapter_in_fp32(case):
    model = adapted(case, torch.bfloat16)
    check_lm_head(model, lm_head_of(model))
    ours, peft = scores(model), plain_logprobs(model, *batch())
    exact = exact_logprobs(model, *batch())
    assert_as_good_as_torch("logp", ours, peft, exact)
    if case != "with a bias":  # linear_logprob takes a bias in the model's dtype
        assert_same_scores(ours.double(), exact)
    gradients(model, ours.sum())


def test_active_dropout_on_the_adapter_is_refused():
    model = get_peft_model(make("llama"), LoraConfig(lora_dropout=0.1, **ON_HEAD, **TASK))
    head = lm_head_of(model.eval())
    assert_same_scores(scores(model, head), plain_logprobs(model, *batch()))
    model.train()
    with pytest.raises(ValueError, match=r"'default' on the lm_head has dropout 0.1"):
        lm_head_of(model)
    with pytest.raises(ValueError, match="set lora_dropout=0"):
        scores(model, head)
    head.module.lora_dropout["default"].p = 0.0
    scores(model, head)


def test_adapters_other_than_plain_lora_are_refused():
    modules = {"target_modules": ["lm_head"], **TASK}
    for config, match in (
        (LoraConfig(use_dora=True, **modules), "'default' on the lm_head is a DoraLinearVariant"),
        (LoHaConfig(**modules), r"adapter of type peft\.tuners\.loha\..* only plain LoRA"),
        (IA3Config(feedforward_modules=[], **modules), r"adapter of type peft\.tuners\.ia3\."),
    ):
        model = get_peft_model(make("llama"), config)
        with pytest.raises(ValueError, match=match):
            lm_head_of(model)
        with pytest.raises(ValueError, match=match):
            patch_forward(model)


def test_an_adapter_added_after_the_patch_raises():
    base = make("llama").train()
    ids, attention, _ = batch()
    with patch_forward(base):
        model = get_peft_model(base, LoraConfig(**ON_HEAD, **TASK))
        with pytest.raises(RuntimeError, match="call patch_forward last"):
            model(input_ids=ids, attention_mask=attention, labels=ids)


def test_hidden_states_without_tokens_are_refused():
    model = adapted("prompt tuning")
    head = lm_head_of(model.base_model)  # of the model inside, which knows nothing of the prompt
    with pytest.raises(ValueError, match=r"\(3, 12, 32\) .* for input_ids of shape \(3, 9\)"):
        scores(model, head)
    model = get_peft_model(
        make("llama"),
        PromptTuningConfig(num_virtual_tokens=3, **TASK),
    )
    model.peft_config["default"].peft_type = "CPT"
    with pytest.raises(ValueError, match="PEFT's CPT weights the loss with logits"):
        patch_forward(model)


class Linear4bit(nn.Module):
    """A layer with the name and packed weight of bitsandbytes'; exact for weights on its grid."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = layer.weight.detach().abs().amax() / 7
        codes = (layer.weight.detach() / self.scale).round().clamp(-8, 7) + 8
        codes = codes.to(torch.uint8).flatten()
        self.weight = nn.Parameter((codes[::2] << 4 | codes[1::2])[:, None], requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.weight.flatten()
        codes = torch.stack([packed >> 4, packed & 15], 1).float() - 8
        weight = (codes * self.scale).view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def in_4_bits(model: nn.Module, head: bool) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (head or "lm_head" not in name):
            model.set_submodule(name, Linear4bit(module))
    return model.requires_grad_(False)


def test_a_4_bit_model_with_a_full_precision_head():
    base = in_4_bits(make("llama"), head=False)
    assert sum(type(module).__name__ == "Linear4bit" for module in base.modules()) == 7
    model = moved(get_peft_model(base, LoraConfig(target_modules=["lm_head"], **TASK)))
    ours, expected = scores(model), plain_logprobs(model, *batch())
    assert_same_scores(ours, expected)
    assert_same_gradients(gradients(model, ours.sum()), gradients(model, expected.sum()))
    with torch.autocast("cpu", torch.bfloat16):  # as QLoRA runs: operands are rounded alike
        ours, expected = scores(model), plain_logprobs(model, *batch())
        exact = exact_logprobs(model, *batch())
    assert_as_good_as_torch("logp", ours, expected, exact)

    quantised = in_4_bits(make("llama"), head=True)
    for find in (lm_head_of, patch_forward):
        with pytest.raises(ValueError, match=r"quantised \(Linear4bit\).*llm_int8_skip_modules"):
            find(quantised)
