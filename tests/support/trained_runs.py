"""Trained runs for the tests of `prefopt.export` and `prefopt.use`, made by hand in the layout that training leaves."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from prefopt.train.run_folder import RunFolder
from support.tiny_models import CHATML, ROWS

PAD, BOS, EOS, THINK = "<|pad|>", "<|start|>", "<|im_end|>", "<think>"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # as the published tokenizers have it
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
LLAMA3 = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
ADDRESS = "Numbers 1 22 333 4444 55555, it's a test; we'll see.\n\n  Two spaces. 2024-11-21\t"
TEXTS = [
    ADDRESS,
    "ما هي عاصمة مصر؟ عاصمة مصر هي القاهرة، ١٢٣٤.",
    f"<|im_start|>user\nHello{EOS}\n<|im_start|>assistant\n{THINK}well",
    "naïve café 😀 日本語 ",
]


class Run(NamedTuple):
    """A run folder, what its adapter was trained on, and the model that training ended with (fp32, adapter inside)."""

    folder: Path
    base: Path
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


def make_split_tokenizer(split: str, path: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits text as "qwen2", "llama-bpe", "smollm" or "gpt-2" do; 4 ids are left free."""
    core = Tokenizer(tokenizer_models.BPE(ignore_merges=split == "llama-bpe"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = {
        "gpt-2": lambda: whole,
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole]),
        "qwen2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), rest]),
        "llama-bpe": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), rest]),
    }[split]()
    if split == "qwen2":
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420,
        special_tokens=[PAD, BOS, "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{prompt} {completion}" for prompt, completion, _ in ROWS]
    core.train_from_iterator([*texts, ADDRESS * 20, "system user assistant"], trainer)
    core.add_tokens([THINK])  # an added token that is not special, as Qwen3 has it
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=256,
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(path)
    return tokenizer


def make_base(arch: str, tokenizer: PreTrainedTokenizerBase, path: Path, dtype=torch.float32, **changes) -> None:
    """A two-layer random model with spread-out weights (norms and biases too) and four rows that no token uses."""
    sizes = {
        "vocab_size": len(tokenizer) + 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,
    } | changes
    configs = {
        "llama": lambda: LlamaConfig(**sizes),
        "qwen2": lambda: Qwen2Config(**sizes),
        # transformers reads a GGUF file of a Qwen3 as if heads were of size 128, whatever the file says
        "qwen3": lambda: Qwen3Config(**({"head_dim": 128} | sizes)),
    }
    set_seed(0)
    model = AutoModelForCausalLM.from_config(configs[arch](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # ones and zeros would hide a norm or bias in the wrong place
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(path)


def make_run(
    folder: Path,
    arch: str = "llama",
    split: str = "gpt-2",
    *,
    template_kwargs: dict | None = None,
    dtype=torch.float32,
    lora: dict | None = None,
    data: dict | None = None,
    **changes,
) -> Run:
    """``folder/base`` and ``folder/run``: an adapter of nonzero matrices, and the run's files."""
    base, run = folder / "base", folder / "run"
    tokenizer = make_split_tokenizer(split, base)
    make_base(arch, tokenizer, base, dtype, **changes)
    model = adapt(base, run, lora or {})
    tokenizer.save_pretrained(run)
    RunFolder(run, active=True).update(method="kto", status="finished")
    content = {
        "model": {"path": str(base), "revision": None, "dtype": "float32"},
        "data": {"path": "rows.jsonl", "chat_template_kwargs": template_kwargs or {}} | (data or {}),
        "training": {"output_dir": str(run)},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return Run(run, base, model, tokenizer)


def adapt(base: Path, run: Path, lora: dict) -> PeftModel:
    """Write an adapter without zeros into ``run``; return the base with it, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    set_seed(1)
    with torch.no_grad():
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(options | lora)))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
            elif "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(run)
    return model.eval()


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(B, L, V) fp32"""
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def assert_same_function(merged: torch.nn.Module, trained: torch.nn.Module, ids: torch.Tensor) -> None:
    """The merged model errs as the trained one does in fp32, against fp64.

    A merged weight is off by a rounding or two of fp32, as each product in the trained model is: the same size of
    error, and some room for luck.
    """
    own = logits_of(trained, ids).double()
    with torch.no_grad():
        exact = trained.double()(input_ids=ids).logits
        trained.float()  # as it was
    own = (own - exact).abs().max()
    assert (logits_of(merged, ids).double() - exact).abs().max() <= 8 * own < 1e-2


def some_ids(tokenizer: PreTrainedTokenizerBase, rows: int = 3, length: int = 24) -> torch.Tensor:
    """(rows, length) random ids, the same each time."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(len(tokenizer), (rows, length), generator=generator)


def read_json(path: Path) -> dict:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
