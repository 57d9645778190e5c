"""Run a plan in single-threaded processes, with files that survive an interruption."""

import json
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import prefopt_kernels
from prefopt.errors import UserError
from prefopt.files import is_unused, temporary
from studies.bco_stability.grid import Config, Plan
from studies.bco_stability.policy import Reference, make_reference, pretrain
from studies.bco_stability.runs import Outcome, run_cell

RESULTS, TRACES, SETTINGS, WEIGHTS = "results.jsonl", "traces.jsonl", "study.json", "reference.safetensors"
TOGETHER = 26  # seeds per call; more are not faster

_reference: Reference | None = None  # of a worker process


def run_plan(plan: Plan, out: Path, processes: int) -> None:
    """Run the missing part of a plan and append it to ``results.jsonl`` and ``traces.jsonl``.

    All rows of a cell are written at once, when it is finished. A line cut short by an interruption is removed at the
    next start, and its cell is run again.

    Args:
        plan: cells and seeds.
        out: a new folder, or the folder of an earlier start.
        processes: number of single-threaded processes.

    Raises:
        UserError: ``out`` holds other files, or runs of other settings.
    """
    _check_folder(plan, out)
    rows = read_lines(out / RESULTS, mend=True)
    read_lines(out / TRACES, mend=True)
    tasks = missing(plan, rows)
    stamp = {"versions": versions(), "commit": commit()}
    total = plan.runs()
    with tqdm(total=total, initial=total - sum(len(s) for _, s in tasks), unit="run") as bar:
        if not tasks:
            return
        if not (out / WEIGHTS).is_file():
            bar.set_description("pre-training the reference model")
            with _one_thread():
                _save_weights(pretrain(plan.pretraining_steps), out / WEIGHTS)
        bar.set_description("unstable 0")
        unstable = sum(row["outcome"] != "stable" for row in rows)
        for config, outcome in _outcomes(plan, tasks, out / WEIGHTS, processes):
            _append(out / TRACES, [config.fields() | outcome.trace] if outcome.trace else [])
            _append(out / RESULTS, [row | stamp for row in outcome.rows])
            unstable += sum(row["outcome"] != "stable" for row in outcome.rows)
            bar.set_description(f"unstable {unstable}")
            bar.update(len(outcome.rows))


def missing(plan: Plan, rows: list[dict]) -> list[tuple[Config, list[int]]]:
    """The cells of a plan in its order, with the seeds that have no row, at most :data:`TOGETHER` per entry."""
    done: dict[Config, set[int]] = {}
    for row in rows:
        done.setdefault(Config.of(row), set()).add(row["seed"])
    tasks = []
    for config, seeds in plan.cells.items():
        left = [seed for seed in range(seeds) if seed not in done.get(config, ())]
        tasks += [(config, left[i : i + TOGETHER]) for i in range(0, len(left), TOGETHER)]
    return tasks


def read_lines(path: Path, mend: bool = False) -> list[dict]:
    """The objects of a .jsonl file; none if there is no file. ``mend`` removes an incomplete last line from the file.

    Raises:
        UserError: a line is not a JSON object.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if mend and len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}:{number} is not a JSON object")
    return rows


def versions() -> str:
    """The versions that the numbers depend on."""
    return f"prefopt-kernels {prefopt_kernels.__version__}, torch {torch.__version__}"


def commit() -> str | None:
    """Short hash of the checkout's commit; None outside a checkout."""
    command = ["git", "rev-parse", "--short=10", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _check_folder(plan: Plan, out: Path) -> None:
    settings = {"study": "bco-stability", "steps": plan.steps, "pretraining_steps": plan.pretraining_steps}
    file = out / SETTINGS
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != settings:
            raise UserError(
                f"--out {out} has a study of other settings: {found}; expected {settings}, or choose another folder"
            )
    elif not is_unused(out):
        raise UserError(f"--out {out} has files in it that are not a study's; choose another")
    else:
        file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def _outcomes(
    plan: Plan, tasks: list[tuple[Config, list[int]]], weights: Path, processes: int
) -> Iterator[tuple[Config, Outcome]]:
    """The outcome of each task, in the order of completion."""
    if processes == 1:
        with _one_thread():
            reference = make_reference(load_file(weights))
            for config, seeds in tasks:
                yield config, run_cell(reference, config, seeds, plan.steps, config in plan.traced)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(processes, context, _start_worker, (weights,)) as pool:
        waiting = {
            pool.submit(_work, config, seeds, plan.steps, config in plan.traced): config for config, seeds in tasks
        }
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(weights: Path) -> None:
    global _reference
    torch.set_num_threads(1)
    _reference = make_reference(load_file(weights))


def _work(config: Config, seeds: list[int], steps: int, traced: bool) -> Outcome:
    return run_cell(_reference, config, seeds, steps, traced)


def _append(path: Path, rows: list[dict]) -> None:
    """Append all rows in one write, and flush it to the disk."""
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    with path.open("ab") as file:
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def _save_weights(weights: dict, path: Path) -> None:
    with temporary(path) as scratch:
        save_file(weights, scratch)
        os.replace(scratch, path)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch with one thread: as fast for matrices this small, and reproducible on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
