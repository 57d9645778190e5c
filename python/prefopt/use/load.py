"""A run folder turned back into tokenizer and model, for eval, chat, classify, export and benchmarks.inference."""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import get_last_checkpoint

from prefopt.data.rows import TEXT
from prefopt.data.template import render
from prefopt.errors import UserError, first_line
from prefopt.four_bits import (
    check_blocks,
    compute_dtype,
    quantization_options,
    refuse_without_bitsandbytes,
)
from prefopt.options import QUANTIZATIONS, WHOLE
from prefopt.paths import RECIPE_NAME, is_path, path_from, paths_from
from prefopt.pretrained import from_pretrained
from prefopt.read_yaml import read_yaml
from prefopt.use.adapter import vocabulary_rows
from prefopt_kernels.info import cpu

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Source:
    """What a run folder says about its model.

    ``base`` is None where the folder holds all the weights itself; ``started`` is what the recipe says those began as.
    """

    folder: Path
    base: str | None = None
    revision: str | None = None
    adapter: dict = field(default_factory=dict)  # adapter_config.json
    dtype: str = "auto"  # that of training
    template_kwargs: dict = field(default_factory=dict)  # of the chat template, as in training
    recipe: dict = field(default_factory=dict)  # recipe.yaml, its paths as they are now
    record: dict = field(default_factory=dict)  # run.json, as it is

    @property
    def row_options(self) -> dict:
        """Arguments of ``load_rows`` that read rows as the run's own were read."""
        return {"label_map": self.data.get("label_map"), "as_chat": bool(self.data.get("as_chat"))}

    @property
    def trained_on_text(self) -> bool:
        """Whether the rows were plain text; a run that does not record it may have had chat messages."""
        return trained_format(self.record) == TEXT

    @property
    def data(self) -> dict:
        """The recipe's section of that name."""
        return section(self.recipe, "data")

    @property
    def started(self) -> str | None:
        """Folder or hub id of the model before training; None where nothing says it."""
        return self.base or section(self.recipe, "model").get("path")

    @property
    def started_revision(self) -> str | None:
        """Of ``started``, on the hub."""
        recipe = section(self.recipe, "model")
        return recipe.get("revision") if self.base is None else self.revision

    @property
    def trust_remote_code(self) -> bool:
        """Whether the recipe allows Python code that comes with the model."""
        return section(self.recipe, "model").get("trust_remote_code") is True

    @property
    def quantization(self) -> str:
        """Of the weights under the adapter in training."""
        said = section(self.recipe, "model").get("quantization")
        return said if self.base is not None and said in QUANTIZATIONS else WHOLE

    @property
    def weights(self) -> str:
        """Where the weights under the adapter are, or all of them."""
        return str(self.folder) if self.base is None else self.base


def find_run(run: str | Path, base: str | None = None) -> Source:
    """Look into a run folder (or a checkpoint, or a model's folder) without loading anything.

    Args:
        run: the folder.
        base: folder or hub id of the base model, instead of the one that the adapter names.

    Raises:
        UserError: there is no trained model in it, or the base model is said to be in a folder that is not there.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    stored, home = stored_recipe(folder)
    recipe = paths_from(stored, home)
    model = section(recipe, "model")
    kwargs = section(recipe, "data").get("chat_template_kwargs")
    said = {
        "dtype": model["dtype"] if isinstance(model.get("dtype"), str) else "auto",
        "template_kwargs": kwargs if isinstance(kwargs, dict) else {},
        "recipe": recipe,
        "record": _record(folder),
    }
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = read_object(folder / ADAPTER_CONFIG)
        if not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
            raise UserError(f"{folder} has an {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS[0]}")
        named = base_of(adapter, stored, home) or model.get("path")
        revision = adapter.get("revision") or model.get("revision") if base is None else None
        return Source(folder, _located(base or named, folder), revision, adapter, **said)
    if (folder / "config.json").is_file():
        if base is not None:
            raise UserError(f"--base is {base}, but {folder} holds all the weights; leave it out")
        return Source(folder, **said)
    raise UserError(f"{folder} holds no trained model{_hint(folder)}")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The run's own tokenizer, with its chat template; that of the base model where the run saved none."""
    own = (source.folder / "tokenizer_config.json").is_file()
    path, revision = str(source.folder), None
    if not own and source.started is not None:
        path, revision = source.started, source.started_revision
    failure = f"cannot load a tokenizer from {path}"
    options = {"revision": revision, "trust_remote_code": source.trust_remote_code}
    return from_pretrained(AutoTokenizer, path, failure, **options)


def load_model(
    source: Source,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    device: str = "cpu",
) -> PreTrainedModel | PeftModel:
    """The trained model in eval mode, its adapter (if it has one) applied beside the base's weights.

    Args:
        source: of ``find_run``.
        dtype: "float32", "bfloat16", "float16" or "auto"; as in training if not given.
        quantization: of the base's weights, "nf4" or "none"; as in training if not given.
        device: of ``choose_device``.

    Raises:
        UserError: the base or the adapter cannot be loaded, or not in 4 bits.
    """
    name = source.dtype if dtype is None else dtype
    kind = quantization or source.quantization
    if kind not in QUANTIZATIONS:
        raise UserError(f"quantization is {kind!r}; expected {' or '.join(QUANTIZATIONS)}")
    options = {} if kind == WHOLE else _four_bits(source, name, device, kind, quantization)
    options["trust_remote_code"] = source.trust_remote_code
    try:
        model = load_weights(source.weights, source.revision, name, **options)
    except UserError as error:
        if source.base is None:
            raise
        raise UserError(
            f"the base model of {source.folder}: {error}; name another folder or hub id with --base"
        ) from None
    if source.base is not None:
        model = apply_adapter(model, source.folder, source.base)
    return (model.to(device) if kind == WHOLE else model).eval()


def apply_adapter(model: PreTrainedModel, folder: Path, base: str) -> PeftModel:
    """The model with the adapter of a folder beside its weights.

    Args:
        model: the base model.
        folder: of the adapter.
        base: names the base model in messages.

    Raises:
        UserError: the adapter does not fit.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    try:
        with warnings.catch_warnings():
            # peft asks transformers for an attribute by its former name; nothing a user could act on
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        trained = None if isinstance(error, SafetensorError) else vocabulary_rows(folder)
        if trained not in (None, rows):
            raise UserError(
                f"the adapter in {folder} was trained on a vocabulary of {trained} rows, and the base model {base} has "
                f"{rows}: "
                f"resize the base as in training (model.resize_token_embeddings({trained})), save it, and name it by "
                "--base"
            ) from None
        raise UserError(f"the adapter in {folder} does not fit the base model {base}: {first_line(error)}") from None


def load_weights(path: str, revision: str | None, dtype: str, **options: Any) -> PreTrainedModel:
    """A causal language model from a folder or the hub, in eval mode.

    Args:
        path, revision: where it is.
        dtype: the name of one of torch's, or "auto".
        options: passed to ``from_pretrained``, such as ``trust_remote_code``.

    Raises:
        UserError: it cannot be loaded.
    """
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    failure = f"cannot load a causal language model from {path}"
    options |= {"revision": revision, "dtype": kind}
    return from_pretrained(AutoModelForCausalLM, path, failure, **options).eval()


def device_name(device: str) -> str:
    """The model name of the GPU or the processor, as the system reports it."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({cpu()[0]})"


def choose_device(name: str) -> str:
    """ "cuda" or "cpu" for "auto"; a named device that is not there is refused.

    Example:
        >>> choose_device("cpu")
        'cpu'
    """
    found = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if found else "cpu"
    if name == "cuda" and not found:
        raise UserError("--device is cuda, but torch sees no GPU; expected auto or cpu")
    return name


def stop_ids(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict | None = None,
) -> list[int]:
    """Tokens that end an answer: those of the generation config, the tokenizer's EOS, and the template's end of turn.

    A base model that was trained with a chat template ends its turns with a token that its generation config does not
    name; without it, it would go on and write the user's next question.
    """
    named = model.generation_config.eos_token_id
    found = [named] if isinstance(named, int) else list(named or [])
    found += [tokenizer.eos_token_id, end_of_turn(tokenizer, template_kwargs)]
    return sorted({token for token in found if token is not None})


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None) -> int | None:
    """The special token that the chat template writes behind an answer; None without a template."""
    if not tokenizer.chat_template:
        return None
    mark = "ANSWER"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        text = render(tokenizer, messages, template_kwargs)
    except UserError as error:
        raise UserError(str(error)) from None
    behind = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in behind if token in special), None)


def check_length(model: PreTrainedModel | PeftModel, tokens: int, what: str) -> None:
    """Refuse a text that is longer than the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise UserError(f"{what} {tokens:,} tokens, and the model takes {limit:,}")


def read_object(path: Path) -> dict:
    """A JSON object from a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _four_bits(source: Source, dtype: str, device: str, kind: str, asked: str | None) -> dict:
    """Arguments of ``from_pretrained`` for the base in 4 bits, multiplied as in training."""
    key = f"--quantization is {kind}" if asked else f"{source.folder} was trained on a base in {kind}"
    if source.base is None:
        raise UserError(
            f"{key}, but {source.folder} holds all the weights; expected a run with an adapter, or --quantization "
            f"{WHOLE}"
        )
    try:
        refuse_without_bitsandbytes(key)
    except UserError as error:
        raise UserError(f"{error}; or give --quantization {WHOLE}") from None
    if device == "cpu":
        check_blocks(
            source.weights,
            key,
            f"--quantization {WHOLE}",
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
    compute = compute_dtype(section(source.recipe, "training"), dtype)
    return quantization_options(getattr(torch, compute), device)


def _located(named: str | None, folder: Path) -> str:
    """A base model's folder or hub id."""
    if not named:
        raise UserError(f"the adapter in {folder} does not name its base model; name it by --base")
    path = Path(named).expanduser()
    if path.is_dir():
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


def base_of(adapter: dict, stored: dict, home: Path) -> str | None:
    """The base model that an adapter names: a hub id, or the path where it is now; see ``stored_recipe``."""
    named = adapter.get("base_model_name_or_path")
    if named is not None and not isinstance(named, str):
        raise UserError(f"{ADAPTER_CONFIG} names the base model {named!r}; expected text")
    return path_from(named, section(stored, "training").get("output_dir"), home) if named else None


def _run_folders(folder: Path) -> list[Path]:
    """The folder, and the run that it is a checkpoint of."""
    return [folder, folder.absolute().parent] if folder.name.startswith("checkpoint-") else [folder]


def _record(folder: Path) -> dict:
    """run.json of the folder, or of the run that the folder is a checkpoint of; {} if there is none."""
    path = next((one for place in _run_folders(folder) if (one := place / "run.json").is_file()), None)
    try:
        return {} if path is None else read_object(path)
    except UserError:  # a broken file costs what it records, and not the model beside it
        return {}


def trained_format(record: dict) -> str | None:
    """The form of a run's training rows, CHAT or TEXT, from its run.json; None where it is not recorded."""
    return section(section(record, "data"), "train").get("format")


def stored_recipe(folder: Path) -> tuple[dict, Path]:
    """recipe.yaml of the folder, or of the run whose checkpoint it is, and its folder; {} if there is none."""
    for place in _run_folders(folder):
        try:
            content = read_yaml(place / RECIPE_NAME)
        except FileNotFoundError:
            continue
        except UserError as error:
            raise UserError(str(error)) from None
        return (content, place) if isinstance(content, dict) else ({}, folder)
    return {}, folder


def section(recipe: dict, name: str) -> dict:
    """A section of a recipe.yaml as it is; empty where it has none."""
    content = recipe.get(name)
    return content if isinstance(content, dict) else {}
