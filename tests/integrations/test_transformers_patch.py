"""patch_forward: the loss and the gradients of every family's own forward, without its logits."""

import copy
import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from prefopt_kernels.integrations.transformers import patch_forward
from support.causal_lm import CONFIGS, assert_same_gradients, batch, exact_logprobs, gradients, make
from support.numerics import assert_as_good_as_torch


def inputs_for(name: str, masked: bool) -> dict:
    ids, attention, completion = batch()
    labels = torch.where(completion.bool(), ids, -100) if masked else ids
    inputs = {"input_ids": ids, "attention_mask": attention, "labels": labels}
    if name == "multimodal gemma3":  # asks for it in training
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def loss_and_gradients(model: nn.Module, inputs: dict) -> tuple:
    """Includes the gradient of the hidden states at the head."""
    caught = []

    def keep(_module, args):
        args[0].retain_grad()
        caught.append(args[0])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep, prepend=True)
    outputs = model(**inputs)
    handle.remove()
    grads = gradients(model, outputs.loss)
    (hidden,) = caught
    return outputs, grads | {"hidden": hidden.grad}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_the_models_forward(name):
    model = make(name).train()
    assert len(CONFIGS) >= 12
    for masked in (True, False):
        inputs = inputs_for(name, masked)
        expected, expected_grads = loss_and_gradients(model, inputs)
        with patch_forward(model) as fused:
            outputs, grads = loss_and_gradients(model, inputs)
        assert fused.calls == 1 and outputs.logits is None and expected.logits is not None
        assert outputs.keys() == expected.keys() - {"logits"} and type(outputs) is type(expected)
        torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=0)
        assert model.get_output_embeddings().weight.requires_grad
        assert_same_gradients(grads, expected_grads)


def test_an_auxiliary_loss_is_added_as_the_model_adds_it():
    model = make("experts qwen3_moe").train()
    inputs = inputs_for("", masked=True)
    with patch_forward(model):
        outputs = model(**inputs)
        without = model(**inputs, output_router_logits=False)
    assert outputs.aux_loss > 0 and outputs.router_logits is not None
    torch.testing.assert_close(outputs.loss, without.loss + 0.5 * outputs.aux_loss)


def test_the_loss_is_normalised_as_in_transformers():
    model = make("llama").train()
    inputs = inputs_for("", masked=True)
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    calls = [
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 0, "labels": inputs["input_ids"]},
        {"shift_labels": shifted},
        {"labels": torch.full_like(inputs["labels"], -100)},  # nothing counts: 0 / 0
        {"labels": torch.full_like(inputs["labels"], -100), "num_items_in_batch": 5},
    ]
    expected = [model(**inputs | call).loss for call in calls]
    with patch_forward(model):
        ours = [model(**inputs | call).loss for call in calls]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0, equal_nan=True)
    assert expected[4].isnan() and expected[5] == 0


def test_calls_that_need_logits_are_unchanged():
    model = make("llama")
    inputs = inputs_for("", masked=True)
    forward, hooks = model.forward, len(model.lm_head._forward_pre_hooks)
    expected = model(**inputs)
    fused = patch_forward(model)
    assert torch.equal(model(**inputs).logits, expected.logits)  # evaluation
    model.train()
    assert model(inputs["input_ids"]).logits.shape == (3, 9, 97)  # no labels
    assert model(**inputs, return_dict=False)[0].shape == () and fused.calls == 1
    assert len(model(**inputs, return_dict=False, use_cache=False)) == 1
    positional = [inputs["input_ids"], None, None, None, None, inputs["labels"]]
    assert model(*positional).logits is None
    model.eval()
    generated = model.generate(inputs["input_ids"][:1], max_new_tokens=2, do_sample=False)
    fused.undo()
    fused.undo()
    assert torch.equal(generated, model.generate(inputs["input_ids"][:1], max_new_tokens=2, do_sample=False))
    assert model.forward == forward and len(model.lm_head._forward_pre_hooks) == hooks
    assert torch.equal(model(**inputs).loss, expected.loss)
    with patch_forward(model, eval_logits=False) as again:
        outputs = model(**inputs)
        assert outputs.logits is None and again.calls == 1
        torch.testing.assert_close(outputs.loss, expected.loss)


def test_the_head_gets_an_empty_slice():
    model = make("llama").train()
    shapes = []
    with patch_forward(model):
        handle = model.lm_head.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
        model(**inputs_for("", masked=True))
        handle.remove()
    assert [shape.numel() for shape in shapes] == [0]


def test_a_deep_copy_is_patched_independently():
    model = make("tied qwen3").train()
    inputs = inputs_for("", masked=True)
    with patch_forward(model) as fused:
        copied = copy.deepcopy(model)
        with torch.no_grad():
            copied.model.embed_tokens.weight.mul_(1.5)
        outputs = copied(**inputs)
        outputs.loss.backward()
        assert outputs.logits is None and fused.calls == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = make("tied qwen3")
    plain.load_state_dict(copied.state_dict())
    torch.testing.assert_close(outputs.loss, plain(**inputs).loss)
    assert copied(**inputs).logits is None  # the original's undo is not the copy's


@pytest.mark.parametrize("name", ["softcap gemma2", "an adapter on the head"])
def test_torch_compile_without_graph_breaks(name):
    if name in CONFIGS:
        model = make(name).train()
    else:
        config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        model = get_peft_model(make("llama"), config).train()
    inputs = inputs_for("", masked=True)
    expected = model(**inputs).loss
    expected_grads = gradients(model, expected)
    with patch_forward(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        outputs = compiled(**inputs)
        grads = gradients(model, outputs.loss)
        assert outputs.logits is None
        torch.testing.assert_close(outputs.loss, expected, rtol=1e-5, atol=0)
        assert_same_gradients(grads, expected_grads)
        with pytest.raises(ValueError, match="is patched already"):
            patch_forward(model)
    torch.compiler.reset()
    with pytest.raises(ValueError, match="is compiled; call patch_forward before"):
        patch_forward(compiled)


KEYS = {"loss", "eval_loss", "grad_norm"}


class _Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict:
        ids = torch.arange(3, 11) + 5 * i
        return {"input_ids": ids, "labels": torch.where(ids % 3 > 0, ids, -100), "extra": i}


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_works_with_the_patch(bf16, tmp_path):
    """Accumulation counts tokens through num_items_in_batch; with bf16 accelerate wraps the patched forward."""

    def run(model: nn.Module) -> list[dict]:
        args = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=bf16,
            max_steps=2,
            logging_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            optim="sgd",  # Adam would make large of differences in gradients near 0
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, args, train_dataset=_Rows(), eval_dataset=_Rows())
        trainer.train()
        trainer.evaluate()
        return trainer.state.log_history

    expected = run(make("llama"))
    model = make("llama")
    with patch_forward(model, eval_logits=False) as fused:
        assert "labels" in inspect.signature(model.forward).parameters
        ours = run(model)
    assert fused.calls == 2 * 2 + 1
    # A logit of 32 rounded to bf16 is off by up to 2**-9 * 32, on losses of about 4; ours are not rounded.
    tolerance = 2**-6 if bf16 else 1e-5
    compared = [key for entry in expected for key in entry if key in KEYS]
    assert sorted(compared) == ["eval_loss", "grad_norm", "grad_norm", "loss", "loss"]
    for mine, entry in zip(ours, expected, strict=True):
        for key in KEYS & entry.keys():
            assert mine[key] == pytest.approx(entry[key], rel=tolerance), key
    # and the model can be patched again, whatever was left around its forward
    with patch_forward(model) as again:
        assert model.train()(**inputs_for("", masked=True)).logits is None
    assert again.calls == 1 and model(**inputs_for("", masked=True)).logits is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_fp32_whatever_the_model(dtype):
    model = make("scale cohere", dtype).train()
    inputs = inputs_for("", masked=True)
    exact = -exact_logprobs(model, *batch()).mean()
    plain = model(**inputs).loss
    with patch_forward(model):
        ours = model(**inputs).loss
    assert_as_good_as_torch("loss", ours, plain, exact)


def test_unsupported_models_are_refused_with_the_reason(monkeypatch):
    model = make("llama")
    for bad in (0, "no", None):
        with pytest.raises(TypeError, match="eval_logits is"):
            patch_forward(model, eval_logits=bad)
    with pytest.raises(ValueError, match="has no output embedding"):
        patch_forward(nn.Linear(2, 2))

    def refused(match: str) -> None:
        before = dict(model.__dict__)
        with pytest.raises(ValueError, match=match):
            patch_forward(model)
        assert model.__dict__.keys() == before.keys() and not model.lm_head._forward_pre_hooks

    model.loss_function = lambda logits, labels, **kwargs: logits.mean()
    refused("the loss_function of LlamaForCausalLM is .*lambda.*expected ForCausalLMLoss")
    del model._loss_function

    forward = type(model).forward

    def scaled(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = 1.25 * outputs.logits
        return outputs

    def squared(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.1 * outputs.logits.square().sum()
        return outputs

    def own(self, *args, labels=None, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.loss = None if labels is None else outputs.logits.mean()
        return outputs

    def masked(self, *args, labels=None, **kwargs):
        labels = None if labels is None else labels.clone().index_fill_(1, torch.tensor([1]), -100)
        return forward(self, *args, labels=labels, **kwargs)

    for change, match in (
        (scaled, "processes its logits in a way that is not supported yet"),
        (squared, "adds a term that needs logits"),
        (own, "does not pass its logits and labels unchanged"),
        (masked, "does not pass its logits and labels unchanged"),
    ):
        monkeypatch.setattr(type(model), "forward", change)
        refused(match)
    monkeypatch.undo()

    with patch_forward(model):
        inputs = inputs_for("", masked=True)
        model.train()
        with pytest.raises(ValueError, match="do not pass logits_to_keep"):
            model(**inputs, logits_to_keep=2)
        assert model(**inputs).logits is None  # and nothing is left from the failure
        model.lm_head = nn.Linear(32, 97, bias=False)
        with pytest.raises(RuntimeError, match="its lm_head has been replaced since"):
            model(**inputs)


def test_a_forward_of_another_fused_loss_raises(monkeypatch):
    """Liger's, for example, skips the head in training only, so that the probe in evaluation mode cannot detect it."""
    model = make("llama")
    forward = type(model).forward

    def fused(self, *args, labels=None, **kwargs):
        if self.training and labels is not None:
            outputs = self.model(*args, **kwargs)
            return type("Output", (dict,), {})(loss=outputs.last_hidden_state.sum())
        return forward(self, *args, labels=labels, **kwargs)

    monkeypatch.setattr(type(model), "forward", fused)
    with patch_forward(model), pytest.raises(RuntimeError, match="another library's fused loss"):
        model.train()(**inputs_for("", masked=True))
