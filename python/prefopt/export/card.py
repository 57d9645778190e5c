"""README.md of an export: metadata for the hub, and how to load the model."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from prefopt.export.folder import RECORD
from prefopt.report.facts import hub_id
from prefopt.report.markdown import code, plain
from prefopt.runs import Source

RELATIONS = {
    "adapter": "adapter",
    "merged": "finetune",
    "merged-4bit": "quantized",
    "gguf": "quantized",
}
LIBRARIES = {"adapter": "peft", "gguf": "gguf"}
TAGS = {"adapter": ["lora"], "gguf": ["llama.cpp"]}
DESCRIPTIONS = {
    "adapter": "The adapter only; it needs its base model.",
    "merged": "The adapter merged into its base model's weights in fp32, then rounded to the dtype that is stored.",
    "merged-4bit": "The merged weights, rounded to 4 bits (bitsandbytes, NF4).",
    "gguf": "One file for llama.cpp and programs built on it.",
}


def write_card(folder: Path, source: Source, format: str) -> None:
    """Write README.md into the export, without a license and without local paths."""
    made = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    base = hub_id(source.base)
    block: dict[str, Any] = {"base_model": base, "base_model_relation": RELATIONS[format]} if base else {}
    block |= {
        "library_name": LIBRARIES.get(format, "transformers"),
        "pipeline_tag": "text-generation",
        "tags": ["preference-optimization", "prefopt", *TAGS.get(format, [])],
    }
    parts = [
        f"---\n{yaml.safe_dump(block, sort_keys=False, allow_unicode=True)}---",
        f"# {plain(made['run'])}, {format}",
        DESCRIPTIONS[format],
        _use(folder, format, base),
    ]
    if made["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {plain(note)}" for note in made["notes"]))
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _use(folder: Path, format: str, base: str | None) -> str:
    if format == "gguf":
        file = next(folder.glob("*.gguf")).name
        return code(f"llama-cli -m {shlex.quote(file)} -cnv", "sh")
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if format == "adapter":
        lines.insert(0, "from peft import PeftModel")
        lines += [
            f'model = AutoModelForCausalLM.from_pretrained("{base or "PATH_OF_THE_BASE_MODEL"}")',
            'model = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER")',
        ]
    else:
        lines.append('model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")')
    lines.append('tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")')
    return code("\n".join(lines), "python")
