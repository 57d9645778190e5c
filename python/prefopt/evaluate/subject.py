"""The run to be judged and the model it started from, loaded from files as a user would load them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefopt.evaluate.request import EvalError
from prefopt.report.score import BASE, RUN

CANNOT_LOAD = (OSError, ValueError, RuntimeError, SafetensorError)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass
class Subject:
    """A run with what is needed to judge it.

    ``kind`` is "adapter" or "weights". ``base_name`` is None where no starting model is known: then only the run is judged.
    """

    folder: Path
    kind: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    base_name: str | None
    base: nn.Module | None  # a second model; None for an adapter, whose base is itself without it
    recipe: dict = field(default_factory=dict)  # recipe.yaml, as it is
    record: dict = field(default_factory=dict)  # run.json
    warnings: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """Who can be judged, base first."""
        return [RUN] if self.kind == "weights" and self.base is None else [BASE, RUN]

    @contextmanager
    def playing(self, who: str) -> Iterator[nn.Module]:
        """The model that is BASE or RUN, in evaluation mode and without gradients."""
        with torch.no_grad():
            if who == RUN or self.kind == "weights":
                yield (self.model if who == RUN else self.base).eval()
            else:
                with self.model.disable_adapter():
                    yield self.model.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def option(self, section: str, name: str, default: Any = None) -> Any:
        """An option of the run's recipe, or else of the trainer's configuration in run.json.

        ``default`` is for what neither of them names; what they name as null is None.
        """
        places = (self.recipe.get(section), self.record.get("config"))
        said = [one[name] for one in places if isinstance(one, dict) and name in one]
        return next((one for one in said if one is not None), None if said else default)

    def about(self) -> dict:
        """For eval.json; no local path but the base's, which is the user's own name for it."""
        return {"kind": self.kind, "base": self.base_name, "method": self.record.get("method")}


def load_subject(folder: Path, base: str | None = None) -> Subject:
    """Load run and base.

    Args:
        folder: of a run, or of any saved adapter or model.
        base: folder or hub id of the starting model, where it is not what the run says or the run does not say.

    Raises:
        EvalError: there is no model in the folder, or one of the two cannot be loaded.
    """
    kind = kind_of(folder)
    recipe, record = _read(folder / "recipe.yaml"), _read(folder / "run.json")
    options = recipe.get("model")
    options = options if isinstance(options, dict) else {}
    adapter = _read(folder / "adapter_config.json")
    name = base or options.get("path") or adapter.get("base_model_name_or_path")
    revision = None if base else options.get("revision")
    kind_of_weights = options.get("dtype") or "auto"
    tokenizer = _tokenizer(folder, name, revision)
    started = None
    if name is not None:
        hint = "" if base else "; give its folder or hub id with --base"
        started = _causal(name, revision, kind_of_weights, f"the base model of {folder}", hint)
    if kind == "weights":
        model = _causal(str(folder), None, kind_of_weights, "the run's model", "")
    elif started is None:
        raise EvalError(f"{folder} is an adapter that names no base model; give it with --base")
    else:
        try:
            model, started = PeftModel.from_pretrained(started, str(folder)), None
        except CANNOT_LOAD as error:
            raise EvalError(
                f"the adapter in {folder} cannot be put on {name}: {_first(error)}"
            ) from None
    device = _device(recipe)
    model.to(device)
    if started is not None:
        started.to(device)
    subject = Subject(folder, kind, model, tokenizer, name, started, recipe, record)
    if record.get("status") in ("running", "prepared", "stopped"):
        subject.warnings.append(
            f"run.json says that training is {record['status']}, so this may be an unfinished model."
        )
    if subject.models == [RUN]:
        subject.warnings.append(
            "No starting model is known, so the run stands alone; --base names one."
        )
    return subject


def kind_of(folder: Path) -> str:
    """ "adapter" or "weights"; an ``EvalError`` where the folder holds neither."""
    if not folder.is_dir():
        raise EvalError(f"there is no run folder {folder}")
    if (folder / "adapter_config.json").is_file():
        if any((folder / f"adapter_model.{end}").is_file() for end in ("safetensors", "bin")):
            return "adapter"
        raise EvalError(
            f"{folder} has an adapter_config.json but no adapter_model.safetensors: its weights are missing"
        )
    if (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHTS):
        return "weights"
    raise EvalError(
        f"{folder} holds no trained model (no adapter_config.json, and no config.json with weights); expected the "
        "output_dir of a run that has ended"
    )


def _causal(path: str, revision: str | None, dtype: str, whose: str, hint: str) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
    except CANNOT_LOAD as error:
        raise EvalError(f"{whose}, {path}, cannot be loaded{hint}: {_first(error)}") from None


def _tokenizer(folder: Path, base: str | None, revision: str | None) -> PreTrainedTokenizerBase:
    own = (folder / "tokenizer_config.json").is_file()
    path = str(folder) if own else base
    if path is None:
        raise EvalError(f"{folder} has no tokenizer and names no base model; give it with --base")
    try:
        return AutoTokenizer.from_pretrained(path, revision=None if own else revision)
    except CANNOT_LOAD as error:
        raise EvalError(f"no tokenizer can be loaded from {path}: {_first(error)}") from None


def _device(recipe: dict) -> torch.device:
    training = recipe.get("training")
    stay = isinstance(training, dict) and training.get("use_cpu")
    return torch.device("cuda" if torch.cuda.is_available() and not stay else "cpu")


def _read(path: Path) -> dict:
    """A YAML or JSON file of the run; empty where there is none, an ``EvalError`` where it is broken."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EvalError(f"{path} cannot be read: {_first(error)}") from None
    return content if isinstance(content, dict) else {}


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
