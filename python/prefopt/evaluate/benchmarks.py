"""The suite benchmarks: base and run on the same questions, with errors and chance levels."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.evaluate.harness import (
    BENCHMARKS,
    MMLU_MINI,
    Answers,
    Asked,
    Benchmark,
    ask,
    prepare,
    version,
)
from prefopt.evaluate.request import EvalRequest
from prefopt.evaluate.results import Results
from prefopt.evaluate.scores import bootstrap, mean_of, share, share_change
from prefopt.evaluate.subject import Subject
from prefopt.files import write_whole
from prefopt.report.score import BASE, CHANGE, RUN, Score

logger = logging.getLogger(__name__)

PARTIAL_NAME = ".eval.partial.json"
METRIC_NAMES = {"truthfulqa_mc": {"acc": "mc2"}}
HOW = (
    "Through lm-evaluation-harness and its own task definitions, without a chat template. HellaSwag's usual number is "
    "acc_norm (likelihood per byte); MC2 is the probability mass on the true answers, not normalised by their length; "
    "MMLU-mini is ten fixed questions of each subject, with the five examples of the split dev before each. Chance is "
    "the score of a model that prefers no answer."
)


class Finished:
    """Finished benchmarks of an interrupted evaluation, which the same evaluation reuses."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        same = isinstance(content, dict) and content.get("key") == key
        self.units: dict[str, dict] = content["units"] if same else {}

    def add(self, unit: str, answers: Answers) -> None:
        """Keep one benchmark of one model."""
        self.units[unit] = {"questions": answers.questions, "cut": answers.cut}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps({"key": self.key, "units": self.units}))

    def get(self, unit: str) -> Answers | None:
        """The answers, if this unit was finished."""
        return Answers(**self.units[unit]) if unit in self.units else None

    def remove(self) -> None:
        """Remove the file: the evaluation is complete."""
        self.path.unlink(missing_ok=True)


def prepare_questions(request: EvalRequest) -> dict[str, Asked]:
    """Read the questions, before the models are loaded."""
    return prepare(request.tasks_dir, request.limit)


def evaluate(subject: Subject, asked: Mapping[str, Asked], request: EvalRequest) -> Results:
    """Run each benchmark on base and run; an interrupted evaluation continues after its last finished one."""
    finished = Finished(request.folder / PARTIAL_NAME, _key(subject, asked, request))
    answers: dict[str, dict[str, Answers]] = {}
    for name, one in asked.items():
        answers[name] = {}
        for who in subject.models:
            unit = f"{name} {who}"
            done = finished.get(unit)
            if done is None:
                logger.warning("%s, %s", one.benchmark.title, who)
                with subject.running(who) as model:
                    done = ask(
                        model,
                        subject.tokenizer,
                        one,
                        limit=request.limit,
                        batch_size=request.batch_size,
                    )
                finished.add(unit, done)
            else:
                logger.warning("%s, %s: as finished before the interruption", one.benchmark.title, who)
            answers[name][who] = done
    results = judged(answers, request.limit, request.seed)
    results.details["lm_eval"] = version()
    results.data = {
        details["title"]: _asked_on(BENCHMARKS[name], request.tasks_dir)
        for name, details in results.details["benchmarks"].items()
    }
    finished.remove()
    return results


def judged(answers: Mapping[str, Mapping[str, Answers]], limit: int | None, seed: int) -> Results:
    """Scores of {benchmark: {base or run: answers}}, and the sentences that belong to them."""
    scores: list[Score] = []
    warnings: list[str] = []
    details: dict[str, Any] = {"benchmarks": {}}
    for name, by_model in answers.items():
        benchmark = BENCHMARKS[name]
        rows = {who: [row for task in found.questions.values() for row in task] for who, found in by_model.items()}
        title = benchmark.title
        tasks = len(by_model[RUN].questions)
        if name == "mmlu" and tasks < len(MMLU_MINI):
            title += f" ({tasks} of {len(MMLU_MINI)} subjects)"
        for metric in benchmark.metrics:
            values = {who: [row["metrics"][metric] for row in found] for who, found in rows.items()}
            labels = {
                "task": title,
                "metric": METRIC_NAMES.get(name, {}).get(metric, metric),
                "n_shot": benchmark.n_shot,
            }
            chance = float(np.mean([row["chance"] for row in rows[RUN]]))
            scores += _scores(values, labels, chance, seed)
        cut = max(found.cut for found in by_model.values())
        if cut:
            warnings.append(
                f"{title}: {cut} prompts with their answers are longer than the model's context; their beginning was "
                "truncated."
            )
        found = _details(by_model, benchmark.metrics)
        details["benchmarks"][name] = {"title": title} | found
    if limit is not None:
        warnings.append(
            f"Only the first {limit} questions of each task were asked, so these are not "
            "comparable to published numbers."
        )
    missing = [one.title for name, one in BENCHMARKS.items() if name not in answers]
    if missing:
        warnings.append(f"No questions were given for {', '.join(missing)}.")
    return Results(scores, [HOW], warnings, details)


def _asked_on(benchmark: Benchmark, tasks_dir: Path | None) -> dict[str, str | None]:
    """The dataset on the hub, or local files of its schema."""
    name = benchmark.title if tasks_dir is None else f"{benchmark.title}, from local files"
    hub = benchmark.hub if tasks_dir is None else None
    return {"name": name, "hub": hub, "split": benchmark.splits[-1], "revision": None}


def _scores(values: dict[str, list[float]], labels: dict, chance: float, seed: int) -> list[Score]:
    """The score of each model and, if there are two, their difference."""
    binary = all(value in (0.0, 1.0) for one in values.values() for value in one)
    found = []
    for who, one in values.items():
        if binary:
            found.append(share(one, model=who, chance=chance, **labels))
        else:
            found.append(_mean(np.array(one), seed, model=who, chance=chance, **labels))
    if BASE in values and binary:
        found.append(share_change(values[BASE], values[RUN], **labels))
    elif BASE in values:
        change = np.subtract(values[RUN], values[BASE])
        found.append(_mean(change, seed, model=CHANGE, chance=0.0, **labels))
    return found


def _mean(values: np.ndarray, seed: int, **labels) -> Score:
    return bootstrap(mean_of(values), range(len(values)), seed=seed, **labels)


def _details(by_model: Mapping[str, Answers], metrics: tuple[str, ...]) -> dict[str, Any]:
    """The questions, and the first metric of each task."""
    questions = [row["question"] for task in by_model[RUN].questions.values() for row in task]
    tasks = {
        task: {
            who: float(np.mean([row["metrics"][metrics[0]] for row in found.questions[task]]))
            for who, found in by_model.items()
        }
        | {"n": len(rows)}
        for task, rows in by_model[RUN].questions.items()
    }
    return {
        "questions": len(questions),
        "questions_sha256": hashlib.sha256("".join(questions).encode()).hexdigest(),
        "tasks": tasks,
    }


def _key(subject: Subject, asked: Mapping[str, Asked], request: EvalRequest) -> str:
    """A hash of the model, the questions and the settings."""
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for pattern in ("*.safetensors", "*.bin")
        for file in sorted(subject.folder.glob(pattern))
    ]
    tasks = {name: sorted(one.tasks) for name, one in asked.items()}
    content = [version(), weights, subject.base_name, tasks, str(request.tasks_dir), request.limit]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
