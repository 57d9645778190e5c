"""The rows of an evaluation: those of --data, or else those that the recipe held out."""

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

MAX_LENGTH = 1024  # of a run that does not record it


@dataclass(frozen=True)
class HeldOut:
    """Evaluation rows as text and as tokens, and where they are from, if known."""

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
    """Evaluation rows as text, and where they are from."""

    loaded: LoadedRows
    source: str
    split: str | None
    revision: str | None


def read_rows(run: Source, request: EvalRequest) -> Texts:
    """The first ``--limit`` rows of ``--data``, or of those that the recipe held out.

    Raises:
        UserError: there are no such rows.
        DataError: they cannot be read.
    """
    path, split, revision, fraction = _named(run, request)
    if request.data is None and is_missing(path):
        raise UserError(
            f"{run.folder} held out rows of {path}, and there is no file or folder {path}; name the rows by --data"
        )
    loaded = load_rows(path, split=split, revision=revision, **run.row_options)
    if fraction:
        loaded = split_by_group(loaded, fraction, _seed(run.recipe))[1]
    if request.limit is not None and request.limit < len(loaded.rows):
        loaded = _first(loaded, request.limit)
    return Texts(loaded, path, split, revision)


def tokenized(texts: Texts, subject: Subject) -> HeldOut:
    """Tokenize the rows as in training.

    Raises:
        DataError: no row can be used.
    """
    tokens = tokenize_rows(
        texts.loaded,
        subject.tokenizer,
        max_length=subject.option("data", "max_length", MAX_LENGTH),
        chat_template_kwargs=subject.option("data", "chat_template_kwargs"),
    )
    return HeldOut(texts.loaded, tokens, texts.source, texts.split, texts.revision)


def trained_on(recipe: dict) -> set[int]:
    """Groups of the training rows; empty if they are not local files."""
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
    """Path, split and revision of the rows, and the fraction of the prompts if it is not all of them."""
    if request.data is not None:
        return request.data, request.split, None, None
    data = run.section("data")
    if data.get("eval_path"):
        split = request.split or data.get("eval_split")
        return data["eval_path"], split, data.get("eval_revision"), None
    if data.get("eval_fraction"):
        return data["path"], data.get("split"), data.get("revision"), data["eval_fraction"]
    raise UserError(f"{run.folder} held out no rows; name a file of rows that were not trained on with --data")


def _seed(recipe: dict) -> int:
    return section(recipe, "training").get("seed", 0)


def _first(loaded: LoadedRows, limit: int) -> LoadedRows:
    """The first rows; the last pair is kept whole."""
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
