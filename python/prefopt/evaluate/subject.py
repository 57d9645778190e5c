"""A run and its base model, loaded for an evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.rows import TEXT
from prefopt.data.tokenize import Encode
from prefopt.errors import UserError
from prefopt.generation import generate, stop_ids
from prefopt.models import choose_device, load_weights
from prefopt.options import WHOLE
from prefopt.report.score import BASE, RUN
from prefopt.runs import ADAPTER_CONFIG, Source, find_run, load_model, load_tokenizer, read_object, section
from prefopt.train.answer_logps import answer_logps
from prefopt.train.prepare import pad_token_id


@dataclass
class Subject:
    """A run and its base model.

    ``kind`` is "adapter" or "weights". ``base_name`` is None if the base is unknown; then only the run is evaluated.
    """

    folder: Path
    kind: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    base_name: str | None
    base: PreTrainedModel | None  # a second model; None for an adapter
    recipe: dict = field(default_factory=dict)  # recipe.yaml
    record: dict = field(default_factory=dict)  # run.json
    quantization: str = WHOLE  # of the base's weights in the evaluation
    warnings: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """The models that can be evaluated, base first."""
        return [RUN] if self.kind == "weights" and self.base is None else [BASE, RUN]

    @contextmanager
    def running(self, who: str) -> Iterator[PreTrainedModel | PeftModel]:
        """BASE or RUN, in evaluation mode and without gradients."""
        with torch.no_grad():
            if who == RUN:
                yield self.model.eval()
            elif self.base is not None:
                yield self.base.eval()
            else:
                with cast(PeftModel, self.model).disable_adapter():
                    yield self.model.eval()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def stop_ids(self) -> list[int]:
        """Every token that ends an answer."""
        return stop_ids(self.model, self.tokenizer, self.option("data", "chat_template_kwargs") or {})

    def option(self, section: str, name: str, default: Any = None) -> Any:
        """An option of the recipe, or else of the trainer's configuration in run.json.

        ``default`` applies only if both lack the option; null is None.
        """
        places = (self.recipe.get(section), self.record.get("config"))
        found = [one[name] for one in places if isinstance(one, dict) and name in one]
        return next((one for one in found if one is not None), None if found else default)

    def encode(self, chat: bool) -> Encode:
        """The encoder of chat messages or text, as in training."""
        return Encode(self.tokenizer, chat, dict(self.option("data", "chat_template_kwargs") or {}))

    def logps(self, who: str, rows: Sequence[Mapping], **options: Any) -> np.ndarray:
        """``answer_logps`` of rows under BASE or RUN."""
        with self.running(who) as model:
            return answer_logps(
                model,
                rows,
                pad_token_id=pad_token_id(self.tokenizer, self.model),
                backend=self.option("training", "backend") or "auto",
                **options,
            )

    def generate(self, who: str, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """Answers of BASE or RUN; see ``prefopt.generation.generate``."""
        with self.running(who) as model:
            return generate(
                model,
                prompts,
                pad_token_id=pad_token_id(self.tokenizer, self.model),
                eos_token_ids=self.stop_ids(),
                desc=f"answers, {who}",
                **options,
            )

    def other_format(self, chat: bool) -> list[str]:
        """A warning if one of evaluation rows and training rows is chat messages and the other is text."""
        trained = section(section(self.record, "data"), "train").get("format")
        if trained is None or (trained == TEXT) is not chat:
            return []
        names = ("chat messages", "plain text")
        there, here = names if chat else names[::-1]
        return [f"The run was trained on {here}, and these rows are {there}: the prompts are formatted differently."]

    def about(self) -> dict:
        """The model's entry in eval.json; its only path is the base's, as the user wrote it."""
        return {
            "kind": self.kind,
            "base": self.base_name,
            "method": self.record.get("method"),
            "quantization": self.quantization,
        }


def find_subject(folder: Path, base: str | None = None) -> Source:
    """``find_run`` of a run or of a saved model or adapter; ``base`` may also be the start of a fully trained model."""
    return find_run(folder, base if (folder / ADAPTER_CONFIG).is_file() else None)


def load_subject(folder: Path, base: str | None = None, quantization: str | None = None) -> Subject:
    """Load a run and its base model.

    Args:
        folder: of a run, or of any saved adapter or model.
        base: folder or hub id of the model before training (default: the one that the run names).
        quantization: of the base's weights, "nf4" or "none" (default: as in training).

    Raises:
        UserError: there is no model in the folder, or one of the two cannot be loaded.
    """
    source = find_subject(folder, base)
    device = choose_device("cpu" if source.section("training").get("use_cpu") else "auto")
    record = read_object(folder / "run.json") if (folder / "run.json").is_file() else {}
    tokenizer = load_tokenizer(source)
    model = load_model(source, quantization=quantization, device=device)
    name, started = base or source.started, None
    if source.base is None and name is not None:
        revision = None if base else source.started_revision
        path, trust = str(Path(name).expanduser()), source.trust_remote_code
        try:
            started = load_weights(path, source.dtype, revision=revision, trust_remote_code=trust)
        except UserError as error:
            raise UserError(f"the model before training: {error}; name it with --base") from None
        nn.Module.to(started, device)
    subject = Subject(
        folder,
        "weights" if source.base is None else "adapter",
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
        found.append("No base model is known, so only the run is evaluated; name a base by --base.")
    trained = subject.option("model", "quantization") or WHOLE
    names = {"nf4": "in 4 bits (NF4)", WHOLE: "without quantization"}
    if trained in names and trained != subject.quantization:
        found.append(
            f"The run was trained on weights {names[trained]} and is evaluated on weights "
            f"{names[subject.quantization]}."
        )
    return found
