"""Small runs to be evaluated: the files that training leaves, without training."""

import json
from pathlib import Path

import yaml
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from prefopt.data.build.convert.mmlu_pro import CATEGORIES
from support.tiny_models import make_model, make_rows, make_tokenizer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "eval"
BETA, CONTEXT = 0.2, 1024


def make_run(folder: Path, kind: str = "adapter") -> Path:
    """``base``, ``run`` and ``rows.jsonl`` in a folder; the run differs from its base by weights drawn at random.

    ``kind`` is "adapter" or "weights".
    """
    tokenizer = make_tokenizer(folder / "base")
    tokenizer.model_max_length = CONTEXT
    # One token each, as letters are elsewhere: random models would otherwise all like the shortest best.
    tokenizer.add_tokens([*(f" {letter}" for letter in "ABCD"), *CATEGORIES])
    tokenizer.save_pretrained(folder / "base")
    model = _model(len(tokenizer), folder / "base", seed=0)
    run = folder / "run"
    if kind == "adapter":
        lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, lora)
    else:
        model = _model(len(tokenizer), run, seed=1)
    model.save_pretrained(run)
    tokenizer.save_pretrained(run)
    write_lines(folder / "rows.jsonl", make_rows(True))
    recipe = {
        "model": {"path": str(folder / "base"), "dtype": "float32"},
        "data": {"path": str(folder / "rows.jsonl"), "eval_fraction": 0.4, "max_length": 128},
        "loss": {"method": "kto", "beta": BETA},
        "training": {"output_dir": str(run), "use_cpu": True, "seed": 3},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    record = {"status": "finished", "method": "kto", "config": {"beta": BETA}}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return run


def _model(vocab_size: int, path: Path, seed: int) -> PreTrainedModel:
    """With a context for ten examples; positions are rotary, so a longer one needs no weights."""
    model = make_model("qwen3", vocab_size, path, seed)
    model.config.max_position_embeddings = CONTEXT
    model.save_pretrained(path)
    return model


def write_lines(path: Path, rows: list[dict]) -> Path:
    """Rows as JSONL."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path
