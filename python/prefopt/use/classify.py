"""Classify prompts: the likeliest of a few labels as the answer; no text is generated or parsed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.read import load_rows
from prefopt.data.rows import TEXT
from prefopt.data.tokenize import Encode
from prefopt.errors import DataError, UserError
from prefopt.files import write_whole
from prefopt.generation import stop_ids
from prefopt.models import check_length, choose_device
from prefopt.report.markdown import csv_text
from prefopt.runs import Source, find_run, load_model, load_tokenizer
from prefopt.train.answer_logps import answer_logps
from prefopt.train.prepare import pad_token_id
from prefopt.use.questions import PLACE, Question, answer_text, read_questions

MOST_LABELS = 64  # most different answers in the training rows that are used as labels


@dataclass(frozen=True)
class Classified:
    """The file of the table, if it was written; the table; how many of the known labels were predicted."""

    path: Path | None
    table: str
    right: int
    known: int


def classify(
    run: str | Path,
    file: str | Path,
    *,
    labels: Sequence[str] | None = None,
    out: str | Path | None = None,
    ask: str | None = None,
    plain: bool = False,
    split: str | None = None,
    base: str | None = None,
    quantization: str | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> Classified:
    """Assign the likeliest label to each prompt of a file.

    ``logp(label) = sum_t log p(token_t | prompt, tokens before)`` in nats, over the label's tokens and the end of turn
    after them, as in training: so "computer" is not likelier than "computer science" because it is a prefix. The
    probability is relative to the labels: ``exp(logp) / sum over labels of exp(logp)``.

    Args:
        run: run folder.
        file: .txt with a prompt per line; or .jsonl, .parquet, a built folder or a hub id with the column prompt (text
            or chat messages) and optionally completion, the correct label.
        labels: at least two (default: the different desirable answers of the run's training rows).
        out: .csv file to write.
        ask: template of each prompt, with ``{text}`` as placeholder.
        plain: do not turn text into a user's message for a run that was trained with a chat template.
        split: of a folder or hub dataset.
        base: base model (default: the one that the adapter names).
        quantization: of the base's weights, "nf4" or "none" (default: as in training).
        batch_size: sequences (prompt and label) in a forward pass.
        device: "auto", "cpu" or "cuda".

    Returns:
        ``Classified``; the table has the columns line, label, probability, expected, and ``logp LABEL`` for each label.

    Raises:
        UserError: the run or the labels cannot be used, or ``out`` exists.
        DataError: a row without a prompt, or a file that cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; expected at least 1")
    if ask is not None and PLACE not in ask:
        raise UserError(f"--ask is {ask!r}; expected {PLACE} in it, where the text goes")
    out = None if out is None else Path(out).expanduser()
    if out is not None and out.exists():
        raise UserError(f"--out {out} exists; choose another file")
    device = choose_device(device)
    source = find_run(run, base)
    tokenizer = load_tokenizer(source)
    chat = bool(tokenizer.chat_template) and not plain and source.trained_format != TEXT
    questions = read_questions(file, split, ask, chat)
    names = _labels(source) if labels is None else _checked(labels)
    model = load_model(source, quantization=quantization, device=device)
    logps = label_logps(model, tokenizer, questions, names, source.template_kwargs, batch_size)
    table = _table(questions, names, logps)
    hits = [
        question.expected == names[best]
        for question, best in zip(questions, logps.argmax(1), strict=True)
        if question.expected is not None
    ]
    if out is not None:
        write_whole(out, table)
    return Classified(out, table, sum(hits), len(hits))


def label_logps(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    labels: Sequence[str],
    template_kwargs: dict | None = None,
    batch_size: int = 16,
) -> np.ndarray:
    """(questions, labels) fp64 log-probabilities of each label as the answer to each prompt, in nats.

    Args:
        model, tokenizer: of one run; the model in evaluation mode.
        labels: at least two names.
        template_kwargs: arguments of the chat template, as in training.
        batch_size: sequences in a forward pass.

    Raises:
        UserError: a prompt that is longer than the model's context, or a head that is not supported.
        DataError: a prompt that the chat template refuses.
    """
    rows = label_rows(model, tokenizer, questions, labels, template_kwargs or {})
    pad = pad_token_id(tokenizer, model)
    logps = answer_logps(model, rows, pad_token_id=pad, max_length=None, batch_size=batch_size, desc="classify")
    return logps.reshape(len(questions), len(labels))


def label_rows(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    labels: Sequence[str],
    template_kwargs: dict,
) -> list[dict[str, list[int]]]:
    """Token ids of every prompt with every label, which ends with the end of turn."""
    stops, rows = set(stop_ids(model, tokenizer, template_kwargs)), []
    for question in questions:
        chat = not isinstance(question.prompt, str)
        answers = [[{"role": "assistant", "content": label}] if chat else label for label in labels]
        encoded = Encode(tokenizer, chat, template_kwargs)(
            {"prompt": [question.prompt] * len(answers), "completion": answers}
        )
        problem = next(filter(None, encoded["problem"]), None)
        if problem:
            raise DataError(f"line {question.line}: {problem}")
        for prompt, answer in zip(encoded["prompt_ids"], encoded["completion_ids"], strict=True):
            end = next((i + 1 for i, token in enumerate(answer) if token in stops), len(answer))
            check_length(model, len(prompt) + end, f"line {question.line} has")
            rows.append({"prompt_ids": prompt, "completion_ids": answer[:end]})
    return rows


def _labels(source: Source) -> list[str]:
    """The different desirable answers of the run's training rows."""
    data = source.section("data")
    path = data.get("path")
    remedy = "name them by --labels"
    if not isinstance(path, str):
        raise UserError(f"{source.folder} has no recipe with its training rows; {remedy}")
    try:
        rows_from = {"split": data.get("split"), "revision": data.get("revision")} | source.row_options
        loaded = load_rows(path, on_bad_row="skip", **rows_from)
    except DataError as error:
        raise UserError(f"the run's labels cannot be read: {error}; {remedy}") from None
    rows = zip(loaded.rows["completion"], loaded.rows["label"], strict=True)
    names = sorted({text for answer, good in rows if good and (text := answer_text(answer)) is not None})
    if not 2 <= len(names) <= MOST_LABELS:
        raise UserError(
            f"{path} has {len(names)} different desirable answers; expected 2 to {MOST_LABELS} to use them as labels: "
            f"{remedy}"
        )
    return names


def _checked(labels: Sequence[str]) -> list[str]:
    names = [label.strip() for label in labels]
    if "" in names:
        raise UserError("--labels has an empty name")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--labels has {twice!r} twice")
    if len(names) < 2:
        raise UserError(f"--labels has {len(names)} name; expected at least two, with commas")
    return names


def _table(questions: Sequence[Question], labels: Sequence[str], logps: np.ndarray) -> str:
    """CSV with a row for each question."""
    rows = []
    for question, scores in zip(questions, logps, strict=True):
        best = scores.argmax()
        probability = 1 / np.exp(scores - scores[best]).sum()
        known = [question.line, labels[best], f"{probability:.4f}", question.expected or ""]
        rows.append([*known, *(f"{logp:.4f}" for logp in scores)])
    return csv_text(["line", "label", "probability", "expected", *(f"logp {label}" for label in labels)], rows)
