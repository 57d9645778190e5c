"""The three benchmarks through lm-evaluation-harness; no other module imports it.

Its task definitions are used (prompts, few-shot examples, scoring); the questions come from the hub, or from files of
the same schema. Task data is read when a task is built, so missing data is reported before a model is loaded.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.errors import HTTPError
from torch import nn
from transformers import PreTrainedTokenizerBase

from prefopt.data.rows import RowError
from prefopt.data.sources import open_rows
from prefopt.errors import UserError, how_to_install

MMLU_MINI: dict[str, list[int]] = json.loads((Path(__file__).parent / "mmlu_mini.json").read_text(encoding="utf-8"))[
    "questions"
]
SUFFIXES = (".jsonl", ".parquet")
MC2_COLUMNS = ("question", "mc2_targets")
FEWSHOT_SEED = 1234  # the default of lm-evaluation-harness, for the prompts of published numbers


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its task in lm-evaluation-harness, and its files and columns."""

    title: str
    task: str
    folder: str  # of the task's definition within lm_eval/tasks
    n_shot: int
    metrics: tuple[str, ...]  # the usual one first
    columns: tuple[str, ...]
    splits: tuple[str, ...]  # the questions are in the last one
    hub: str


BENCHMARKS = {
    "hellaswag": Benchmark(
        "HellaSwag",
        "hellaswag",
        "hellaswag",
        10,
        ("acc_norm", "acc"),
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        ("train", "validation"),
        "Rowan/hellaswag",
    ),
    "truthfulqa_mc": Benchmark(
        "TruthfulQA MC2",
        "truthfulqa_mc2",
        "truthfulqa",
        0,
        ("acc",),
        MC2_COLUMNS,
        ("validation",),
        "truthfulqa/truthful_qa",
    ),
    "mmlu": Benchmark(
        "MMLU-mini",
        "mmlu_",  # and the subject
        "mmlu/default",
        5,
        ("acc",),
        ("question", "choices", "answer"),
        ("dev", "test"),
        "cais/mmlu",
    ),
}


@dataclass(frozen=True)
class Asked:
    """A prepared benchmark: its tasks by name, and the questions of each (None: all)."""

    benchmark: Benchmark
    tasks: dict[str, Any]
    questions: dict[str, list[int]] | None


@dataclass
class Answers:
    """Results of a model: {task: [{metrics, chance, question, prompt}]}, and the number of truncated prompts."""

    questions: dict[str, list[dict]]
    cut: int


def version() -> str:
    """Of lm-evaluation-harness; raises ``UserError`` if it is not installed."""
    return _lm_eval().__version__


def prepare(tasks_dir: Path | None, limit: int | None) -> dict[str, Asked]:
    """Read the questions of every benchmark, from the hub or from ``tasks_dir``.

    Args:
        tasks_dir: folder with ``hellaswag_train.jsonl`` and so on (docs/evaluation.md has the list); a benchmark, or a
            subject of MMLU, without files is omitted.
        limit: number of questions of each task, from the first.

    Raises:
        UserError: lm-evaluation-harness or the questions are missing, or a file has the wrong columns.
    """
    tasks_of = _found(tasks_dir) if tasks_dir else {name: None for name in BENCHMARKS}
    return {name: _asked(name, files, limit) for name, files in tasks_of.items()}


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    *,
    limit: int | None,
    batch_size: int,
) -> Answers:
    """Run a benchmark without a chat template, as is usual for base models."""
    lm_eval = _lm_eval()
    from lm_eval.models.huggingface import HFLM

    device = next(model.parameters()).device
    for task in asked.tasks.values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples for base and run
    with _quiet() as log:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(device))
        found = lm_eval.evaluate(
            lm=lm,
            task_dict={"tasks": asked.tasks, "groups": {}, "group_map": {}},
            limit=limit if asked.questions is None else None,
            samples=asked.questions,
            bootstrap_iters=0,  # computed here, from the questions
            log_samples=True,
        )
    questions = {
        task: [_question(sample, asked.benchmark) for sample in samples] for task, samples in found["samples"].items()
    }
    return Answers(questions, log.cut)


def _question(sample: Mapping[str, Any], benchmark: Benchmark) -> dict[str, Any]:
    return {
        "metrics": {name: float(sample[name]) for name in benchmark.metrics},
        "chance": _chance(sample),
        "question": sample["doc_hash"],
        "prompt": sample["prompt_hash"],
    }


def _chance(sample: Mapping[str, Any]) -> float:
    """The score of a model that prefers no answer."""
    targets = sample["doc"].get("mc2_targets")
    if targets is not None:
        return sum(targets["labels"]) / len(targets["labels"])
    return 1 / len(sample["resps"])


def _asked(name: str, files: dict[str, dict[str, str]] | None, limit: int | None) -> Asked:
    """Build the tasks; ``files`` has {subject or "": {split: file}}."""
    benchmark = BENCHMARKS[name]
    subjects = list(MMLU_MINI) if name == "mmlu" else [""]
    subjects = subjects if files is None else [one for one in subjects if one in files]
    members = []
    for subject in subjects:
        member: dict[str, Any] = {"task": benchmark.task + subject, "num_fewshot": benchmark.n_shot}
        if files is not None:
            kind = "json" if next(iter(files[subject].values())).endswith(".jsonl") else "parquet"
            member |= {
                "dataset_path": kind,
                "dataset_name": None,
                "dataset_kwargs": {"data_files": files[subject]},
            }
        members.append(member)
    tasks = _build(benchmark, members)
    if name != "mmlu":
        return Asked(benchmark, tasks, None)
    questions = {f"{benchmark.task}{one}": MMLU_MINI[one][:limit] for one in subjects}
    for task, places in questions.items():
        count = len(tasks[task].eval_docs)
        if max(places) >= count:
            raise UserError(
                f"{task} has {count} test questions, and MMLU-mini asks for number {max(places)} (from 0); expected "
                f"the whole test split of {benchmark.hub}"
            )
    return Asked(benchmark, tasks, questions)


def _build(benchmark: Benchmark, members: list[dict]) -> dict[str, Any]:
    """Build the tasks as members of a group, where changes keep the rest of a task's definition."""
    root = Path(_lm_eval().__file__).parent / "tasks"
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(root / benchmark.folder), include_defaults=False)
    try:
        with _quiet():
            return manager.load([{"group": "prefopt", "task": members}])["tasks"]
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HTTPError) as error:
        raise UserError(
            f"the questions of {benchmark.title} ({benchmark.hub}) are not here and could not be fetched; connect to "
            "the network once, or put their files into a folder and name it with --tasks-dir: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None


def _found(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """{benchmark: {subject or "": {split: file}}} of the files in a folder, checked."""
    if not folder.is_dir():
        raise UserError(f"--tasks-dir {folder} is not a folder")
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, benchmark in BENCHMARKS.items():
        for subject in MMLU_MINI if name == "mmlu" else [""]:
            stem = f"{name}_{subject}" if subject else name
            files = {split: _file(folder, f"{stem}_{split}") for split in benchmark.splits}
            there = [path for path in files.values() if path is not None]
            if not there:
                continue
            missing = [split for split, path in files.items() if path is None]
            if missing or len({path.suffix for path in there}) > 1:
                raise UserError(
                    f"{folder} has {there[0].name}; expected beside it "
                    f"{', '.join(f'{stem}_{split}' for split in benchmark.splits)}, all .jsonl or all .parquet"
                )
            for path in there:
                _check(path, benchmark.columns)
            found.setdefault(name, {})[subject] = {split: str(path) for split, path in files.items()}
    if not found:
        raise UserError(
            f"--tasks-dir {folder} has no questions; expected files such as hellaswag_train.jsonl, "
            "hellaswag_validation.jsonl, truthfulqa_mc_validation.jsonl, mmlu_anatomy_dev.jsonl and "
            "mmlu_anatomy_test.jsonl"
        )
    return found


def _file(folder: Path, stem: str) -> Path | None:
    return next((folder / f"{stem}{end}" for end in SUFFIXES if (folder / f"{stem}{end}").is_file()), None)


def _check(path: Path, columns: tuple[str, ...]) -> None:
    """Raise ``DataError`` or ``UserError`` with file and line for a row without the columns."""
    rows = 0
    for line, raw in open_rows(path, None, None, needs=columns)[1]:
        if raw is None:
            continue
        if isinstance(raw, RowError):
            raise UserError(f"{path}:{line}: {raw}")
        missing = [name for name in columns if raw.get(name) is None]
        if missing:
            raise UserError(f"{path}:{line}: field {missing[0]!r} is missing")
        rows += 1
    if not rows:
        raise UserError(f"{path} has no rows")


class _Log(logging.Handler):
    """Passes errors on, and counts the prompts that were truncated."""

    cut = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.cut += "Truncating" in record.getMessage()
        if record.levelno >= logging.ERROR and logging.lastResort is not None:
            logging.lastResort.handle(record)


@contextmanager
def _quiet() -> Iterator[_Log]:
    """Suppress log messages of lm-evaluation-harness except errors."""
    log, logger = _Log(), logging.getLogger("lm_eval")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(log)
    try:
        yield log
    finally:
        logger.removeHandler(log)
        logger.propagate = propagates


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(
            f"the suite benchmarks needs lm-evaluation-harness, which cannot be imported ({error}); "
            f"{how_to_install('eval')}"
        ) from None
    return lm_eval
