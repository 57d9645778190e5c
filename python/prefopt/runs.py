"""Find the model of a run folder, and load it with its tokenizer: for eval, chat, classify, export and benchmarks."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from prefopt.errors import UserError
from prefopt.models import (
    GGUF,
    apply_adapter,
    compute_dtype,
    four_bit_options,
    from_pretrained,
    load_weights,
    require_bitsandbytes,
)
from prefopt.options import QUANTIZATIONS, WHOLE
from prefopt.paths import RECIPE_NAME, is_path, path_from, paths_from
from prefopt.read_yaml import read_yaml

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Source:
    """The model of a run folder, as its files describe it.

    ``base`` is None if the folder holds all weights.
    """

    folder: Path
    base: str | None = None
    revision: str | None = None  # of the base
    adapter: dict = field(default_factory=dict)  # adapter_config.json
    recipe: dict = field(default_factory=dict)  # recipe.yaml, with paths resolved
    record: dict = field(default_factory=dict)  # run.json

    def section(self, name: str) -> dict:
        """A section of the recipe; empty if it has none."""
        return section(self.recipe, name)

    @property
    def dtype(self) -> str:
        """Of the weights in training."""
        dtype = self.section("model").get("dtype")
        return dtype if isinstance(dtype, str) else "auto"

    @property
    def template_kwargs(self) -> dict:
        """Arguments of the chat template in training."""
        kwargs = self.section("data").get("chat_template_kwargs")
        return kwargs if isinstance(kwargs, dict) else {}

    @property
    def row_options(self) -> dict:
        """Arguments of ``load_rows`` with which the run read its rows."""
        data = self.section("data")
        return {"label_map": data.get("label_map"), "as_chat": bool(data.get("as_chat"))}

    @property
    def trained_format(self) -> str | None:
        """Format of the training rows, "chat" or "text"; None if run.json does not record it."""
        return section(section(self.record, "data"), "train").get("format")

    @property
    def started(self) -> str | None:
        """Folder or hub id of the model before training; None if unknown."""
        return self.base or self.section("model").get("path")

    @property
    def started_revision(self) -> str | None:
        """Revision of ``started`` on the hub."""
        return self.section("model").get("revision") if self.base is None else self.revision

    @property
    def trust_remote_code(self) -> bool:
        """Whether the recipe allows Python code that comes with the model."""
        return self.section("model").get("trust_remote_code") is True

    @property
    def quantization(self) -> str:
        """Of the base's weights in training."""
        quantization = self.section("model").get("quantization")
        return quantization if self.base is not None and quantization in QUANTIZATIONS else WHOLE

    @property
    def weights(self) -> str:
        """Folder or hub id of the base's weights, or of all weights."""
        return str(self.folder) if self.base is None else self.base


def find_run(run: str | Path, base: str | None = None) -> Source:
    """Read the files of a run folder, a checkpoint or a model's folder, without loading weights.

    Args:
        run: the folder.
        base: folder or hub id of the base model (default: the one that the adapter names).

    Raises:
        UserError: the folder has no trained model, or the folder of the base model is missing.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    stored, home = stored_recipe(folder)
    recipe, record = paths_from(stored, home), _record(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = read_object(folder / ADAPTER_CONFIG)
        if not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
            raise UserError(f"{folder} has an {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS[0]}")
        model = section(recipe, "model")
        named = base_of(adapter, stored, home) or model.get("path")
        revision = adapter.get("revision") or model.get("revision") if base is None else None
        return Source(folder, _located(base or named, folder), revision, adapter, recipe, record)
    if (folder / "config.json").is_file():
        if base is not None:
            raise UserError(f"--base is {base}, but {folder} holds all the weights; leave it out")
        return Source(folder, recipe=recipe, record=record)
    raise UserError(f"{folder} holds no trained model{_hint(folder)}")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the run's tokenizer with its chat template, or the base model's if the run has none."""
    own = (source.folder / "tokenizer_config.json").is_file()
    path, revision = str(source.folder), None
    if not own and source.started is not None:
        path, revision = source.started, source.started_revision
    failure, trust = f"cannot load a tokenizer from {path}", source.trust_remote_code
    return from_pretrained(AutoTokenizer, path, failure, revision=revision, trust_remote_code=trust)


def load_model(
    source: Source, *, dtype: str | None = None, quantization: str | None = None, device: str = "cpu"
) -> PreTrainedModel | PeftModel:
    """Load the trained model in evaluation mode, with its adapter applied but not merged.

    Args:
        source: from ``find_run``.
        dtype: "float32", "bfloat16", "float16" or "auto" (default: as in training).
        quantization: of the base's weights, "nf4" or "none" (default: as in training).
        device: from ``choose_device``.

    Raises:
        UserError: the base or the adapter cannot be loaded, or not in 4 bits.
    """
    name = dtype or source.dtype
    kind = quantization or source.quantization
    if kind not in QUANTIZATIONS:
        raise UserError(f"quantization is {kind!r}; expected {' or '.join(QUANTIZATIONS)}")
    code: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    options: dict[str, Any] = {}
    if kind != WHOLE:
        key = f"--quantization is {kind}" if quantization else f"{source.folder} was trained on a base in {kind}"
        instead = f"--quantization {WHOLE}"
        if source.base is None:
            raise UserError(
                f"{key}, but {source.folder} holds all the weights; expected a run with an adapter, or {instead}"
            )
        try:
            require_bitsandbytes(key)
        except UserError as error:
            raise UserError(f"{error}; or give {instead}") from None
        compute = getattr(torch, compute_dtype(source.section("training"), name))
        options = four_bit_options(source.weights, compute, device, key, instead, **code)
    if source.base is None:
        whole = load_weights(source.weights, name, **code)
        nn.Module.to(whole, device)
        return whole
    try:
        base = load_weights(source.weights, name, **code, **options)
    except UserError as error:
        raise UserError(
            f"the base model of {source.folder}: {error}; name another folder or hub id with --base"
        ) from None
    model = apply_adapter(base, source.folder, source.base).eval()
    return model if kind != WHOLE else model.to(device)


def base_of(adapter: dict, stored: dict, home: Path) -> str | None:
    """The base model that an adapter names: a hub id or a path, relocated if its folder moved with the run.

    ``stored`` and ``home`` come from ``stored_recipe``.
    """
    named = adapter.get("base_model_name_or_path")
    if named is not None and not isinstance(named, str):
        raise UserError(f"{ADAPTER_CONFIG} names the base model {named!r}; expected text")
    return path_from(named, section(stored, "training").get("output_dir"), home) if named else None


def stored_recipe(folder: Path) -> tuple[dict, Path]:
    """recipe.yaml of a run folder or of a checkpoint's run, and the folder it is in; {} if there is none."""
    for place in _run_folders(folder):
        try:
            content = read_yaml(place / RECIPE_NAME)
        except FileNotFoundError:
            continue
        return (content, place) if isinstance(content, dict) else ({}, folder)
    return {}, folder


def section(content: dict, name: str) -> dict:
    """A nested mapping; empty if it is missing or not a mapping."""
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def read_object(path: Path) -> dict:
    """Read a JSON object from a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _located(named: str | None, folder: Path) -> str:
    """A base model's folder or hub id."""
    if not named:
        raise UserError(f"the adapter in {folder} does not name its base model; name it by --base")
    path = Path(named).expanduser()
    if path.is_dir() or (path.suffix.lower() == GGUF and path.is_file()):
        return str(path)
    if is_path(named):
        raise UserError(f"the base model {named} of {folder} is not there; name its folder or hub id with --base")
    return named


def _hint(folder: Path) -> str:
    """Where the model may be instead."""
    checkpoint = get_last_checkpoint(str(folder))
    if checkpoint is not None:
        return f": training has not ended; its last checkpoint is {checkpoint}"
    inside = folder / "run"
    if (inside / ADAPTER_CONFIG).is_file() or (inside / "config.json").is_file():
        return f"; did you mean {inside}?"
    return f": it has neither {ADAPTER_CONFIG} nor config.json"


def _run_folders(folder: Path) -> list[Path]:
    """The folder and, for a checkpoint, the run folder it is in."""
    return [folder, folder.absolute().parent] if folder.name.startswith("checkpoint-") else [folder]


def _record(folder: Path) -> dict:
    """run.json of a run folder or of a checkpoint's run; {} if it is missing or broken."""
    path = next((one for place in _run_folders(folder) if (one := place / "run.json").is_file()), None)
    try:
        return {} if path is None else read_object(path)
    except UserError:  # the model can be loaded without it
        return {}
