"""A failed call does not change the patched model."""

import pytest
import torch
from peft import AdaptionPromptConfig, LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from prefopt_kernels.integrations.transformers import (
    completion_logprobs,
    pack_completions,
    patch_forward,
)
from support.causal_lm import assert_same_gradients, batch, gradients, make, plain_logprobs

ON_HEAD = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}


def inputs() -> dict:
    ids, attention, completion = batch()
    labels = torch.where(completion.bool(), ids, -100)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def two_adapters(**config) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(make("llama"), LoraConfig(**config))
        model.add_adapter("other", LoraConfig(**config))
    return model.eval()


def test_refused_adapter_names_leave_no_hooks():
    model = two_adapters(**ON_HEAD)
    expected, count = model(**inputs()).loss, hooks(model)
    names = ["default", "other", "__base__"]
    mixed = model(**inputs(), adapter_names=names).loss
    assert (mixed - expected).abs() > 0.01
    with patch_forward(model, eval_logits=False):
        with pytest.raises(ValueError, match="adapter_names.*is not supported"):
            model(**inputs(), adapter_names=names)
        after = model(**inputs())
        assert after.logits is None
        torch.testing.assert_close(after.loss, expected, rtol=1e-5, atol=0)
    assert hooks(model) == count
    assert torch.equal(model(**inputs()).loss, expected)
    assert torch.equal(model(**inputs(), adapter_names=names).loss, mixed)


def test_adapter_names_below_the_head():
    model = two_adapters(target_modules=["q_proj"], init_lora_weights=False)
    call = {"adapter_names": ["other", "__base__", "default"], **inputs()}
    expected = model(**call).loss
    assert (model(**inputs()).loss - expected).abs() > 1e-4
    with patch_forward(model, eval_logits=False):
        torch.testing.assert_close(model(**call).loss, expected, rtol=1e-5, atol=0)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", ["shape of labels", "label", "interrupt before", "interrupt in"])
def test_a_failed_call_leaves_model_and_patch_usable(failure):
    model = two_adapters(target_modules=["q_proj"], init_lora_weights=False)
    call = {"adapter_names": ["other", "__base__", "default"], **inputs()}
    own, count = model(**inputs()).loss, hooks(model)
    with patch_forward(model, eval_logits=False) as fused:
        patched_hooks, handle = hooks(model), None
        if failure == "shape of labels":
            call["labels"] = call["labels"][:, :4]
        elif failure == "label":
            call["labels"] = call["labels"].clone().masked_fill_(call["labels"] >= 0, 97)
        else:
            base = model.get_base_model()
            module = base.model.layers[0] if failure == "interrupt before" else base.lm_head
            handle = module.register_forward_hook(interrupt)
        with pytest.raises((ValueError, KeyboardInterrupt)):
            model(**call)
        if handle is not None:
            handle.remove()
        assert hooks(model) == patched_hooks
        outputs = model(**inputs())
        assert outputs.logits is None and fused.calls == 1
        torch.testing.assert_close(outputs.loss, own, rtol=1e-5, atol=0)
    assert hooks(model) == count and torch.equal(model(**inputs()).loss, own)


def test_pefts_mixed_model_is_patched_and_scored():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(make("llama"), LoraConfig(**ON_HEAD), mixed=True)
        model.add_adapter("loha", LoHaConfig(target_modules=["v_proj"], init_weights=False))
    model.set_adapter(["default", "loha"])
    model.train()
    expected = model(**inputs()).loss
    expected_grads = gradients(model, expected)
    with patch_forward(model) as fused:
        outputs = model(**inputs())
        grads = gradients(model, outputs.loss)
    assert fused.calls == 1 and outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(grads, expected_grads)
    assert {"lora", "hada"} <= {part[:4] for name in grads for part in name.split(".")}
    ids, attention, completion = batch()
    ours = completion_logprobs(model, ids, attention, pack_completions(ids, completion)).logp
    torch.testing.assert_close(ours, plain_logprobs(model, ids, attention, completion))


def test_an_adaption_prompt_is_refused_and_can_be_scored():
    """PEFT calls the forward it stored when wrapping the model, so the patch would have no effect."""
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = get_peft_model(make("llama"), config)
    base = model.get_base_model()
    before, count = set(base.__dict__), hooks(model)
    with pytest.raises(ValueError, match="bypasses the patched forward .*AdaptionPrompt"):
        patch_forward(model)
    assert set(base.__dict__) == before and hooks(model) == count
    ids, attention, completion = batch()
    ours = completion_logprobs(model, ids, attention, pack_completions(ids, completion)).logp
    torch.testing.assert_close(ours, plain_logprobs(model, ids, attention, completion))
