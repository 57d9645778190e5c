"""A comparison from request to report: checks, then the runs in turn, each stored as soon as it is done."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prefopt.compare.measure import Job
from prefopt.compare.plan import Plan, loss_of, recipe_of, sequences_of, settings_of, steps_of
from prefopt.compare.report import OUTPUTS, write_report
from prefopt.compare.request import CompareRequest
from prefopt.compare.rows import Rows, load
from prefopt.compare.subprocess_run import run_in_subprocess
from prefopt.errors import UserError
from prefopt.files import is_unused, only_writer, write_whole
from prefopt.recipe.models import load_tokenizer
from prefopt.recipe.ready import check_device, check_inputs
from prefopt.recipe.run import preference_config
from prefopt.recipe.schema import Recipe

JSON_NAME, FORMAT = "compare.json", 1


def run(recipe: Recipe, request: CompareRequest) -> Path:
    """Carry out the missing runs, print the tables, and write compare.json, compare.csv, compare.md, plots and page.

    Args:
        recipe: from ``load_recipe``; its ``training.output_dir`` is not used.
        request: what to compare.

    Returns:
        Path of report.html.

    Raises:
        UserError: options that do not fit a method, a folder in use, a run that failed.
        DataError: rows that cannot be used, or do not suit a method.
        KeyboardInterrupt: finished runs are kept; a second start continues.
    """
    sequences = sequences_of(recipe, request.methods)
    draft = Plan(recipe, request.methods, sequences, max(1, recipe.training.max_steps))
    for method in request.methods:
        config = preference_config(recipe_of(draft, method, recipe.training.seed, request.out))
        check_device(recipe, config)
    check_inputs(recipe, request.out)
    with only_writer(request.out, "--out"):
        return _run(draft, request)


def _run(draft: Plan, request: CompareRequest) -> Path:
    recipe = draft.recipe
    found = _found(request.out)
    rows = load(recipe, request.methods, load_tokenizer(recipe))
    batch = draft.sequences // 2 if rows.are_pairs else draft.sequences
    plan = replace(draft, steps=steps_of(recipe, len(rows.train.dataset), batch))
    content = _content(plan, rows)
    if found is not None:
        _check_same(request.out, found["settings"], content["settings"])
        content["runs"] = found["runs"]
    _run_missing(plan, request, content)
    content["status"] = "finished"
    report = write_report(request.out, content)
    _write(request.out, content)
    return report


def _content(plan: Plan, rows: Rows) -> dict[str, Any]:
    """compare.json before the first run."""
    methods = {
        method: {"sequences_per_step": plan.seen(method), "left_out": loss_of(plan.recipe, method)[1]}
        for method in plan.methods
    }
    counts = rows.train.counts
    fingerprints = {"train": rows.train.fingerprint, "held_out": rows.held_out.fingerprint}
    content = {
        "format": FORMAT,
        "status": "unfinished",
        "recipe": plan.recipe.name,
        "model": plan.recipe.model.path,
        "changes": plan.recipe.notes,
        "settings": settings_of(plan, fingerprints),
        "methods": methods,
        "timed_steps": plan.timed,
        "rows": {
            "kind": "pairs" if rows.are_pairs else "unpaired rows",
            "train": len(rows.train.dataset),
            "held_out": len(rows.held_out.dataset),
            "paired_by_prompt": counts.get("paired_by_prompt", 0),
            "without_pair": counts.get("without_pair", 0),
            "shared_prompts": rows.shared_prompts(),
        },
        "runs": [],
    }
    return json.loads(json.dumps(content, default=str))  # equal to what is read back


def _run_missing(plan: Plan, request: CompareRequest, content: dict[str, Any]) -> None:
    """Round after round of all methods, so that a busy phase of the machine affects every method."""
    done = {(one["method"], one["seed"]) for one in content["runs"]}
    first = plan.recipe.training.seed
    jobs = [
        Job(plan, method, seed, request.out / "runs" / f"{method}-{seed}")
        for seed in range(first, first + request.runs)
        for method in plan.methods
    ]
    missing = [job for job in jobs if (job.method, job.seed) not in done]
    if not missing:
        return
    request.out.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:  # outdated by the next run
        (request.out / name).unlink(missing_ok=True)
    _write(request.out, content)
    total = plan.steps * len(jobs)
    done_steps = total - plan.steps * len(missing)
    with tqdm(total=total, initial=done_steps, unit="step", dynamic_ncols=True) as bar:
        for job in missing:
            bar.set_description(f"{job.method}, run {job.seed - first + 1} of {request.runs}")
            content["runs"].append(run_in_subprocess(job, bar.update))
            _write(request.out, content)


def _write(out: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(out / JSON_NAME, text + "\n", "replace")


def _found(out: Path) -> dict[str, Any] | None:
    """compare.json of an earlier start; None in a new or empty folder."""
    try:
        content = json.loads((out / JSON_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not is_unused(out):
            raise UserError(f"--out {out} has files in it that are not a comparison's; choose another folder") from None
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{out / JSON_NAME} is not what `prefopt compare` writes (format {FORMAT}); choose another --out"
        )
    return content


def _check_same(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to continue a comparison with other settings: the runs would not be comparable."""
    other = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if other:
        raise UserError(
            f"--out {out} has a comparison with other settings ({', '.join(other)}); expected the same recipe and "
            "arguments but for --runs, or another folder"
        )
