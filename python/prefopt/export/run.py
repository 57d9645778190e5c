"""`prefopt export`: write the model of a run folder in another format."""

import json
import logging
import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.export.card import write_card
from prefopt.export.folder import RECORD, export_folder
from prefopt.export.merge import merged_model, save_four_bit, save_merged
from prefopt.export.readback import read_back_adapter
from prefopt.options import WHOLE
from prefopt.report.facts import hub_id
from prefopt.runs import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Source,
    base_of,
    find_run,
    load_tokenizer,
    read_object,
    stored_recipe,
)
from prefopt.train.run_folder import versions

logger = logging.getLogger(__name__)

FORMATS = ("adapter", "merged", "merged-4bit", "gguf")
QUANTS = ("q8_0", "f16", "f32")
DTYPES = ("auto", "float32", "bfloat16", "float16")
NEEDS = {"merged-4bit": "bitsandbytes", "gguf": "gguf"}


def export_run(
    run: str | Path,
    format: str,
    *,
    quant: str = "q8_0",
    dtype: str = "auto",
    out: str | Path | None = None,
    base: str | None = None,
    force: bool = False,
) -> Path:
    """Write a run's model in another format, read it back, and move it into place.

    Args:
        run: run folder.
        format: "adapter" (only the adapter), "merged" (safetensors), "merged-4bit" (the same in NF4 of bitsandbytes) or
            "gguf" (one file for llama.cpp).
        quant: of gguf's matrices, "q8_0", "f16" or "f32".
        dtype: of merged weights; "auto" is that of the base. The merge is computed in fp32.
        out: the folder (default: RUN/export/FORMAT).
        base: base model (default: the one that the adapter names); with "adapter", the name to write.
        force: replace an earlier export.

    Returns:
        The folder, with weights, tokenizer, model card and export.json.

    Raises:
        UserError: the format does not support the model, a package is missing, ``out`` is in use, or the export
            differs when it is loaded again.
        OSError: it cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"--format is {format!r}; expected one of {', '.join(FORMATS)}")
    if quant not in QUANTS:
        raise UserError(f"--quant is {quant!r}; expected one of {', '.join(QUANTS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    package = NEEDS.get(format)
    if package is not None and find_spec(package) is None:
        raise UserError(f"--format {format} needs the package {package}, which is not installed: pip install {package}")
    source = _published(run, base) if format == "adapter" else find_run(run, base)
    tokenizer = load_tokenizer(source)
    folder = source.folder / "export" / format if out is None else Path(out).expanduser()
    with export_folder(folder, force) as partial:
        notes = _write(source, tokenizer, partial, format, quant, dtype)
        if format != "adapter" and source.quantization != WHOLE:
            notes.append(
                f"the adapter was trained on a base in {source.quantization} and is merged into the base's "
                "unquantised weights, which changes its outputs: evaluate the result before you rely on it"
            )
        _record(partial, source, format, quant, dtype, notes)
        write_card(partial, source, format)
    for note in notes:
        logger.warning("note: %s", note)
    return folder


def _published(run: str | Path, base: str | None) -> Source:
    """The source of an adapter export, whose base need not be available: only its name is written."""
    folder = Path(run).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        source = find_run(run)  # raises if there is no model
        raise UserError(f"{source.folder} holds all the weights and no adapter; expected --format merged or gguf")
    adapter = read_object(folder / ADAPTER_CONFIG)
    if base is not None:
        adapter |= {"base_model_name_or_path": base, "revision": None}
    stored, home = stored_recipe(folder)
    named = base_of(adapter, stored, home) or ""
    return Source(folder, named, adapter.get("revision"), adapter, recipe=stored)


def _write_adapter(source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    weights = [source.folder / name for name in ADAPTER_WEIGHTS]
    found = [path for path in weights if path.is_file()]
    if not found:
        raise UserError(f"{source.folder} has an {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS[0]}")
    shutil.copy2(found[0], folder)
    base = _public_name(source.base)
    adapter = source.adapter | {"base_model_name_or_path": base}
    text = json.dumps(adapter, indent=2, ensure_ascii=False)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    trained = read_object(source.folder / ADAPTER_CONFIG)
    bases = [
        (source.base, source.revision),
        (base_of(trained, *stored_recipe(source.folder)), trained.get("revision")),
    ]
    notes = []
    if not read_back_adapter(folder, source.folder, bases, source.trust_remote_code):
        notes.append(
            "the base model is not available locally: the adapter's tensors were compared with the run's, its logits "
            "were not"
        )
    if hub_id(source.base) is None:
        notes.append(
            f"adapter_config.json names the base model {base or 'nothing'}, which is a local folder; before you "
            "publish the adapter, name the hub id by --base"
        )
    return notes


def _public_name(base: str | None) -> str | None:
    """The base's hub id, or the last part of its path: no local path is published."""
    return Path(base).name if base and hub_id(base) is None else base


def _write_gguf(source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, quant: str) -> list[str]:
    from prefopt.export.gguf_readback import read_back_gguf
    from prefopt.export.gguf_write import check_gguf, write_gguf

    check_gguf(source, tokenizer)  # before the weights are loaded
    model = merged_model(source, tokenizer)
    path = folder / f"{source.folder.resolve().name}-{quant}.gguf"
    notes = write_gguf(model, tokenizer, path, quant, source.template_kwargs)
    read_back_gguf(path, model, quant)
    if source.template_kwargs:
        notes.append(
            f"the run was trained with the chat template's arguments {json.dumps(source.template_kwargs)}, which the "
            "file cannot hold; give them to the program that runs it"
        )
    return notes


def _write(
    source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, format: str, quant: str, dtype: str
) -> list[str]:
    """Write one format and return notes for the user."""
    if format == "adapter":
        return _write_adapter(source, tokenizer, folder)
    if format == "gguf":
        return _write_gguf(source, tokenizer, folder, quant)
    if format == "merged":
        save_merged(source, tokenizer, folder, dtype)
        return []
    save_four_bit(source, tokenizer, folder, dtype)
    return ["the weights were rounded to 4 bits after the merge: evaluate them before you rely on them"]


def _record(folder: Path, source: Source, format: str, quant: str, dtype: str, notes: list[str]) -> None:
    base = _public_name(source.base)
    made: dict[str, Any] = {"format": format, "run": source.folder.resolve().name, "base": base}
    if format == "gguf":
        made["quant"] = quant
    elif format != "adapter":
        made["dtype"] = dtype
    package = NEEDS.get(format)
    packages = versions() | ({} if package is None else {package: version(package)})
    made |= {
        "notes": notes,
        "chat_template_kwargs": source.template_kwargs,
        "versions": packages,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(made, indent=2, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
