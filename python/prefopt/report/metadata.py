"""The card's metadata, made and written by huggingface_hub: only what is known, and never a local path."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from prefopt.report.facts import hub_id
from prefopt.report.read import Run
from prefopt.report.score import RUN, Score, Suite

TASK_TYPES = {"classify": "text-classification"}  # of the other suites "text-generation"


def metadata(run: Run) -> ModelCardData:
    """Base model, data, library, tags and, as model-index, the trained model's own scores. No license is guessed.

    Scores of the base model, and changes, are in the card's tables only: readers of model-index attribute every number
    in it to this model.
    """
    base = base_model(run)
    dataset = hub_id(run.option("data", "path"))
    method = run.record.get("method")
    tags = ["preference-optimization", "prefopt"]
    if isinstance(method, str):
        tags.insert(0, method.replace("_", "-"))
    if run.adapter:
        tags.append("lora")
    results = [_result(suite, score) for suite in run.suites for score in suite.scores if score.model == RUN]
    relation: dict[str, Any] = {"base_model_relation": "adapter" if run.adapter else "finetune"} if base else {}
    return ModelCardData(
        model_name=title(run) if results else None,
        base_model=base,
        datasets=[dataset] if dataset else None,
        library_name="peft" if run.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        eval_results=results or None,
        **relation,
    )


def base_model(run: Run) -> str | None:
    """The hub id of the model before training; None where it is a folder."""
    named = run.adapter.get("base_model_name_or_path")
    return hub_id(named) or hub_id(run.option("model", "path"))


def title(run: Run) -> str:
    """What the run calls itself, or else its folder."""
    named = run.summary.get("title")
    return named if isinstance(named, str) else run.path.resolve().name


def _result(suite: Suite, score: Score) -> EvalResult:
    data = suite.data.get(score.task)
    data = data if isinstance(data, dict) else {}
    name = data.get("name") or score.task
    arguments = {"num_few_shot": score.n_shot, "lm_eval": suite.details.get("lm_eval")}
    if suite.settings.get("limit") is not None:
        name = f"{name}, the first {suite.settings['limit']} of each task"
    return EvalResult(
        task_type=TASK_TYPES.get(suite.name, "text-generation"),
        # rows that are not from the hub have no id there; they keep the name they were given by
        dataset_type=data.get("hub") or data.get("name") or score.task,
        dataset_name=name,
        dataset_split=data.get("split"),
        dataset_revision=data.get("revision"),
        dataset_args={key: value for key, value in arguments.items() if value is not None} or None,
        metric_type=score.metric,
        metric_name=_metric(score),
        metric_value=round(score.value, 6),
    )


def _metric(score: Score) -> str:
    """The metric with its task, unit, error, chance line and n, for which model-index has no places of their own."""
    unit = "" if score.unit == "share" else f", {score.unit}"
    error = "" if score.stderr is None else f", standard error {score.stderr:.4f}"
    chance = "" if score.chance is None else f", chance {score.chance:.4f}"
    heat = "" if score.temperature is None else f", temperature {score.temperature:g}"
    return f"{score.task}: {score.metric}{unit}{heat}{error}{chance}, n {score.n}"
