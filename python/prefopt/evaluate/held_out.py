"""The rows that a run is judged on: those that it is given, or else those that its recipe set aside."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from prefopt.data.read import LoadedRows, load_rows, split_by_group
from prefopt.data.tokenize import Tokenized, tokenize_rows
from prefopt.errors import UserError
from prefopt.evaluate.request import EvalRequest
from prefopt.evaluate.subject import Subject
from prefopt.paths import is_missing
from prefopt.runs import Source, section

MAX_LENGTH = 1024  # where the run does not say another


@dataclass(frozen=True)
class HeldOut:
    """Rows to be judged on, in text and in tokens; and what they were asked for as, where they were."""

    loaded: LoadedRows
    tokens: Tokenized
    source: str | None = None
    split: str | None = None
    revision: str | None = None

    @property
    def rows(self) -> Dataset:
        """Token ids, label and group of each."""
        return self.tokens.dataset


class Texts(NamedTuple):
    """Rows in text, and what they were asked for as."""

    loaded: LoadedRows
    source: str
    split: str | None
    revision: str | None


def read_rows(run: Source, request: EvalRequest) -> Texts:
    """The rows of ``--data``, or else those that the run's recipe set aside; the first ``--limit`` of them.

    Raises:
        UserError: neither names rows.
        DataError: they cannot be read.
    """
    path, split, revision, fraction = _named(run, request)
    if request.data is None and is_missing(path):
        raise UserError(
            f"{run.folder} sets aside rows of {path}, and there is no file or folder {path}; name the rows by --data"
        )
    loaded = load_rows(path, split=split, revision=revision, **run.row_options)
    if fraction:
        loaded = split_by_group(loaded, fraction, _seed(run.recipe))[1]
    if request.limit is not None and request.limit < len(loaded.rows):
        loaded = _first(loaded, request.limit)
    return Texts(loaded, path, split, revision)


def tokenized(texts: Texts, subject: Subject) -> HeldOut:
    """The rows as the run was trained to read them.

    Raises:
        DataError: none of them can be used.
    """
    tokens = tokenize_rows(
        texts.loaded,
        subject.tokenizer,
        max_length=subject.option("data", "max_length", MAX_LENGTH),
        chat_template_kwargs=subject.option("data", "chat_template_kwargs"),
    )
    return HeldOut(texts.loaded, tokens, texts.source, texts.split, texts.revision)


def trained_on(recipe: dict) -> set[int]:
    """Groups of the rows that a run's recipe trained on, as far as they are files here; empty where not."""
    data = section(recipe, "data")
    path = data.get("path")
    if not path or not Path(path).expanduser().exists():
        return set()
    loaded = load_rows(
        path,
        split=data.get("split"),
        on_bad_row=data.get("on_bad_row", "stop"),
        label_map=data.get("label_map"),
        as_chat=bool(data.get("as_chat")),
    )
    if data.get("eval_fraction"):
        loaded = split_by_group(loaded, data["eval_fraction"], _seed(recipe))[0]
    return set(loaded.rows["group"])


def _named(run: Source, request: EvalRequest) -> tuple[str, str | None, str | None, float | None]:
    """Path, split and revision of the rows, and the share of the prompts that is theirs, where they are not all."""
    if request.data is not None:
        return request.data, request.split, None, None
    data = run.section("data")
    if data.get("eval_path"):
        split = request.split or data.get("eval_split")
        return data["eval_path"], split, data.get("eval_revision"), None
    if data.get("eval_fraction"):
        return data["path"], data.get("split"), data.get("revision"), data["eval_fraction"]
    raise UserError(f"{run.folder} set no rows aside; name a file of rows that were not trained on with --data")


def _seed(recipe: dict) -> int:
    return section(recipe, "training").get("seed", 0)


def _first(loaded: LoadedRows, limit: int) -> LoadedRows:
    """The first rows, of which the last pair stays whole."""
    lines = loaded.rows["line"][: limit + 1]
    limit += len(lines) > limit and lines[limit] == lines[limit - 1]
    return LoadedRows(
        loaded.rows.select(range(limit)),
        loaded.bad,
        loaded.counts,
        loaded.ignored,
        f"{loaded.fingerprint}, first {limit}",
        loaded.name,
    )
