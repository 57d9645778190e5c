"""Export: adapters with their base's name, merged weights of the same function, folders whole or absent."""

import copy
import json
from importlib.util import find_spec

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import prefopt.export.run as export
from prefopt.cli import main
from prefopt.errors import UserError
from prefopt.export.merge import merged_model
from prefopt.export.run import export_run
from prefopt.models import refuse_partial_blocks
from prefopt.runs import find_run, load_tokenizer
from support.trained_runs import (
    EOS,
    assert_same_function,
    logits_of,
    make_base,
    make_run,
    make_split_tokenizer,
    read_json,
    some_ids,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("world"), "qwen3", "gpt-2", head_dim=16)


def exact_merge(run, name):
    """``W + alpha / r * B A`` of one layer in fp64, from the files."""
    base = load_file(run.base / "model.safetensors")
    adapter = load_file(run.folder / "adapter_model.safetensors")
    down = adapter[f"base_model.model.{name}.lora_A.weight"].double()  # (r, in)
    up = adapter[f"base_model.model.{name}.lora_B.weight"].double()  # (out, r)
    config = read_json(run.folder / "adapter_config.json")
    return base[f"{name}.weight"].double() + config["lora_alpha"] / config["r"] * up @ down


def test_merged_weights_are_the_sum_and_need_no_adapter(run, tmp_path):
    out = export_run(run.folder, "merged", out=tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    adapted = 0
    for name, module in merged.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        exact = exact_merge(run, name)
        # r = 4 products, their scale and the sum are rounded in fp32: less than 16 roundings of what is summed
        error = (module.weight.double() - exact).abs().max()
        assert error <= 16 * 2.0**-24 * exact.abs().max()
        adapted += 1
    assert adapted == 2 * 7
    assert_same_function(merged, run.model, some_ids(run.tokenizer))
    assert AutoTokenizer.from_pretrained(out).chat_template == run.tokenizer.chat_template
    assert (out / "chat_template.jinja").is_file() and (out / "model.safetensors").is_file()
    assert not list(out.glob("adapter*"))


def test_dtype_is_the_bases_unless_another_is_named_and_the_merge_is_made_in_fp32(tmp_path):
    run = make_run(tmp_path, "qwen2", "gpt-2", dtype=torch.bfloat16)
    stored = load_file(export_run(run.folder, "merged") / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    # one rounding to bf16, at most 2**-8 of the value, of a sum that fp32 got right to 16 of its own roundings
    exact = exact_merge(run, name)
    error = (stored[f"{name}.weight"].double() - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + 16 * 2.0**-24 * exact.abs().max()).all()
    wide = export_run(run.folder, "merged", dtype="float32", out=tmp_path / "wide")
    assert load_file(wide / "model.safetensors")[f"{name}.weight"].dtype == torch.float32
    assert read_json(wide / "export.json")["dtype"] == "float32"


def test_a_run_on_four_bits_is_merged_into_whole_weights_with_a_note(run, tmp_path):
    import shutil

    folder = shutil.copytree(run.folder, tmp_path / "run")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["model"]["quantization"] = "nf4"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    out = export_run(folder, "merged")
    (note,) = read_json(out / "export.json")["notes"]
    assert "trained on a base in nf4" in note
    whole = load_file(export_run(run.folder, "merged", out=tmp_path / "out") / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    notes = read_json(export_run(folder, "adapter") / "export.json")["notes"]
    assert not any("merged" in one for one in notes)  # only the adapter is written


def test_generation_stops_where_the_template_ends_a_turn(run, tmp_path):
    base = tmp_path / "base"
    tokenizer = make_split_tokenizer("gpt-2", base)
    make_base("llama", tokenizer, base, eos_token_id=0)
    GenerationConfig(eos_token_id=0).save_pretrained(base)
    out = export_run(base, "merged", out=tmp_path / "out")
    end = tokenizer.convert_tokens_to_ids(EOS)
    assert read_json(out / "generation_config.json")["eos_token_id"] == [0, end]


def test_a_temperature_without_sampling_does_not_stop_an_export(tmp_path, caplog):
    """Published generation configs have one, and transformers refuses to save it again."""
    run = make_run(tmp_path, "llama", "gpt-2")
    (run.base / "generation_config.json").write_text('{"temperature": 0.6}', encoding="utf-8")
    made = read_json(export_run(run.folder, "merged") / "generation_config.json")
    assert made["temperature"] == 0.6 and made["do_sample"] is True
    assert "sampling values without do_sample" in caplog.text


def test_an_adapter_is_copied_with_its_bases_name(run, tmp_path):
    out = export_run(run.folder, "adapter", out=tmp_path / "out", base="Qwen/Qwen3-0.6B")
    config = read_json(out / "adapter_config.json")
    assert config["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert config["r"] == 4 and config["revision"] is None
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (run.folder, out))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "base_model: Qwen/Qwen3-0.6B\nbase_model_relation: adapter" in card
    assert str(run.base) not in card
    assert AutoTokenizer.from_pretrained(out).chat_template == run.tokenizer.chat_template


def test_a_local_base_is_said_when_an_adapter_is_copied(run, tmp_path):
    out = export_run(run.folder, "adapter", out=tmp_path / "out")
    made = read_json(out / "export.json")
    assert "name the hub id by --base" in made["notes"][0] and made["base"] == "base"
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    ids = some_ids(run.tokenizer)
    loaded = PeftModel.from_pretrained(base, out)
    assert torch.equal(logits_of(loaded, ids), logits_of(run.model, ids))


def test_a_run_of_all_weights_can_be_merged_too_and_has_no_adapter(run, tmp_path):
    full = tmp_path / "full"
    merged_model(find_run(run.folder), load_tokenizer(find_run(run.folder))).save_pretrained(full)
    run.tokenizer.save_pretrained(full)
    with pytest.raises(UserError, match="holds all the weights and no adapter"):
        export_run(full, "adapter")
    out = export_run(full, "merged", out=tmp_path / "out")
    first, second = (load_file(folder / "model.safetensors") for folder in (full, out))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match="--base is x, but .* holds all the weights"):
        export_run(full, "merged", base="x", out=tmp_path / "other")


def test_an_export_is_not_overwritten_unless_forced(run, tmp_path):
    out = tmp_path / "out"
    export_run(run.folder, "adapter", out=out)
    (out / "old").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="has an export; choose another folder, or .*--force"):
        export_run(run.folder, "adapter", out=out)
    assert (out / "old").exists()
    export_run(run.folder, "adapter", out=out, force=True)
    assert (out / "adapter_config.json").exists() and not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_export_is_not_overwritten_even_if_forced(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("years", encoding="utf-8")
    with pytest.raises(UserError, match="has files that are not part of an export"):
        export_run(run.folder, "adapter", out=tmp_path, force=True)
    with pytest.raises(UserError, match="not part of an export"):
        export_run(run.folder, "adapter", out=tmp_path / "thesis.txt", force=True)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years"


def test_a_failure_leaves_nothing_and_the_earlier_export_in_place(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_run(run.folder, "adapter", out=out)
    before = (out / "export.json").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_card", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        export_run(run.folder, "adapter", out=out, force=True)
    with pytest.raises(OSError, match="No space left on device"):
        export_run(run.folder, "adapter", out=tmp_path / "second")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "export.json").read_bytes() == before


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(run.folder, broken)
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(UserError, match="cannot be merged.*NaN|not finite"):
        export_run(broken, "merged", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_cannot_hold_the_weights_is_refused(tmp_path):
    tokenizer = make_split_tokenizer("gpt-2", tmp_path / "base")
    make_base("llama", tokenizer, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["lm_head.weight"][0, 0] = 1e5
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="--dtype float16 gives weights that are not finite"):
        export_run(tmp_path / "base", "merged", dtype="float16", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"format": "onnx"}, "--format is 'onnx'; expected one of adapter, merged"),
        ({"format": "gguf", "quant": "q4"}, "--quant is 'q4'; expected one of q8_0, f16, f32"),
        ({"format": "merged", "dtype": "int8"}, "--dtype is 'int8'; expected one of auto"),
        ({"format": "merged", "base": "/nowhere/model"}, "base model /nowhere/model .* not there"),
    ],
)
def test_bad_arguments_are_named(run, arguments, said, tmp_path):
    with pytest.raises(UserError, match=said):
        export_run(run.folder, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(run, tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(run.base, base)
    config = read_json(base / "config.json")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="is stored quantised.*--base"):
        export_run(run.folder, "merged", base=str(base), out=tmp_path / "out")


def test_folders_without_a_model_are_told_apart(run, tmp_path):
    with pytest.raises(UserError, match="there is no run folder"):
        find_run(tmp_path / "none")
    with pytest.raises(UserError, match="it has neither adapter_config.json nor config.json"):
        find_run(tmp_path)
    with pytest.raises(UserError, match=r"did you mean .*run\?"):
        find_run(run.folder.parent)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(UserError, match="training has not ended; its last checkpoint is .*-4"):
        find_run(tmp_path)


def test_a_checkpoint_has_the_recipe_of_its_run(run, tmp_path):
    import shutil

    shutil.copytree(run.folder, tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "recipe.yaml").rename(tmp_path / "recipe.yaml")
    assert find_run(tmp_path / "checkpoint-2").dtype == "float32"


def test_four_bits_without_the_package_are_one_sentence_and_exit_2(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    out = tmp_path / "out"
    assert main(["export", str(run.folder), "--format", "merged-4bit", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "needs the package bitsandbytes" in said
    assert not out.exists()


def test_rows_that_bitsandbytes_loses_on_a_cpu_are_refused(run):
    with pytest.raises(UserError, match="rows of .*down_proj have 96 weights, not a multiple of 64"):
        refuse_partial_blocks(
            AutoModelForCausalLM.from_pretrained(run.base),
            "--format merged-4bit",
            "--format merged",
        )


def test_four_bits_are_read_back_within_the_rounding_of_nf4(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 4-bit weights")
    run = make_run(tmp_path, "qwen3", "gpt-2", head_dim=16, intermediate_size=128)
    out = export_run(run.folder, "merged-4bit")
    found = AutoModelForCausalLM.from_pretrained(out)
    exact = dict(copy.deepcopy(run.model).merge_and_unload().named_modules())
    looked_at = 0
    for name, module in found.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            largest = exact[name].weight.abs().reshape(-1, 64).amax(1, keepdim=True)
            error = (weight - exact[name].weight).abs().reshape(-1, 64)
            # the widest gap of NF4's levels is 0.304 of a block's largest value; 1/50 for scales kept in 8 bits, bf16
            assert (error <= (0.304 / 2 + 0.02) * largest).all(), name
            looked_at += 1
    assert looked_at == 14
    assert not list(out.glob("merged-*")) and (out / "chat_template.jinja").is_file()


def test_the_command_line_exports(run, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["export", str(run.folder), "--format", "merged", "--out", str(out)]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert main([*words, "--forse"]) == 2
    assert "--forse is unknown; did you mean --force?" in capsys.readouterr().err
