"""torch_compile=True: the numbers of the run without it, in training, evaluation, saved weights and a resumed run."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from support.trainer import data_for, make_trainer, make_world, train

OPTIONS = {"per_device_train_batch_size": 4, "max_steps": 2}
CONTRACT = 1e-5  # relative, on the loss in fp32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Of one layer: compiling takes longer than all steps."""
    whole = make_world("qwen3", tmp_path_factory.mktemp("qwen3"))
    for model in (whole.model, whole.ref):
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        model.config.layer_types = model.config.layer_types[:1]
    return whole


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(world, folder, *, adapter: bool = False, resume: str | None = None, **options):
    """A trained trainer, and its steps' losses and gradient norms."""
    rows = data_for(options["method"], 12)
    trainer = make_trainer(
        world,
        folder,
        data=rows,
        ref=not adapter,
        peft_config=LoraConfig(target_modules=["q_proj"], init_lora_weights=False) if adapter else None,
        **(OPTIONS | options),
    )
    logs = train(trainer, resume_from_checkpoint=resume)
    return trainer, [entry[name] for entry in logs for name in ("loss", "grad_norm")]


def compiled_layers(model: nn.Module) -> int:
    return sum(module._compiled_call_impl is not None for module in model.modules())


@pytest.mark.parametrize(("method", "adapter"), [("kto", True), ("dpo", False)])
def test_a_compiled_run_has_the_numbers_of_an_eager_one(world, tmp_path, method, adapter):
    options = {"method": method, "adapter": adapter}
    plain, expected = run(world, tmp_path / "eager", **options)
    trainer, found = run(world, tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager", **options)
    assert found == pytest.approx(expected, rel=CONTRACT)
    if adapter:  # a graph more for the policy and one for the reference
        rows = data_for(method, 12)
        losses = [each.evaluate(rows)["eval_loss"] for each in (plain, trainer)]
        assert losses[1] == pytest.approx(losses[0], rel=CONTRACT)
    assert compiled_layers(trainer.model) == 1
    assert adapter or compiled_layers(trainer.reference.model) == 1
    assert not any("_orig_mod" in name for name in trainer.model.state_dict())
    trainer.save_model(str(tmp_path / "saved"))
    if adapter:
        loaded = PeftModel.from_pretrained(copy.deepcopy(world.model), tmp_path / "saved")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded.eval()(input_ids=ids).logits, logits)


@pytest.mark.parametrize(
    ("backend", "steps"), [("inductor", 1), pytest.param("inductor", 2, marks=pytest.mark.nightly), ("eager", 2)]
)
def test_every_backend_trains_and_goes_on_from_a_checkpoint(world, tmp_path, backend, steps):
    """One method with one pass a step and no probe of shared prompts, so that there is one graph to compile.

    The second step adds another, and only eager compiles a third to resume.
    """
    options = {"method": "cpo", "save_strategy": "steps", "save_steps": 1, "max_steps": steps, "share_prompts": "off"}
    compiled = options | {"torch_compile": True, "torch_compile_backend": backend}
    _, expected = run(world, tmp_path / "eager", **options)
    _, found = run(world, tmp_path / "compiled", **compiled)
    assert found == pytest.approx(expected, rel=CONTRACT)
    if backend == "eager":
        checkpoint = str(tmp_path / "compiled" / "checkpoint-1")
        _, resumed = run(world, tmp_path / "compiled", resume=checkpoint, **compiled)
        assert resumed == pytest.approx(expected, rel=CONTRACT)


def test_a_model_without_a_list_of_layers_is_refused(world, tmp_path):
    model = copy.deepcopy(world.model)
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="has no nn.ModuleList of layers to compile"):
        make_trainer(world, tmp_path, model=model, ref=False, torch_compile=True)
