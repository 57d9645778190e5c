"""Heads of causal LMs: found, checked against the model's own logits, and scored without building them."""

import pytest
import torch
from torch import nn

from prefopt_kernels.integrations.transformers import (
    check_lm_head,
    completion_logprobs,
    lm_head_of,
    pack_completions,
)
from support.causal_lm import (
    CONFIGS,
    EPS,
    assert_same_gradients,
    batch,
    gradients,
    make,
    plain_logprobs,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_gradients_equal_those_from_logits(name):
    model = make(name)
    head = lm_head_of(model)
    check_lm_head(model, head)
    ids, attention, completion = batch()
    packing = pack_completions(ids, completion)
    ours = completion_logprobs(model, ids, attention, packing, head=head, outputs=("entropy",))
    expected = plain_logprobs(model, ids, attention, completion)
    assert ours.logp.shape == ours.entropy.shape == (8,)
    assert packing.cu_seqlens.tolist() == [0, 4, 5, 8]
    # logits up to some tens, sums of 32 products in fp32
    torch.testing.assert_close(ours.logp, expected, rtol=32 * EPS, atol=32 * EPS * 10)

    assert_same_gradients(gradients(model, ours.logp.square().sum()), gradients(model, expected.square().sum()))


def test_the_head_gets_an_empty_slice():
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
    assert lm_head_of(make("softcap gemma2")).softcap == 3.0
    assert lm_head_of(make("scale cohere")).logit_scale == pytest.approx(0.3)
    assert lm_head_of(make("divided granite")).logit_scale == 0.25
    tied = make("tied qwen3")
    assert lm_head_of(tied).weight is tied.model.embed_tokens.weight
    assert lm_head_of(make("bias phi")).bias is not None
    assert lm_head_of(make("multiplier falcon_h1")).logit_scale == pytest.approx(0.4)
    assert lm_head_of(make("multimodal gemma3")).softcap is None
    plain = lm_head_of(make("llama"))
    assert plain.bias is None and plain.lora is None and plain.virtual_tokens == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["scale", "softcap", "shift"])
def test_unknown_processing_of_logits_is_refused(what, dtype):
    """The model changes its logits in a way that its configuration does not show."""
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


def test_the_check_in_training_mode_draws_no_dropout():
    model = make("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, nn.Dropout(0.5))
    state = torch.get_rng_state()
    check_lm_head(model, lm_head_of(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_attends_to_later_tokens_is_refused(dtype):
    model = make("llama", dtype)
    embed = model.model.embed_tokens
    handle = embed.register_forward_hook(lambda _module, _args, out: out + 0.5 * out.flip(1))
    with pytest.raises(ValueError, match="LlamaForCausalLM is not causal: the logits of a token"):
        check_lm_head(model, lm_head_of(model))
    handle.remove()
    check_lm_head(model, lm_head_of(model))


def test_models_without_a_supported_head_are_refused():
    with pytest.raises(ValueError, match="Linear has no output embedding"):
        lm_head_of(nn.Linear(2, 2))
    model = make("llama")
    model.lm_head = nn.Linear(32, 97, bias=False)
    model.lm_head.weight = nn.Parameter(torch.zeros(97 * 16, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="exclude the head from quantisation"):
        lm_head_of(model)
    with pytest.raises(ValueError, match=r"input_ids has shape \(3,\)"):
        pack_completions(torch.zeros(3), torch.zeros(3))


def test_a_head_partitioned_by_zero_3():
    """ZeRO-3 replaces the parameter by an empty one with ``ds_shape``, and gathers it in the forward pass."""
    model = make("llama")
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match=r"has a weight that is torch.float32 \(0,\)"):
        lm_head_of(model)
    model.lm_head.weight.ds_shape = weight.shape
    head = lm_head_of(model)
    partitioned = model.lm_head.weight

    def gather(_module, _args) -> None:
        model.lm_head.weight = weight

    def partition(_module, _args, _out) -> None:
        model.lm_head.weight = partitioned

    handles = [
        model.lm_head.register_forward_pre_hook(gather),
        model.lm_head.register_forward_hook(partition),
    ]
    check_lm_head(model, head)
    for handle in handles:
        handle.remove()
    assert head.weight is partitioned
