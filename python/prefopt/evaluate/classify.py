"""The suite classify: which of 14 fields a question belongs to.

Two predictions of each model: the likeliest name as the whole answer, including the end of turn; and the name in the
greedy answer, found by ``name_in``. A generated answer without a name is wrong.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.data.build.convert.answer import Dropped
from prefopt.data.build.convert.mmlu_pro import CATEGORIES, NEEDS, convert
from prefopt.data.read import LoadedRows, load_rows
from prefopt.data.rows import RowError
from prefopt.data.sources import open_rows
from prefopt.data.tokenize import Encode
from prefopt.errors import DataError
from prefopt.evaluate.answers import name_in
from prefopt.evaluate.request import EvalRequest
from prefopt.evaluate.results import Results, asked_on
from prefopt.evaluate.scores import share, share_change
from prefopt.evaluate.subject import Subject
from prefopt.report.score import BASE, RUN, Score

NAMES = CATEGORIES
NONE = "no name"  # class of a generated answer without a name
TASK = "classification"
LIKELIHOOD, GENERATED = "likelihood", "generated"
SPLIT = "test"  # default of a built folder
ROOM = 8  # tokens to generate beyond the longest name
SAMPLES = 20  # generated answers in eval.json


@dataclass(frozen=True)
class Questions:
    """Prompts (text or chat messages), and the index in ``NAMES`` of the correct name of each.

    ``lead`` is the whitespace that completions of text begin with.
    """

    prompts: list
    right: np.ndarray  # (n,) int64
    chat: bool
    lead: str
    name: str
    split: str | None = None


def read_questions(request: EvalRequest, row_options: dict | None = None) -> Questions:
    """The rows of ``--data``: the published schema of MMLU-Pro, or rows whose completion is one of the names.

    Args:
        request: names the rows.
        row_options: arguments of ``load_rows`` for rows that are not of the published schema.

    Raises:
        DataError: rows of another schema, or that cannot be used.
    """
    source, split = request.data, request.split
    assert source is not None
    if _is_published(source):
        loaded = load_rows(_converted(source, request))
    else:
        split = split or (SPLIT if Path(source).is_dir() else None)
        loaded = load_rows(source, split=split, **(row_options or {}))
    questions = replace(_questions(loaded, source), split=split)
    if request.limit is not None:
        questions = replace(
            questions,
            prompts=questions.prompts[: request.limit],
            right=questions.right[: request.limit],
        )
    return questions


def evaluate(subject: Subject, questions: Questions, request: EvalRequest) -> Results:
    """Accuracies of base and run; ``details`` has a table by field and confusion matrices."""
    found = {who: _predictions(subject, who, questions, request) for who in subject.models}
    data = {TASK: asked_on(questions.name, questions.split)}
    results = replace(judged(questions.right, found), data=data)
    results.warnings[:0] = subject.other_format(questions.chat)
    return results


def judged(right: np.ndarray, found: dict[str, dict[str, Any]]) -> Results:
    """Scores of {base or run: {likelihood: (n,), generated: (n,), texts}}, where ``len(NAMES)`` stands for no name."""
    scores: list[Score] = []
    chance = 1 / len(NAMES)
    for way in (LIKELIHOOD, GENERATED):
        hits = {who: (one[way] == right).astype(float).tolist() for who, one in found.items()}
        labels = {"task": TASK, "metric": f"accuracy, {way}"}
        scores += [share(one, model=who, chance=chance, **labels) for who, one in hits.items()]
        if BASE in hits:
            scores.append(share_change(hits[BASE], hits[RUN], **labels))
    counts = np.bincount(right, minlength=len(NAMES))
    details = {
        "names": [*NAMES, NONE],
        "categories": _by_category(right, found),
        "confusion": {
            who: {way: _confusion(right, one[way]).tolist() for way in (LIKELIHOOD, GENERATED)}
            for who, one in found.items()
        },
        "samples": [
            {"right": NAMES[place], **{who: one["texts"][number] for who, one in found.items()}}
            for number, place in enumerate(right[:SAMPLES])
        ],
    }
    how = [
        "Likelihood: of the 14 names, the one whose tokens with the end of turn are likeliest after the question. "
        "Generated: the likeliest tokens one by one, read as the longest name they begin with. Chance is one guess in "
        f"14; always saying {NAMES[counts.argmax()]} would score {counts.max() / len(right):.3f} here."
    ]
    silent = {who: float((one[GENERATED] == len(NAMES)).mean()) for who, one in found.items()}
    details["generated_without_a_name"] = silent
    warnings = []
    if silent[RUN] > 0.05:
        warnings.append(f"{100 * silent[RUN]:.1f} % of the run's generated answers give none of the names.")
    absent = [name for name, count in zip(NAMES, counts, strict=True) if not count]
    if absent:
        warnings.append(f"There are no questions of {', '.join(absent)}.")
    return Results(scores, how, warnings, details)


def _by_category(right: np.ndarray, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each field that occurs: its number of questions, and each accuracy."""
    table = []
    for place, name in enumerate(NAMES):
        here = right == place
        if not here.any():
            continue
        row: dict[str, Any] = {"category": name, "n": int(here.sum())}
        for who, one in found.items():
            for way in (LIKELIHOOD, GENERATED):
                row[f"{who}, {way}"] = float((one[way][here] == place).mean())
        table.append(row)
    return table


def _confusion(right: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(14, 15) counts, correct name by predicted name; the last column is no name."""
    width = len(NAMES) + 1
    return np.bincount(right * width + predicted, minlength=len(NAMES) * width).reshape(-1, width)


def _predictions(subject: Subject, who: str, questions: Questions, request: EvalRequest) -> dict[str, Any]:
    encode, batch_size = subject.encode(questions.chat), request.batch_size
    options = _options(encode, questions)
    prompts = encode.ids([encode.texts(prompt, _completion(questions, ""))[0] for prompt in questions.prompts])
    longest = max(len(row["completion_ids"]) for row in options)
    # max_length None: truncation would remove the name
    logps = subject.logps(who, options, max_length=None, batch_size=batch_size, desc=f"likelihoods, {who}")
    most = request.max_new_tokens or longest + ROOM
    answers = subject.generate(who, prompts, max_new_tokens=most, batch_size=batch_size, temperature=None)
    texts = subject.tokenizer.batch_decode(answers, skip_special_tokens=True)
    named = [name_in(text, NAMES) for text in texts]
    return {
        LIKELIHOOD: logps.reshape(-1, len(NAMES)).argmax(1),
        GENERATED: np.array([len(NAMES) if name is None else NAMES.index(name) for name in named]),
        "texts": [text.strip() for text in texts],
    }


def _options(encode: Encode, questions: Questions) -> list[dict]:
    """Every question with every name as its answer."""
    batch: dict[str, list] = {"prompt": [], "completion": []}
    for prompt in questions.prompts:
        for name in NAMES:
            batch["prompt"].append(prompt)
            batch["completion"].append(_completion(questions, name))
    encoded = encode(batch)
    problem = next((problem for problem in encoded["problem"] if problem), None)
    if problem:
        raise DataError(f"{questions.name}: {problem}")
    pairs = zip(encoded["prompt_ids"], encoded["completion_ids"], strict=True)
    return [{"prompt_ids": prompt, "completion_ids": answer} for prompt, answer in pairs]


def _completion(questions: Questions, name: str) -> Any:
    """A name as a completion."""
    if questions.chat:
        return [{"role": "assistant", "content": name}]
    return questions.lead + name


def _questions(loaded: LoadedRows, source: str) -> Questions:
    right, lead = [], ""
    for line, completion in zip(loaded.rows["line"], loaded.rows["completion"], strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        if text.strip() not in NAMES:
            raise DataError(f"{source}:{line}: completion is {text.strip()!r:.60}; expected one of {', '.join(NAMES)}")
        right.append(NAMES.index(text.strip()))
        lead = text[: len(text) - len(text.lstrip())]
    prompts = list(loaded.rows["prompt"])
    return Questions(prompts, np.array(right), loaded.conversational, lead, source)


def _is_published(source: str) -> bool:
    """Whether the first row has the columns of MMLU-Pro."""
    path = Path(source).expanduser()
    if path.is_dir() or not path.exists():
        return False
    first = next((raw for _, raw in islice(open_rows(source, None, None, needs=())[1], 1)), None)
    return isinstance(first, dict) and {"question", "category"} <= first.keys()


def _converted(source: str, request: EvalRequest) -> list[dict]:
    """MMLU-Pro's rows as prompts with a name, without repeated questions."""
    raws = open_rows(source, request.split, None, needs=NEEDS)[1]
    good = []

    def present() -> Iterator[tuple[int, Mapping]]:
        for line, raw in raws:
            if isinstance(raw, RowError):
                raise DataError(f"{source}:{line}: {raw}")
            if raw is not None:
                yield line, raw

    for line, outcome in convert(present()):
        if isinstance(outcome, RowError):
            raise DataError(f"{source}:{line}: {outcome}")
        if not isinstance(outcome, Dropped):
            good += [{"prompt": one.prompt, "completion": one.completion, "label": True} for one in outcome]
    return good
