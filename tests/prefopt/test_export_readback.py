"""Adapters on head and embedding survive an export, and an export that is another model does not appear."""

import copy
import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import prefopt.export.merge as merge
import prefopt.export.run as export
from prefopt.errors import UserError
from prefopt.export.readback import check_logits, probe_ids, within_nf4
from prefopt.export.run import export_run
from prefopt.models import merge_adapter
from prefopt.runs import Source, find_run, load_model
from support.trained_runs import (
    adapt,
    assert_same_function,
    logits_of,
    make_run,
    read_json,
    some_ids,
)


@pytest.fixture(scope="module")
def run(bases):
    return bases[False]


HEAD, EMBEDDING = "lm_head", "embed_tokens"
ON_HEAD_OR_EMBEDDING = {
    **{
        f"{kind} {' and '.join(names)}": {
            "target_modules": ["q_proj", *([] if kind == "trained" else names)],
            **({"modules_to_save": names} if kind == "trained" else {}),
            **({"use_dora": True} if kind == "dora" else {}),
        }
        for kind in ("trained", "lora", "dora")
        for names in ([HEAD], [EMBEDDING], [HEAD, EMBEDDING])
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 7]},
    "tokens of each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {HEAD: [1, 5], EMBEDDING: [2, 5]},
    },
    "tokens, lora head": {
        "target_modules": ["q_proj", HEAD],
        "trainable_token_indices": [1, 5, 7],
    },
    "lora embedding, trained head": {
        "target_modules": ["q_proj", EMBEDDING],
        "modules_to_save": [HEAD],
    },
    "lora head, trained embedding": {
        "target_modules": ["q_proj", HEAD],
        "modules_to_save": [EMBEDDING],
    },
}
# of the adapters above, those whose head and embedding are one matrix when they are merged: a tied base, and
# ensure_weight_tying or not. DoRA has a magnitude for each row of the head, but for each column of the embedding.
STAY_TIED = {
    True: {
        *(f"{k} {n}" for k in ("trained", "lora") for n in (HEAD, EMBEDDING, "lm_head and embed_tokens")),
        "tokens",
        "lora embedding, trained head",
    },
    False: {"tokens"},
}  # fmt: skip
REFUSED_BY_PEFT = {"tokens of each", "tokens, lora head", "lora head, trained embedding"}  # tied


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Runs on a base with tied head and embedding, and on one without, whose adapters are to be replaced."""
    return {
        tied: make_run(
            tmp_path_factory.mktemp("base"),
            "qwen2",
            "gpt-2",
            tie_word_embeddings=tied,
            intermediate_size=128,  # which can be stored in 4 bits
        )
        for tied in (True, False)
    }


@pytest.mark.parametrize("adapter", ON_HEAD_OR_EMBEDDING)
@pytest.mark.parametrize(
    ("tied", "ensure"), [(True, True), (True, False), (False, False)], ids=["ensured", "tied", "untied"]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*`?tie_word_embeddings=True`?")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapters_on_head_and_embedding_are_merged_and_saved(bases, adapter, tied, ensure, tmp_path):
    if ensure and adapter in REFUSED_BY_PEFT:
        pytest.skip("peft refuses this adapter with ensure_weight_tying")
    base = bases[tied]
    options = ON_HEAD_OR_EMBEDDING[adapter] | {"ensure_weight_tying": ensure}
    folder = tmp_path / "run"
    trained = adapt(base.base, folder, options)
    base.tokenizer.save_pretrained(folder)
    out = export_run(folder, "merged")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert_same_function(merged, trained, some_ids(base.tokenizer))
    one = tied and adapter in STAY_TIED[ensure]
    assert merged.config.tie_word_embeddings is one
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not one


def test_an_adapter_elsewhere_leaves_a_tied_head_as_it_is(bases):
    model = copy.deepcopy(bases[True].model)
    weight = model.get_base_model().get_input_embeddings().weight
    merged = merge_adapter(model)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight is weight


def test_a_head_lost_in_saving_fails_the_export_and_leaves_nothing(bases, tmp_path, monkeypatch):
    """The planted fault: head and embedding are one matrix in memory, and the configuration says they are two."""
    merge_as_it_should_be = merge_adapter

    def merge_and_forget(model):
        merged = merge_as_it_should_be(model)
        merged.config.tie_word_embeddings = False
        return merged

    monkeypatch.setattr(merge, "merge_adapter", merge_and_forget)
    for format in ("merged", "merged-4bit") if find_spec("bitsandbytes") else ("merged",):
        with pytest.raises(UserError, match="the export, loaded again, has logits that differ by"):
            export_run(bases[True].folder, format, out=tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_an_adapter_merged_wrongly_is_refused(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "merge_adapter", lambda model: model.unload())
    with pytest.raises(UserError, match="cannot be merged: the merged model has logits that"):
        export_run(bases[True].folder, "merged", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_weight_changed_in_saving_fails_the_export(run, tmp_path, monkeypatch):
    """Of a token that the probe does not have: its logits are equal, its weights are not."""
    save = merge._save

    def save_otherwise(model, tokenizer, folder):
        save(model, tokenizer, folder)
        weights = load_file(folder / "model.safetensors")
        unused = next(i for i in range(100) if i not in probe_ids(len(weights["lm_head.weight"])))
        weights["model.embed_tokens.weight"][unused, 0] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merge, "_save", save_otherwise)
    with pytest.raises(UserError, match="has weights that differ"):
        export_run(run.folder, "merged", out=tmp_path / "out")


def test_values_beyond_the_rounding_of_nf4_are_found():
    values = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    one = (torch.arange(300) == 70).view(3, 100) * values.flatten()[64:128].abs().max()  # of its block
    assert within_nf4(values + 0.17 * one, values)
    assert not within_nf4(values - 0.18 * one, values)


def test_an_adapter_is_read_back_on_a_base_that_is_here(run, tmp_path, monkeypatch):
    copy2 = export.shutil.copy2

    def copy_otherwise(path, folder):
        copy2(path, folder)
        weights = load_file(folder / path.name)
        next(iter(weights.values()))[0, 0] += 1
        save_file(weights, folder / path.name)

    monkeypatch.setattr(export.shutil, "copy2", copy_otherwise)
    with pytest.raises(UserError, match="the adapter, loaded again, has other tensors"):
        export_run(run.folder, "adapter", out=tmp_path / "out")
    monkeypatch.undo()
    config = read_json(run.folder / "adapter_config.json")
    alpha = config | {"lora_alpha": 2 * config["lora_alpha"]}
    monkeypatch.setattr(export, "_published", lambda *_: Source(run.folder, str(run.base), None, alpha))
    with pytest.raises(UserError, match="the adapter, loaded again on .* has logits that differ"):
        export_run(run.folder, "adapter", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_whose_base_is_elsewhere_is_compared_by_its_tensors(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    config = read_json(folder / "adapter_config.json") | {"base_model_name_or_path": "nobody/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    out = export_run(folder, "adapter", out=tmp_path / "out")
    assert "its logits were not" in read_json(out / "export.json")["notes"][0]


def test_an_adapter_of_a_resized_vocabulary_names_both_sizes(run, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(run.base)
    rows = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(rows + 7)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        model.save_pretrained(tmp_path / "run")
    run.tokenizer.save_pretrained(tmp_path / "run")
    for format in ("adapter", "merged"):
        with pytest.raises(UserError, match=f"of {rows + 7} rows, and the base .* has {rows}: .*--base"):
            export_run(tmp_path / "run", format, out=tmp_path / "out")
    resized = AutoModelForCausalLM.from_pretrained(run.base)
    resized.resize_token_embeddings(rows + 7)
    resized.save_pretrained(tmp_path / "resized")
    loaded = load_model(find_run(tmp_path / "run", str(tmp_path / "resized")))
    ids = some_ids(run.tokenizer) + 7
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


def test_one_token_at_another_expert_is_no_fault_and_most_tokens_are(run):
    model, logits = copy.deepcopy(run.model), torch.randn(8, 5)
    moved, most = logits.clone(), logits.clone()
    moved[3] += 1
    most[2:] += 1
    with pytest.raises(UserError, match="a model has logits that differ by 1 "):
        check_logits(model, moved, logits, "a model")
    model.config.num_experts = 4
    check_logits(model, moved, logits, "a model")
    with pytest.raises(UserError, match="a model has logits that differ by 1 "):
        check_logits(model, most, logits, "a model")
