"""Which of a few answers a run would give: the likelihood of each label under the model; nothing is parsed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.read import load_rows
from prefopt.data.tokenize import Encode
from prefopt.errors import DataError, UserError
from prefopt.files import write_whole
from prefopt.report.markdown import csv_text
from prefopt.use.load import (
    Source,
    check_length,
    choose_device,
    find_run,
    load_model,
    load_tokenizer,
    stop_ids,
)
from prefopt.use.questions import PLACE, Question, answer_text, read_questions
from prefopt_kernels.integrations.transformers import (
    LMHead,
    check_lm_head,
    completion_logprobs,
    lm_head_of,
    pack_completions,
)

MOST_LABELS = 64  # different answers in the training rows that are taken for labels


@dataclass(frozen=True)
class Classified:
    """Where the table was written (None: nowhere), the table, and how many of the known labels were found."""

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
    """Give each prompt of a file the label that the model finds likeliest.

    ``logp(label) = sum_t log p(token_t | prompt, tokens before)`` in nats over the label's tokens and the end of turn
    behind them, as in training, so that "computer" does not win whenever "computer science" is meant. The probability
    is that among the labels: ``exp(logp) / sum over labels of exp(logp)``.

    Args:
        run: run folder.
        file: .txt with a prompt on each line; or .jsonl, .parquet, a built folder or a hub id with a column prompt
            (text or chat messages) and perhaps completion, the right label.
        labels: at least two; the different desirable answers of the run's training rows if not given.
        out: .csv file to write.
        ask: put around each text; ``{text}`` stands for it.
        plain: leave a text as it is; otherwise it becomes a user's message where the run was trained with a chat
            template.
        split: of a folder or hub dataset.
        base: base model, instead of the one that the adapter names.
        quantization: of the base's weights, "nf4" or "none"; as in training if not given.
        batch_size: sequences (prompt and label) in one forward pass.
        device: "auto", "cpu" or "cuda".

    Returns:
        ``Classified``; the table has the columns line, label, probability, expected, and ``logp LABEL`` for each label.

    Raises:
        UserError: the run or the labels cannot be used, ``out`` is there already.
        DataError: a row that has no prompt, or a file that cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; expected at least 1")
    if ask is not None and PLACE not in ask:
        raise UserError(f"--ask is {ask!r}; expected {PLACE} in it, where the text goes")
    out = None if out is None else Path(out).expanduser()
    if out is not None and out.exists():
        raise UserError(f"--out {out} is there already; choose another file")
    device = choose_device(device)
    source = find_run(run, base)
    tokenizer = load_tokenizer(source)
    chat = bool(tokenizer.chat_template) and not plain and not source.trained_on_text
    questions = read_questions(file, split, ask, chat)
    names = _labels(source) if labels is None else _checked(labels)
    model = load_model(source, quantization=quantization, device=device)
    scorer = LabelScorer(model, tokenizer, names, source.template_kwargs, batch_size)
    scores = scorer.score(questions)  # (questions, labels)
    table = _table(questions, names, scores)
    guesses = [names[best] for best in scores.argmax(1).tolist()]
    known = [
        (question.expected, guess)
        for question, guess in zip(questions, guesses, strict=True)
        if question.expected is not None
    ]
    if out is not None:
        write_whole(out, table)
    return Classified(out, table, sum(one == guess for one, guess in known), len(known))


class LabelScorer:
    """Scores every label behind every prompt.

    Args:
        model, tokenizer: of one run; the model in eval mode.
        labels: the names, at least two.
        template_kwargs: arguments of the chat template, as in training.
        batch_size: sequences in one forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        template_kwargs: dict | None = None,
        batch_size: int = 16,
    ):
        self.model, self.tokenizer, self.labels = model, tokenizer, list(labels)
        self.template_kwargs, self.batch_size = template_kwargs or {}, batch_size
        self.stops = set(stop_ids(model, tokenizer, template_kwargs))
        try:
            self.head: LMHead = lm_head_of(model)
            check_lm_head(model, self.head)
        except ValueError as error:
            raise UserError(f"the run cannot be scored: {error}") from None

    def score(self, questions: Sequence[Question]) -> Tensor:
        """(questions, labels) fp32, nats."""
        pairs = [pair for question in questions for pair in self._encoded(question)]
        scores = torch.empty(len(pairs))
        with tqdm(total=len(questions), desc="classify", unit="row", delay=1) as bar:
            for start in range(0, len(pairs), self.batch_size):
                batch = pairs[start : start + self.batch_size]
                scores[start : start + len(batch)] = self._logps(batch)
                bar.update((start + len(batch)) // len(self.labels) - bar.n)
        return scores.view(len(questions), len(self.labels))

    def _encoded(self, question: Question) -> Iterator[tuple[list[int], list[int]]]:
        """Prompt and label as ids, label by label; what the template writes behind the end of turn is not scored."""
        chat = not isinstance(question.prompt, str)
        encode = Encode(self.tokenizer, chat, self.template_kwargs)
        answers = [[{"role": "assistant", "content": label}] if chat else label for label in self.labels]
        found = encode({"prompt": [question.prompt] * len(answers), "completion": answers})
        for prompt, answer, problem in zip(found["prompt_ids"], found["completion_ids"], found["problem"], strict=True):
            if problem:
                raise DataError(f"line {question.line}: {problem}")
            end = next((i for i, token in enumerate(answer) if token in self.stops), len(answer))
            answer = answer[: end + 1]
            check_length(self.model, len(prompt) + len(answer), f"line {question.line} has")
            yield prompt, answer

    @torch.no_grad()
    def _logps(self, batch: list[tuple[list[int], list[int]]]) -> Tensor:
        """(B,) fp32 nats, on the CPU."""
        length = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)  # behind a sequence: never looked at
        mask, scored = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(batch):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            mask[row, :end] = 1
            scored[row, len(prompt) : end] = 1
        packing = pack_completions(ids, scored)
        device = self.model.device
        found = completion_logprobs(
            self.model,
            ids.to(device),
            mask.to(device),
            type(packing)(*(tensor.to(device) for tensor in packing)),
            head=self.head,
        )
        row = torch.repeat_interleave(torch.arange(len(batch)), packing.cu_seqlens.diff())
        return torch.zeros(len(batch)).index_add_(0, row, found.logp.float().cpu())


def _labels(source: Source) -> list[str]:
    """The different desirable answers that the run was trained on."""
    path, split = source.data.get("path"), source.data.get("split")
    remedy = "name them by --labels"
    if not isinstance(path, str):
        raise UserError(f"{source.folder} has no recipe that says its training rows; {remedy}")
    try:
        loaded = load_rows(
            path,
            on_bad_row="skip",
            split=split,
            revision=source.data.get("revision"),
            **source.row_options,
        )
    except DataError as error:
        raise UserError(f"the run's labels cannot be read: {error}; {remedy}") from None
    rows = zip(loaded.rows["completion"], loaded.rows["label"], strict=True)
    names = sorted({answer_text(answer) for answer, good in rows if good} - {None})
    if not 2 <= len(names) <= MOST_LABELS:
        raise UserError(
            f"{path} has {len(names)} different desirable answers; expected 2 to {MOST_LABELS} to take them for "
            f"labels, so {remedy}"
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


def _table(questions: Sequence[Question], labels: Sequence[str], scores: Tensor) -> str:
    """CSV with a row for each question."""
    head = ["line", "label", "probability", "expected", *(f"logp {label}" for label in labels)]
    rows = []
    probabilities = scores.double().softmax(1)  # (questions, labels)
    for question, best, logps, shares in zip(
        questions,
        scores.argmax(1).tolist(),
        scores.tolist(),
        probabilities.tolist(),
        strict=True,
    ):
        rows.append(
            [
                question.line,
                labels[best],
                f"{shares[best]:.4f}",
                question.expected or "",
                *(f"{logp:.4f}" for logp in logps),
            ]
        )
    return csv_text(head, rows)
