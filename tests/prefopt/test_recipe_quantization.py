"""A base in 4 bits: what is refused before anything is loaded, what is quantised, and that its gradient stays whole."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

import prefopt.models
from prefopt.cli import main
from prefopt.demo.tiny.families import family_of, save_tiny
from prefopt.errors import UserError
from prefopt.recipe import load_recipe, make_recipe
from prefopt.recipe.models import load_model, quantize_for
from prefopt.recipe.run import preference_config
from prefopt.train.prepare import keep_gradients_of_four_bits
from support.tiny_models import make_model, make_tokenizer

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes, the extra [quant], is not installed: no 4-bit weights"
)
CONTENT = {
    "model": {"path": "m", "quantization": "nf4"},
    "data": {"path": "d.jsonl"},
    "lora": {},
    "training": {"output_dir": "run", "use_cpu": True},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(family_of("Qwen/Qwen3-0.6B"), ["what", "is", "that"], folder, seed=0)
    return str(folder)


def four_bits(path):
    return load_model(make_recipe(CONTENT, {"model.path": path, "model.dtype": "float32"}))


def test_four_bits_without_an_adapter_are_refused_with_both_ways_out():
    with pytest.raises(UserError, match="model.quantization is nf4 and lora is null; .* expected"):
        preference_config(make_recipe(CONTENT, {"lora": None}))


@pytest.mark.parametrize("overrides", [{}, {"model.quantization": None, "training.optim": "adamw_bnb_8bit"}])
def test_without_bitsandbytes_it_says_how_to_get_it(overrides, monkeypatch):
    find = prefopt.models.find_spec
    monkeypatch.setattr(prefopt.models, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError, match=r"needs the package bitsandbytes: pip install bitsandbytes$"):
        preference_config(make_recipe(CONTENT, overrides))


@pytest.mark.parametrize(
    ("overrides", "compute"),
    [
        ({}, "float32"),
        ({"model.dtype": "bfloat16"}, "bfloat16"),
        ({"training.bf16": True}, "bfloat16"),
        ({"training.fp16": True, "model.dtype": "bfloat16"}, "float16"),
        ({"model.dtype": "auto"}, "float32"),
        ({"model.quantization": None}, None),
    ],
)
def test_matrices_are_multiplied_in_the_dtype_of_autocast(overrides, compute):
    assert quantize_for(make_recipe(CONTENT, overrides)) == compute


def test_linears_are_quantised_and_head_and_embedding_are_not(tiny):
    model = four_bits(tiny)
    linears = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linears) == 2 * 7
    for linear in linears:
        state = linear.weight.quant_state
        assert state.quant_type == "nf4" and state.nested and linear.weight.dtype == torch.uint8
        assert linear.compute_dtype == torch.float32
    assert not isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32


def test_rows_that_are_no_whole_blocks_are_refused_on_a_cpu_before_loading(tmp_path):
    make_model("qwen3", len(make_tokenizer(tmp_path)), tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the shapes alone decide
    with pytest.raises(
        UserError,
        match=r"model.path: rows of model.layers.0.*q_proj have 48 weights, not a multiple",
    ):
        four_bits(str(tmp_path))


def gradients(model):
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (2, 12))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_adapter(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_an_evaluation_leaves_the_gradient_as_it_was(tiny):
    """On a CPU with AVX512-BF16 it fails without the call: bitsandbytes packs the weights in the evaluation."""
    expected = gradients(with_adapter(four_bits(tiny)))
    model = with_adapter(four_bits(tiny))
    keep_gradients_of_four_bits(model)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(8).view(1, -1))
    found = gradients(model)
    assert found.keys() == expected.keys() and any(one.abs().max() > 0 for one in found.values())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_a_model_that_was_packed_before_is_refused(tiny):
    model = four_bits(tiny)
    linear = model.model.layers[0].mlp.up_proj
    linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="packed the 4-bit weights of model.layers.0.mlp.up_proj"):
        keep_gradients_of_four_bits(model)


def test_a_plain_model_is_left_alone():
    keep_gradients_of_four_bits(torch.nn.Linear(2, 2))


def test_the_published_precision_of_s3_is_three_overrides():
    """fp16 for a GPU without bfloat16, as the head of the recipe says."""
    recipe = load_recipe(
        "s3-r1-distill-kto-4bit",
        {"training.bf16": False, "training.fp16": True, "model.dtype": "float16"},
    )
    assert quantize_for(recipe) == "float16" and recipe.training.fp16


STOPPED = """
import sys
from pathlib import Path
import torch
from prefopt.recipe.memory import measured

try:
    with measured(Path(sys.argv[1]), torch.device("cpu"), writes=True):
        kept = torch.ones(64, 1024, 1024 // 4)  # 64 MiB of fp32, touched
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
"""


def test_memory_is_kept_of_a_run_that_is_stopped(tmp_path):
    # in a process of its own: one that ran other tests has free pages to use again
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
    )
    found = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))
    # what was there before may be given back meanwhile, so not quite all of it must be seen
    assert found["peak_bytes"] - found["before_bytes"] > 48 * 2**20
    assert "memory at its peak: " in done.stdout


def test_an_unknown_quantization_is_named_with_the_nearest(capsys, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(CONTENT), encoding="utf-8")
    assert main(["train", str(path), "--model.quantization", "nf5"]) == 2
    assert "model.quantization is 'nf5'; expected null or one of nf4; did you mean nf4?" in (capsys.readouterr().err)
