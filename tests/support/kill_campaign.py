"""Kill training again and again, resume it, and compare with the run that was left alone.

    python tests/support/kill_campaign.py --kills 30 --seed 0          (a few minutes on two cores)

Half of the kills are drawn from the file operations of saving a checkpoint, some with a delay of up to 5 ms so that
they fall inside a file; the others from the whole duration of the run. After each kill the run is resumed, and must
end with the same weights, bit for bit, and the same metrics.jsonl. Runs are forked from a server that has imported
torch.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import yaml

import prefopt.report.write
from prefopt.cli import main as command_line
from prefopt.train.checkpoint import PARTIAL
from support.forked import start
from support.tiny_models import make_model, make_rows, make_tokenizer

METHODS = {
    "kto": {"method": "kto", "kl_estimator": "window"},
    "enhanced_kto": {
        "method": "enhanced_kto",
        "shift": "ema",
        "shift_start": 0.25,
        "shift_ramp": 0.5,
    },
}
STEPS, SAVED = 8, 2
WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove")
PATIENCE = 120  # seconds for one run


def make_base(folder: Path) -> None:
    """A tiny model with its tokenizer, and rows."""
    make_model("qwen3", len(make_tokenizer(folder / "model")), folder / "model")
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(True))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")


def make_recipe_file(base: Path, folder: Path, method: str, **training: object) -> Path:
    """A recipe of ``STEPS`` steps with its run folder beside it; logs, evaluations and checkpoints fall apart."""
    content = {
        "model": {"path": str(base / "model")},
        "data": {"path": str(base / "rows.jsonl"), "eval_fraction": 0.3, "max_length": 128},
        "lora": {"r": 4, "dropout": 0.1},
        "loss": METHODS[method],
        "training": {
            "output_dir": str(folder / "run"),
            "use_cpu": True,
            "learning_rate": 1e-3,
            "max_steps": STEPS,
            "logging_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": SAVED,
            **training,
        },
    }
    folder.mkdir(parents=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def operations_of(recipe: Path) -> list[str]:
    """Run a recipe to its end; every operation that changed a file of its run folder, as "operation path"."""
    seen = recipe.with_name("operations.txt")
    assert _start(recipe, [], record=seen) == 0, _log(recipe)
    return seen.read_text(encoding="utf-8").splitlines()


def killed_at(recipe: Path, operation: int, delay: float = 0.0) -> bool:
    """Start a recipe and kill it just before its n-th file operation (from 0), or ``delay`` seconds later."""
    return _start(recipe, [], kill=(operation, delay)) == -signal.SIGKILL


def killed_after(recipe: Path, seconds: float) -> bool:
    """Start a recipe and kill it after some time; False if it had ended before."""
    return _start(recipe, [], seconds=seconds) == -signal.SIGKILL


def limited(recipe: Path, size: int) -> tuple[int, str]:
    """Run a recipe where no file can grow beyond ``size`` bytes; its exit code and output."""
    return _start(recipe, [], limit=size), _log(recipe)


def resumed(recipe: Path) -> None:
    """Resume a recipe until its end."""
    assert _start(recipe, ["--resume"]) == 0, _log(recipe)


def result_of(run: Path) -> dict:
    """What must not depend on kills: the weights, and the metrics but for times."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    timed = ("_runtime", "_per_second", "_time")
    return {
        "weights": (run / "adapter_model.safetensors").read_bytes(),
        "metrics": [
            {key: value for key, value in json.loads(line).items() if not key.endswith(timed)} for line in lines
        ],
        "summary": json.loads((run / "summary.json").read_text(encoding="utf-8")),
        "report": (run / "report.html").is_file(),
        "status": (record["status"], record["complete"]),
        "partial checkpoint": (run / PARTIAL).exists(),
    }


def _start(recipe: Path, words: list[str], seconds: float = PATIENCE, **hooks) -> int:
    """Run `prefopt train` in a process of its own; its exit code, negative for a signal."""
    process = start(_child, recipe, words, log=recipe.with_name("log.txt"), **hooks)
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _child(
    recipe: Path,
    words: list[str],
    record: Path | None = None,
    kill: tuple[int, float] | None = None,
    limit: int | None = None,
) -> None:
    prefopt.report.write.drawable = lambda run: []  # plots take longer than all the rest
    run, count = str(recipe.with_name("run")), 0
    seen = None if record is None else record.open("w", encoding="utf-8")

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        changes = event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITES)
        if not changes or not str(arguments[0]).startswith(run):
            return
        if seen is not None:
            seen.write(f"{event} {arguments[0]}\n")
        elif kill is not None and count == kill[0]:
            if kill[1]:
                threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if seen is not None or kill is not None:
        sys.addaudithook(watch)
    code = command_line(["train", str(recipe), *words])
    if seen is not None:
        seen.close()
    sys.stdout.flush()
    os._exit(code)


def _log(recipe: Path) -> str:
    return recipe.with_name("log.txt").read_text(encoding="utf-8", errors="replace")[-4000:]


def campaign(kills: int, seed: int, folder: Path) -> int:
    """The number of kills after which the run did not end as if nothing had happened."""
    draw, failed = random.Random(seed), 0
    make_base(folder)
    expected, operations, seconds = {}, {}, {}
    for method in METHODS:
        recipe = make_recipe_file(folder, folder / method, method)
        operations[method] = operations_of(recipe)
        expected[method] = result_of(recipe.with_name("run"))
        shutil.rmtree(recipe.with_name("run"))
        begun = time.monotonic()
        assert _start(recipe, []) == 0, _log(recipe)
        seconds[method] = time.monotonic() - begun
        assert result_of(recipe.with_name("run")) == expected[method], "two runs differ"
    for number in range(kills):
        method = list(METHODS)[number % 2]
        recipe = make_recipe_file(folder, folder / f"{number}", method)
        saving = [at for at, line in enumerate(operations[method]) if PARTIAL in line]
        while True:
            if number // 2 % 2:
                at, delay = draw.choice(saving), draw.choice([0.0, draw.uniform(0, 0.005)])
                done = killed_at(recipe, at, delay)
                what = f"{delay * 1000:.1f} ms past {operations[method][at]}"
            else:
                after = draw.uniform(0.2 * seconds[method], seconds[method])
                done = killed_after(recipe, after)
                what = f"after {after:.2f} s"
            if done:
                break
            shutil.rmtree(recipe.with_name("run"), ignore_errors=True)
        found = sorted(path.name for path in recipe.with_name("run").glob("*checkpoint*"))
        try:
            resumed(recipe)
            result = result_of(recipe.with_name("run"))
            wrong = [key for key, value in expected[method].items() if result[key] != value]
        except AssertionError as error:
            wrong = [str(error)]
        failed += bool(wrong)
        verdict = "as the uninterrupted run" if not wrong else f"WRONG: {', '.join(wrong)}"
        what = what.replace(str(recipe.parent.parent), "")
        print(f"{number + 1:3} {method}: killed {what}; left {found}; {verdict}", flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="number of kills (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        wrong = campaign(given.kills, given.seed, Path(place))
    print(f"{given.kills - wrong} of {given.kills} runs ended as the uninterrupted one")
    sys.exit(bool(wrong))
