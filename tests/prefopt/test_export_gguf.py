"""GGUF files: transformers reads the same tokenizer and the same function back, up to the format's rounding."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from prefopt.errors import UserError
from prefopt.export import gguf_model, gguf_tokenizer, gguf_write
from prefopt.export.gguf_readback import rounding_of
from prefopt.export.gguf_write import write_gguf
from prefopt.export.run import export_run
from support.tiny_models import make_model, make_tokenizer
from support.trained_runs import (
    EOS,
    TEXTS,
    THINK,
    logits_of,
    make_base,
    make_run,
    make_split_tokenizer,
    read_json,
    some_ids,
)

gguf = pytest.importorskip("gguf", reason="the extra [export] is not installed")

KINDS = [("llama", "llama-bpe"), ("qwen2", "qwen2"), ("qwen3", "qwen2"), ("llama", "gpt-2")]
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EPS_F16 = 2.0**-11  # half the distance of neighbouring F16 numbers, relative


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}

    def get(arch, split):
        if (arch, split) not in made:
            made[arch, split] = make_run(tmp_path_factory.mktemp(f"{arch}-{split}"), arch, split)
        return made[arch, split]

    return get


def read_back(folder):
    """Model and tokenizer as transformers reads them from the one GGUF file in a folder."""
    (file,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


def merged(run):
    return copy.deepcopy(run.model).merge_and_unload()


def allowed(weight, quant):
    """The largest error of each value that the format may make, from its definition."""
    if weight.ndim == 1 or quant == "f32":
        return torch.zeros_like(weight)
    if quant == "f16":  # round to nearest; below 2**-14 the numbers are 2**-24 apart
        return (EPS_F16 * weight.abs()).clamp_min(2.0**-25)
    largest = weight.view(-1, 32).abs().amax(1, keepdim=True)
    scale = largest / 127
    # to the nearest multiple of the scale, and the scale itself rounded to F16; fp32 arithmetic on the way
    error = (scale / 2 + largest * EPS_F16) * (1 + 2.0**-20)
    return error.expand(-1, 32).reshape(weight.shape)


@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize(("arch", "split"), KINDS)
def test_round_trip_is_the_same_function_of_weights_within_the_formats_rounding(runs, arch, split, quant, tmp_path):
    run = runs(arch, split)
    expected = merged(run)
    found, _ = read_back(export_run(run.folder, "gguf", quant=quant, out=tmp_path / "out"))
    read = dict(found.named_parameters())
    assert read.keys() == dict(expected.named_parameters()).keys()
    changed = 0
    for name, weight in expected.named_parameters():
        error = (read[name] - weight).abs()
        assert (error <= allowed(weight.detach(), quant)).all(), name
        changed += int(error.any())
    assert (changed > 0) == (quant != "f32")
    # The same weights in the model that the run was trained as give the same logits bit for bit: every constant of the
    # architecture (heads, rotary base, epsilon, places of the tensors) is what it was.
    expected.load_state_dict(found.state_dict())
    ids = some_ids(run.tokenizer)
    assert torch.equal(logits_of(found, ids), logits_of(expected, ids))


@pytest.mark.parametrize(("arch", "split"), KINDS[1:])
def test_round_trip_of_the_tokenizer(runs, arch, split, tmp_path):
    run = runs(arch, split)
    out = export_run(run.folder, "gguf", out=tmp_path / "out")
    _, found = read_back(out)
    for text in TEXTS:
        assert found(text).input_ids == run.tokenizer(text).input_ids
    assert found.chat_template == run.tokenizer.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(found, name) == getattr(run.tokenizer, name)


def test_llama_3_tokens_of_numbers(runs, tmp_path):
    """Up to three digits together; what transformers reads does not take whole words first, so words are left out."""
    run = runs("llama", "llama-bpe")
    _, found = read_back(export_run(run.folder, "gguf", out=tmp_path / "out"))
    for text in ("1 22 333 4444 55555", "2024-11-21", "١٢٣٤"):
        assert found(text).input_ids == run.tokenizer(text).input_ids


def test_a_wrong_rule_for_splitting_gives_other_tokens(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_tokenizer, "_pre", lambda rule, whole_words: "gpt-2")
    run = runs("qwen2", "qwen2")
    _, found = read_back(export_run(run.folder, "gguf", out=tmp_path / "out"))
    assert any(found(text).input_ids != run.tokenizer(text).input_ids for text in TEXTS)


def test_rows_left_as_they_are_give_another_llama(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model, "interleaved", lambda values, heads: values)
    run = runs("llama", "gpt-2")
    found, _ = read_back(export_run(run.folder, "gguf", quant="f32", out=tmp_path / "out"))
    ids = some_ids(run.tokenizer)
    difference = (logits_of(found, ids) - logits_of(merged(run), ids)).abs().max()
    assert difference > 0.1


def test_a_file_that_is_another_model_is_refused(runs, tmp_path, monkeypatch):
    run = runs("qwen2", "qwen2")
    encode = gguf_write.encoded
    blocks = gguf_write.tensors

    def off(tensor):
        if tensor.name == "blk.1.ffn_up.weight":  # half a step of the largest value more than the format rounds
            largest = tensor.values.abs().max()
            moved = torch.where(tensor.values.abs() == largest, tensor.values * 0.99, tensor.values)
            tensor = tensor._replace(values=moved)
        return encode(tensor)

    for name, planted, said in (
        ("encoded", off, "blk.1.ffn_up.weight is off by"),
        ("tensors", lambda *a: list(blocks(*a))[:-1], "it has no"),
        (
            "add_metadata",
            lambda writer, config: gguf_model.add_metadata(writer, wider(config)),
            "intermediate_size is",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(gguf_write, name, planted)
            with pytest.raises(UserError, match=f"GGUF file, read again, is not the model: {said}"):
                export_run(run.folder, "gguf", out=tmp_path / "out")
        assert not list(tmp_path.iterdir())


def wider(config):
    other = copy.deepcopy(config)
    other.intermediate_size += 32
    return other


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_the_rounding_that_is_allowed_is_that_of_the_type(kind):
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    values[:8] *= 2.0**-13  # scales of q8_0 and values of f16 below the normal numbers of F16
    kind_of_gguf = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind_of_gguf), kind_of_gguf)
    share = (torch.tensor(stored) - values).abs() / rounding_of(values, kind)
    assert 0.9 < share.max() <= 1


def fields_of(path):
    """Metadata of a file, read by the gguf package."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {
        tensor.name: tensor for tensor in reader.tensors
    }


def test_what_the_file_says_about_itself(runs, tmp_path):
    run = runs("qwen3", "qwen2")
    out = export_run(run.folder, "gguf", quant="q8_0", out=tmp_path / "out")
    fields, tensors = fields_of(out / "run-q8_0.gguf")
    config = run.model.config
    assert fields["general.architecture"] == "qwen3"
    assert fields["qwen3.attention.key_length"] == fields["qwen3.rope.dimension_count"] == 128
    assert fields["qwen3.context_length"] == config.max_position_embeddings
    assert fields["qwen3.rope.freq_base"] == config.rope_parameters["rope_theta"]
    assert fields["qwen3.vocab_size"] == len(fields["tokenizer.ggml.tokens"]) == config.vocab_size
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[-4:] == [f"[PAD{config.vocab_size - i}]" for i in (4, 3, 2, 1)]
    assert types[-4:] == [gguf.TokenType.UNUSED] * 4
    assert types[tokens.index(EOS)] == gguf.TokenType.CONTROL
    assert types[tokens.index(THINK)] == gguf.TokenType.USER_DEFINED
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["blk.1.attn_q_norm.weight"] == "F32" and kinds["output.weight"] == "Q8_0"


def test_record_and_card_of_the_folder(runs, tmp_path):
    run = runs("qwen2", "qwen2")
    out = export_run(run.folder, "gguf", quant="f16", out=tmp_path / "out")
    made = read_json(out / "export.json")
    assert made["format"] == "gguf" and made["quant"] == "f16"
    assert made["versions"]["gguf"] and any("NFC" in note for note in made["notes"])
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "run-f16.gguf" in card and "library_name: gguf" in card
    assert str(tmp_path) not in card


def test_arguments_of_the_chat_template_are_noted(tmp_path):
    run = make_run(tmp_path, "qwen2", "qwen2", template_kwargs={"enable_thinking": False})
    notes = read_json(export_run(run.folder, "gguf") / "export.json")["notes"]
    assert any('{"enable_thinking": false}' in note for note in notes)


def test_a_tied_head_is_not_stored_twice(tmp_path):
    run = make_run(tmp_path, "qwen2", "gpt-2", tie_word_embeddings=True)
    out = export_run(run.folder, "gguf", quant="f32")
    assert "output.weight" not in fields_of(out / "run-f32.gguf")[1]
    found, _ = read_back(out)
    ids = some_ids(run.tokenizer)
    assert torch.equal(logits_of(found, ids), logits_of(merged(run), ids))


def test_biases_of_a_llama_change_places_with_their_rows(tmp_path):
    """transformers reads no biases for a llama, so the file itself is looked at."""
    run = make_run(tmp_path, "llama", "gpt-2", attention_bias=True, lora={"bias": "none"})
    tensors = fields_of(export_run(run.folder, "gguf", quant="f32") / "run-f32.gguf")[1]
    bias = run.model.get_base_model().model.layers[0].self_attn.q_proj.bias.detach()
    heads, size = 4, 16
    rows = [h * size + half * size // 2 + i for h in range(heads) for i in range(8) for half in (0, 1)]
    stored = torch.tensor(tensors["blk.0.attn_q.bias"].data.copy())
    assert bias.any() and torch.equal(stored, bias[rows])


def test_scaled_rotary_frequencies_of_llama_3(tmp_path):
    """Divisors by the published rule: 1 for short waves, the factor for long ones, a blend between them."""
    run = make_run(tmp_path, "llama", "gpt-2", rope_parameters=LLAMA3_ROPE)
    tensors = fields_of(export_run(run.folder, "gguf") / "run-q8_0.gguf")[1]
    expected = []
    for i in range(8):  # heads of size 16
        wave = 2 * math.pi * 500000.0 ** (i / 8)
        blend = (64 / wave - 1.0) / (4.0 - 1.0)
        if wave < 64 / 4.0:
            expected.append(1.0)
        else:
            expected.append(8.0 if wave > 64 / 1.0 else 1 / ((1 - blend) / 8.0 + blend))
    found = torch.tensor(tensors["rope_freqs.weight"].data.copy()).double()
    assert {1.0, 8.0} < set(expected)  # and one between them
    # the model keeps its frequencies in fp32, so a divisor is off by a few of its roundings
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=4 * 2.0**-23, atol=0)


def test_linear_rotary_scaling_is_named(tmp_path):
    run = make_run(tmp_path, "llama", "gpt-2", rope_parameters=LINEAR_ROPE)
    fields, _ = fields_of(export_run(run.folder, "gguf") / "run-q8_0.gguf")
    assert fields["llama.rope.scaling.type"] == "linear"
    assert fields["llama.rope.scaling.factor"] == 2.0


def test_rows_that_blocks_do_not_fill_are_kept_in_f16_and_said(tmp_path):
    run = make_run(tmp_path, "llama", "gpt-2", hidden_size=48)
    out = export_run(run.folder, "gguf", quant="q8_0")
    kinds = {name: t.tensor_type.name for name, t in fields_of(out / "run-q8_0.gguf")[1].items()}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"
    count = sum(kind == "F16" for kind in kinds.values())
    assert f"{count} matrices are kept in f16" in read_json(out / "export.json")["notes"][0]


def test_another_architecture_is_refused_before_its_weights_are_read(tmp_path):
    folder = tmp_path / "model"
    make_model("gemma2", len(make_tokenizer(folder)), folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="supports llama, qwen2, qwen3; this model is gemma2"):
        export_run(folder, "gguf")
    assert not (folder / "export").exists() or not list((folder / "export").iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rotary scaling 'yarn'",
        ),
        ({"hidden_act": "gelu"}, "the activation 'gelu'"),
    ],
)
def test_what_the_file_cannot_describe_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        gguf_model.check_config(LlamaConfig(**changes))


def test_a_weight_too_large_for_f16_is_refused_and_nothing_is_left(tmp_path):
    tokenizer = make_split_tokenizer("gpt-2", tmp_path / "base")
    make_base("llama", tokenizer, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 70000.0
    with pytest.raises(UserError, match="output.weight has a weight of 7e\\+04, too large for F16"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf", "f16")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="use --quant f32"):
        export_run(tmp_path / "base", "gguf", quant="f16", out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_without_the_gguf_package_one_sentence(runs, monkeypatch, tmp_path):
    import prefopt.export.run as export

    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gguf, which is not installed"):
        export_run(runs("qwen2", "qwen2").folder, "gguf", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arch", "split", "changes"),
    [
        ("qwen2", "qwen2", {}),
        ("qwen2", "gpt-2", {"tie_word_embeddings": True}),
        ("qwen3", "qwen2", {"head_dim": 32}),
        ("llama", "smollm", {}),
        ("llama", "gpt-2", {"attention_bias": True, "mlp_bias": True}),
        ("llama", "gpt-2", {"rope_parameters": LINEAR_ROPE}),
        ("llama", "llama-bpe", {"rope_parameters": LLAMA3_ROPE}),
    ],
    ids=["qwen2", "tied", "qwen3", "llama", "biases", "linear-rope", "llama3-rope"],
)
def test_llama_cpp_gives_the_same_tokens_and_logits(arch, split, changes, tmp_path):
    """What transformers cannot read back: biases, rotary scaling, a Qwen3's other heads, SmolLM's digits."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama.cpp is not installed (pip install llama-cpp-python builds it)"
    )
    run = make_run(tmp_path, arch, split, **changes)
    program = llama_cpp.Llama(
        str(export_run(run.folder, "gguf", quant="f32") / "run-f32.gguf"),
        n_ctx=256,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    for text in TEXTS:
        expected = run.tokenizer(text, add_special_tokens=False).input_ids
        assert program.tokenize(text.encode(), add_bos=False, special=True) == expected
    assert program.token_eos() == run.tokenizer.eos_token_id
    ids = some_ids(run.tokenizer, rows=1, length=200)
    model = merged(run)
    exact = copy.deepcopy(model).double()(input_ids=ids).logits[0].detach()
    own = (logits_of(model, ids)[0].double() - exact).abs().max()
    program.eval(ids[0].tolist())
    found = torch.tensor(program.scores[: ids.shape[1]]).double()
    # Both compute in fp32, in another order: llama.cpp may err as torch does, with some room for its own functions.
    assert (found - exact).abs().max() <= 16 * own < 1e-2
