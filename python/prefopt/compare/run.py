"""A comparison from request to report: all checks first, then the runs in turn, each kept as soon as it is done."""

import json
import os
from pathlib import Path

from tqdm import tqdm

from prefopt.compare.apart import run_apart
from prefopt.compare.measure import Job
from prefopt.compare.plan import (
    Plan,
    loss_of,
    recipe_of,
    sequences_of,
    settings_of,
    steps_of,
)
from prefopt.compare.report import OUTPUTS, write_report
from prefopt.compare.request import CompareRequest
from prefopt.compare.rows import Rows, load
from prefopt.errors import UserError
from prefopt.files import is_unused, only_writer, write_whole
from prefopt.recipe.models import load_tokenizer
from prefopt.recipe.ready import check_device, check_inputs
from prefopt.recipe.run import preference_config
from prefopt.recipe.schema import Recipe

JSON_NAME, FORMAT = "compare.json", 1


def run(recipe: Recipe, request: CompareRequest) -> Path:
    """Run what is missing of a comparison, print its tables, and write compare.json, compare.csv, compare.md, plots and
    report.html.

    Args:
        recipe: from ``load_recipe``; its ``training.output_dir`` is not used.
        request: what to compare.

    Returns:
        Path of report.html.

    Raises:
        UserError: options that do not fit a method, a folder in use, a run that failed.
        DataError: rows that cannot be used, or that do not serve a method.
        KeyboardInterrupt: the runs that were done stay, and a second start goes on.
    """
    sequences = sequences_of(recipe, request.methods)
    draft = Plan(recipe, request.methods, sequences, max(1, recipe.training.max_steps))
    for method in request.methods:
        config = preference_config(recipe_of(draft, method, recipe.training.seed, request.out))
        check_device(recipe, config)
    check_inputs(recipe, request.out)
    _check_writable(request.out)
    with only_writer(request.out, "--out"):
        return _run(draft, request)


def _run(draft: Plan, request: CompareRequest) -> Path:
    recipe, sequences = draft.recipe, draft.sequences
    found = _found(request.out)
    rows = load(recipe, request.methods, load_tokenizer(recipe))
    batch = sequences // 2 if rows.are_pairs else sequences
    steps = steps_of(recipe, len(rows.train.dataset), batch)
    plan = Plan(recipe, request.methods, sequences, steps)
    content = _content(plan, rows)
    if found is not None:
        _check_same(request.out, found["settings"], content["settings"])
        content["runs"] = found["runs"]
    _run_missing(plan, request, content)
    content["status"] = "finished"
    report = write_report(request.out, content)
    _write(request.out, content)
    return report


def _content(plan: Plan, rows: Rows) -> dict:
    """compare.json before the first run."""
    methods = {
        method: {
            "sequences_per_step": plan.seen(method),
            "left_out": loss_of(plan.recipe, method)[1],
        }
        for method in plan.methods
    }
    counts = rows.train.counts
    content = {
        "format": FORMAT,
        "status": "unfinished",
        "recipe": plan.recipe.name,
        "model": plan.recipe.model.path,
        "changes": plan.recipe.notes,
        "settings": settings_of(plan, rows.fingerprints()),
        "methods": methods,
        "timed_steps": plan.timed,
        "rows": {
            "kind": "pairs" if rows.are_pairs else "rated rows",
            "train": len(rows.train.dataset),
            "held_out": len(rows.held_out.dataset),
            "paired_by_prompt": counts.get("paired_by_prompt", 0),
            "without_pair": counts.get("without_pair", 0),
            "shared_prompts": rows.shared_prompts(),
        },
        "runs": [],
    }
    return json.loads(json.dumps(content, default=str))  # so that it equals what is read back


def _run_missing(plan: Plan, request: CompareRequest, content: dict) -> None:
    """A round of all methods, then the next: what slows the machine for a while slows every method."""
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
    for name in OUTPUTS:  # of fewer runs, and soon of too few
        (request.out / name).unlink(missing_ok=True)
    _write(request.out, content)
    total = plan.steps * len(jobs)
    with tqdm(
        total=total,
        initial=total - plan.steps * len(missing),
        unit="step",
        dynamic_ncols=True,
    ) as bar:
        for job in missing:
            bar.set_description(f"{job.method}, run {job.seed - first + 1} of {request.runs}")
            content["runs"].append(run_apart(job, bar.update))
            _write(request.out, content)


def _write(out: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(out / JSON_NAME, text + "\n", "replace")


def _check_writable(out: Path) -> None:
    there = next(one for one in (out, *out.absolute().parents) if one.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"{there} cannot be written to; choose another --out")


def _found(out: Path) -> dict | None:
    """compare.json of an earlier start; None in a folder that is new or empty."""
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


def _check_same(out: Path, found: dict, wanted: dict) -> None:
    """A second start must ask for the same thing, or its runs could not stand beside those of the first."""
    other = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if other:
        raise UserError(
            f"--out {out} has a comparison with other settings ({', '.join(other)}); expected the same recipe and "
            "arguments but for --runs, or another folder"
        )
