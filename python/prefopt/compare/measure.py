"""One run of one method: trained, timed and evaluated."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from prefopt.compare.plan import WARMUP, Plan, recipe_of
from prefopt.compare.rows import held_out_of, load, rows_of, sequences_of_steps
from prefopt.evaluate.preference import evaluate
from prefopt.evaluate.request import EvalRequest
from prefopt.evaluate.results import plain
from prefopt.evaluate.subject import Subject
from prefopt.models import device_name
from prefopt.recipe.memory import NAME as MEMORY
from prefopt.recipe.memory import measured
from prefopt.recipe.models import load_model, load_tokenizer
from prefopt.recipe.run import make_trainer, preference_config
from prefopt.train import NonFiniteError, PreferenceTrainer
from prefopt.train.methods import METHODS, PAIRS
from prefopt.train.run_folder import versions


@dataclass(frozen=True)
class Job:
    """One run: the common plan, its method and seed, and the folder of its metrics."""

    plan: Plan
    method: str
    seed: int
    folder: Path


def measure(job: Job, on_step: Callable[[], object]) -> dict[str, Any]:
    """Train and evaluate.

    Returns:
        The run as in compare.json: settings, ``step_ms`` of the timed steps, ``tokens`` and ``sequences`` in them,
        ``peak_bytes``, ``losses`` (first, last) and ``scores``; or ``stopped``, the reason why training did not finish.
    """
    plan, method = job.plan, job.method
    about: dict[str, Any] = {"method": method, "seed": job.seed, "steps": plan.steps, "versions": versions()}
    recipe = recipe_of(plan, method, job.seed, job.folder)
    config = preference_config(recipe)
    tokenizer = load_tokenizer(recipe)
    rows = load(plan.recipe, plan.methods, tokenizer)
    window = plan.sequences * recipe.training.gradient_accumulation_steps
    train = rows_of(method, rows.train, job.seed, window)
    trainer = make_trainer(recipe, config, tokenizer, train, None)
    trainer.remove_callback(PrinterCallback)
    clock = _Clock(on_step)
    trainer.add_callback(clock)
    about |= {"device": device_name(config.device.type), "threads": torch.get_num_threads()}
    try:
        with measured(job.folder, config.device, writes=True):
            trainer.train()
    except (NonFiniteError, torch.OutOfMemoryError) as error:
        return about | {"stopped": str(error).splitlines()[0]}
    memory = json.loads((job.folder / MEMORY).read_text(encoding="utf-8"))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = [entry["num_tokens"] for entry in logs]
    batch, accumulation = plan.batch(method), recipe.training.gradient_accumulation_steps
    seen = sequences_of_steps(len(train.dataset), batch, accumulation, plan.steps)
    halves = 2 if METHODS[method].data == PAIRS else 1
    trained = about | {
        "step_ms": [1000 * one for one in clock.seconds[WARMUP:]],
        "train_s": sum(clock.seconds),
        "tokens": tokens[-1] - tokens[WARMUP - 1] if plan.timed else 0,
        "tokens_in_all": tokens[-1],
        "sequences": halves * sum(seen[WARMUP:]),
        "sequences_in_all": halves * sum(seen),
        "peak_bytes": memory["peak_bytes"],
        "peak": f"{memory['what']} since {memory['peak_since']}",
        "losses": _ends([entry["loss"] for entry in logs]),
    }
    subject = _subject(job, trainer, tokenizer)
    request = EvalRequest(
        run=job.folder,
        suite="preference",
        batch_size=recipe.training.per_device_eval_batch_size,
        seed=plan.recipe.training.seed,
    )
    results = evaluate(subject, held_out_of(rows.held_out), request)
    return trained | {"scores": [plain(score.as_dict()) for score in results.scores]}


class _Clock(TrainerCallback):
    """Times each step from the end of the last one, with making its batches and without logging."""

    def __init__(self, on_step: Callable[[], object]) -> None:
        self.on_step = on_step
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    on_log = on_train_begin

    def on_step_end(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        self.on_step()
        self.began = time.perf_counter()


def _ends(losses: list[float]) -> list[float]:
    """Means of the first and of the last tenth."""
    tenth = max(1, len(losses) // 10)
    return [statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])]


def _subject(job: Job, trainer: PreferenceTrainer, tokenizer: PreTrainedTokenizerBase) -> Subject:
    """The trained model and its base, evaluated with the recipe's own beta for every method."""
    recipe = job.plan.recipe
    # without the wrapper of mixed precision, which the base model does not have either
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    base = None
    if recipe.lora is None:
        base = load_model(recipe)
        torch.nn.Module.to(base, trainer.args.device)
    return Subject(
        folder=job.folder,
        kind="weights" if base is not None else "adapter",
        model=model,
        tokenizer=tokenizer,
        base_name=recipe.model.path,
        base=base,
        recipe={"loss": asdict(recipe.loss), "training": {"backend": recipe.training.backend}},
    )
