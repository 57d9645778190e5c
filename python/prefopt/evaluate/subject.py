"""The run to be judged and the model it started from, loaded from files as a user would load them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from prefopt.data.rows import TEXT
from prefopt.errors import UserError
from prefopt.options import WHOLE
from prefopt.report.score import BASE, RUN
from prefopt.use.load import (
    ADAPTER_CONFIG,
    Source,
    choose_device,
    find_run,
    load_model,
    load_tokenizer,
    load_weights,
    read_object,
    stop_ids,
    trained_format,
)


@dataclass
class Subject:
    """A run with what is needed to judge it.

    ``kind`` is "adapter" or "weights". ``base_name`` is None where no starting model is known: then only the run is
    judged.
    """

    folder: Path
    kind: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    base_name: str | None
    base: nn.Module | None  # a second model; None for an adapter, whose base is itself without it
    recipe: dict = field(default_factory=dict)  # recipe.yaml, as it is
    record: dict = field(default_factory=dict)  # run.json
    quantization: str = WHOLE  # of the base's weights, as they are judged
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

    def stop_ids(self) -> list[int]:
        """Every token that ends an answer."""
        return stop_ids(self.model, self.tokenizer, self.option("data", "chat_template_kwargs") or {})

    def option(self, section: str, name: str, default: Any = None) -> Any:
        """An option of the run's recipe, or else of the trainer's configuration in run.json.

        ``default`` is for what neither of them names; what they name as null is None.
        """
        places = (self.recipe.get(section), self.record.get("config"))
        said = [one[name] for one in places if isinstance(one, dict) and name in one]
        return next((one for one in said if one is not None), None if said else default)

    def other_format(self, chat: bool) -> list[str]:
        """A warning if the evaluation rows and the training rows are not both chat messages or both text."""
        trained = trained_format(self.record)
        if trained is None or (trained == TEXT) is not chat:
            return []
        names = ("chat messages", "plain text")
        there, here = names if chat else names[::-1]
        return [f"The run was trained on {here}, and these rows are {there}: the prompts look different to it."]

    def about(self) -> dict:
        """For eval.json; no local path but the base's, which is the user's own name for it."""
        return {
            "kind": self.kind,
            "base": self.base_name,
            "method": self.record.get("method"),
            "quantization": self.quantization,
        }


def find_subject(folder: Path, base: str | None = None) -> Source:
    """What the folder says about its model, without loading anything.

    Raises:
        UserError: there is no model in the folder, or its base is not where it is said to be.
    """
    try:
        return find_run(folder, base if (folder / ADAPTER_CONFIG).is_file() else None)
    except UserError as error:
        raise UserError(str(error)) from None


def load_subject(folder: Path, base: str | None = None, quantization: str | None = None) -> Subject:
    """Load run and base.

    Args:
        folder: of a run, or of any saved adapter or model.
        base: folder or hub id of the starting model, where it is not what the run says or the run does not say.
        quantization: of the base's weights, "nf4" or "none"; as in training if not given.

    Raises:
        UserError: there is no model in the folder, or one of the two cannot be loaded.
    """
    source = find_subject(folder, base)
    training = source.recipe.get("training")
    stay = isinstance(training, dict) and training.get("use_cpu")
    device = choose_device("cpu" if stay else "auto")
    try:
        record = read_object(folder / "run.json") if (folder / "run.json").is_file() else {}
        tokenizer = load_tokenizer(source)
        model = load_model(source, quantization=quantization, device=device)
    except UserError as error:
        raise UserError(str(error)) from None
    kind = "weights" if source.base is None else "adapter"
    name = base or source.started
    started = None
    if kind == "weights" and name is not None:
        revision = None if base else source.started_revision
        try:
            started = load_weights(
                str(Path(name).expanduser()),
                revision,
                source.dtype,
                trust_remote_code=source.trust_remote_code,
            )
        except UserError as error:
            raise UserError(f"the model before training: {error}; name it with --base") from None
        started.to(device)
    subject = Subject(
        folder,
        kind,
        model,
        tokenizer,
        name,
        started,
        source.recipe,
        record,
        quantization=quantization or source.quantization,
    )
    subject.warnings += _warnings(subject)
    return subject


def _warnings(subject: Subject) -> list[str]:
    found = []
    status = subject.record.get("status")
    if status in ("running", "prepared", "stopped"):
        found.append(f"run.json says that training is {status}, so this may be an unfinished model.")
    if subject.models == [RUN]:
        found.append("No starting model is known, so the run stands alone; --base names one.")
    trained = subject.option("model", "quantization") or WHOLE
    names = {"nf4": "in 4 bits (NF4)", WHOLE: "that were not quantised"}
    if trained in names and trained != subject.quantization:
        found.append(
            f"The run was trained on weights {names[trained]} and is evaluated on weights "
            f"{names[subject.quantization]}."
        )
    return found
