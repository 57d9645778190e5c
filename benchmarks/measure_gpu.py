"""Measure linear_logprob on a GPU in one unattended command: op tests, then times, memory and errors, then tables.

    python -m benchmarks.measure_gpu [--out DIR] [--minutes 9] [--case qwen3-0.6b] [--tokens 4096] [--peers trl cce]

Needs torch, triton and pytest; a peer is measured if it is installed. Rows are appended to DIR/<device>/<date>.jsonl
group by group, the tables are written to DIR/<device>/<date>.md. Nothing stops the run: failing tests are listed and
counted in every row, a variant that fails has a row with the reason, and one that ends or blocks the measuring process
is left out by the next one. An unfinished run is recorded in DIR/unfinished.json; the next start continues it.
benchmarks/README.md has the protocol.
"""

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES, GPU_CASES, GPU_LOGITS, GPU_TOKENS, PASSES
from benchmarks.measure_cpu import exact_sample, row_start, summary
from benchmarks.rows import RESULTS, ROOT, gpu_origin, keep, newest, nvidia_smi
from benchmarks.tables import section
from benchmarks.variants import GRAD_FILTER, PEERS, Inputs, Variant, gpu_group, gpu_variants, make_inputs, sequences

# Tests that need nothing but pytest, torch and triton.
GATE = [*ROOT.glob("tests/ops/test_linear_logprob_triton*.py"), *ROOT.glob("tests/ops/test_sequence_loss*.py")]
GATE_SHARE = 0.5  # of the time
GATE_PROCESSES = 8  # most of the tests' time is compilation
LAST_SECONDS = 15  # reserved for the tables
SILENCE = 120  # seconds; a call that takes longer, compilation included, ends the measuring process
DTYPE = "bf16"
GROUP_SECONDS = 4.0  # of timed rounds
MIN_ROUNDS, MAX_ROUNDS = 5, 25
FLUSH_BYTES = 256 * 2**20  # several times any L2
# Writes of FLUSH_BYTES before each sample. They empty the cache and keep the device busy for about 1.5 ms on an H100,
# while the host launches the timed kernels, so that launch overhead is not timed.
FLUSHES = 16
STATE = ("clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit")
Group = tuple[str, int, str]  # case, T, logits


class Device:
    """The first CUDA device, or the CPU for a trial without one."""

    def __init__(self, kind: str):
        self.kind, self.cuda = kind, kind == "cuda"
        self.backend = "triton" if self.cuda else "reference"
        self._flush = torch.empty(FLUSH_BYTES if self.cuda else 1, dtype=torch.uint8, device=kind)

    def time(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds on the device, and seconds until the host has launched everything."""
        if not self.cuda:
            started = time.perf_counter()
            run()
            return (time.perf_counter() - started,) * 2
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(FLUSHES):
            self._flush.zero_()
        begin.record()
        started = time.perf_counter()
        run()
        host = time.perf_counter() - started
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, host

    def peak(self, run: Callable[[], Any]) -> tuple[Any, int | None]:
        """The result of a second call, and its peak memory above that before the first, which compiles and tunes."""
        if not self.cuda:
            return [run(), run()][1], None
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def tidy(self) -> None:
        """Free unused memory. Raises if an earlier fault has left the device unusable."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def state(self) -> dict[str, float]:
        """Clocks in MHz, temperature in degrees Celsius, power in W; empty without nvidia-smi."""
        found = nvidia_smi(*STATE) if self.cuda else {}
        return {name: float(value) for name, value in found.items() if value[:1].isdigit()}


# Processes


def run_process(command: Sequence[str], seconds: float, log: Any = None, alive: Path | None = None) -> int | None:
    """Run a command in a process group of its own, which is killed at the end.

    Returns:
        The exit status; None after ``seconds``, or SILENCE seconds after the last write to the file ``alive``.
    """
    # kernels run on the device, never in Triton's interpreter, and no C++ is compiled
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=kept | {"PREFOPT_BUILD": "none"}, stdout=log, stderr=log, start_new_session=True
    )
    started = time.time()
    try:
        while process.poll() is None:
            written = started if alive is None else max(started, alive.stat().st_mtime)
            if time.time() - started > seconds or (alive and time.time() - written > SILENCE):
                return None
            time.sleep(0.1)
        return process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_tests(files: Sequence[Path], seconds: float) -> dict[str, int | bool]:
    """Run tests to their end, whatever fails, and return their counts; the output is printed unless all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted(map(str, files))]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(GATE_PROCESSES, os.cpu_count() or 1))]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        status = run_process(command, seconds, log)
        log.seek(0)
        text = log.read()
    found = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    if status is not None:
        found |= {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", text.splitlines()[-1])}
    if status != 0:
        print(text, flush=True)
    return found | {"finished": status is not None}


@dataclass
class Run:
    """A run on disk: what its measuring processes share, and what a later start continues."""

    path: Path
    where: dict  # fields of every row
    done: list[str] = field(default_factory=list)  # groups
    reasons: dict[str, str] = field(default_factory=dict)  # "group, variant" -> why it is not measured
    begun: tuple[str, str] | None = None  # the group and variant of the call in progress
    fatal: list[str] = field(default_factory=list)  # variants that ended a measuring process, with repetitions

    def save(self) -> None:
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(self) | {"path": None}), encoding="utf-8")
        os.replace(scratch, self.path)

    @staticmethod
    def load(path: Path) -> "Run":
        return Run(**json.loads(path.read_text(encoding="utf-8")) | {"path": path})

    def left(self, groups: list[Group]) -> list[Group]:
        return [group for group in groups if label(group) not in self.done]

    def reason(self, group: str, variant: str) -> str | None:
        twice = "it ended the measuring process twice" if self.fatal.count(variant) > 1 else None
        return self.reasons.get(f"{group}, {variant}", twice)


def label(group: Group) -> str:
    return "{}, T {:,}, {}".format(*group)


# Measuring


class Measurement:
    """One group: first calls, then rounds in which the variants take turns, then rows."""

    def __init__(self, group: Group, variants: dict[str, Variant], run: Run, device: Device):
        self.name, (case, self.T, self.logits) = label(group), group
        self.case, self.variants, self.run, self.device = CASES[case], variants, run, device
        # why a variant is not measured; None for those that are
        self.reasons = {name: run.reason(self.name, name) or v.why_not(self.case) for name, v in variants.items()}
        self.first: dict[str, dict] = {}
        self.state: dict[str, dict] = {}
        self.samples: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}

    def rows(self, until: float) -> list[dict]:
        """One row per variant; none if the time ended before MIN_ROUNDS rounds."""
        print(self.name, flush=True)
        made = self._attempt("gemm", self._inputs) if self.reasons["gemm"] is None else None
        if made is not None:
            for name in self._running():
                if time.monotonic() >= until:
                    return []
                first = self._attempt(name, partial(self._first_call, self.variants[name], *made))
                if first is not None:
                    self.first[name] = first
            if not self._rounds(made[0], until):
                return []
        if self.reasons["gemm"] is not None:
            missing = "its unit, the bare GEMM, was not measured"
            self.reasons = {name: reason or missing for name, reason in self.reasons.items()}
        return [self._row(name) for name in self.variants]

    def _running(self) -> list[str]:
        return [name for name, reason in self.reasons.items() if reason is None]

    def _attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """The result of the action; None if it fails, with the reason recorded."""
        self.run.begun = (self.name, name)
        self.run.save()
        try:
            return action()
        except Exception as error:  # of a peer's library, the compiler or the device: the others are still measured
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        self.reasons[name] = self.run.reasons[f"{self.name}, {name}"] = reason
        self.run.save()  # before the device is used again, which after some faults ends the process
        print(f"  {name}: not measured, {reason}", flush=True)
        self.device.tidy()
        return None

    def _inputs(self) -> tuple[Inputs, Tensor, Tensor]:
        x = make_inputs(self.case, self.T, DTYPE, device=self.device.kind, logits=self.logits)
        sample, exact = exact_sample(x)
        self.variants["gemm"].run(x)  # allocates the library's workspace before memory is measured
        return x, sample, exact

    def _first_call(self, variant: Variant, x: Inputs, sample: Tensor, exact: Tensor) -> dict:
        """Compile; measure memory and error."""
        logp, peak = self.device.peak(lambda: variant.run(x))
        error = None
        if logp is not None and variant.passed in PASSES:
            error = (logp[sample].double() - exact).abs().max().item()
            if not math.isfinite(error):
                raise ArithmeticError("log-probabilities that are not finite")
        skips = variant.who == "ours-skip"
        return {
            "peak_extra_bytes": peak,
            "logp_error": error,
            "grad_filter": GRAD_FILTER if skips else None,
            "keep_rate": self._keep_rate(x) if skips and self.device.cuda else None,
        }

    def _keep_rate(self, x: Inputs) -> float:
        """Share of the tiles that GRAD_FILTER keeps."""
        from prefopt_kernels.ops.linear_logprob.triton_kernels import backend

        return backend.keep_rate(x.hidden, x.weight, x.targets, grad_filter=GRAD_FILTER, softcap=x.case.softcap)

    def _rounds(self, x: Inputs, until: float) -> bool:
        """Time one sample of each variant per round, in rotating order; False if the time ended too early."""
        self.device.tidy()
        gc.disable()  # else it would run inside a sample now and then
        started = math.inf
        for i in range(-1, MAX_ROUNDS):  # the first settles the clocks and is not kept
            if time.monotonic() >= until or (i >= MIN_ROUNDS and time.monotonic() - started > GROUP_SECONDS):
                break
            if i == 0:
                self.state["before"], started = self.device.state(), time.monotonic()
            names = self._running()
            first = i % max(1, len(names))
            for name in names[first:] + names[:first]:
                sample = self._attempt(name, partial(self.device.time, partial(self.variants[name].run, x)))
                if sample is not None and i >= 0:
                    self.samples[name].append(sample)
        gc.enable()
        self.state["after"] = self.device.state()
        return not self._running() or len(self.samples["gemm"]) >= MIN_ROUNDS

    def _row(self, name: str) -> dict:
        variant, reason = self.variants[name], self.reasons[name]
        named = name if self.logits == "random" else f"{name}/{self.logits}"
        row = row_start(self.case, self.T, DTYPE, named, reason) | {"logits": self.logits}
        if reason is not None:
            return row
        seconds = [device for device, _ in self.samples[name]]
        ratios = [own / unit for own, (unit, _) in zip(seconds, self.samples["gemm"], strict=True)]
        p20, _, _, p80 = statistics.quantiles(ratios, n=5, method="inclusive")
        products = {"gemm": 1, "forward": 1, "frozen": 2, "trainable": 3}.get(variant.passed)  # the fewest of a pass
        flops = products and 2 * products * self.T * self.case.H * self.case.V
        return row | {
            "backend": self.device.backend if variant.who in ("ours", "ours-skip") else None,
            "rounds": len(seconds),
            **summary(seconds),
            "host_ms": 1e3 * statistics.median(host for _, host in self.samples[name]),
            "ratio": statistics.median(ratios),
            "ratio_p20": p20,
            "ratio_p80": p80,
            "tflops": flops and 1e-12 * flops / statistics.median(seconds),
            "state": self.state,
            **self.first[name],
        }


def work(options: argparse.Namespace, variants: dict[str, Variant] | None = None) -> int:
    """Measure group after group until the time is up: the measuring process."""
    until = time.monotonic() + options.worker
    device, run = Device(options.device), Run.load(options.out / "unfinished.json")
    variants = gpu_variants(device.backend) if variants is None else variants
    groups, peers = plan(options), [peer for peer in options.peers if PEERS[peer]() is None]
    for group in run.left(groups):
        if time.monotonic() >= until:
            break
        chosen = gpu_group(variants, group[2], peers, everything=group[1] == groups[0][1])
        rows = Measurement(group, chosen, run, device).rows(until)
        if not rows:
            break
        keep([run.where | row for row in rows], options.out)
        for row in rows:
            if row["skipped"] is None:
                print(f"  {row['variant']}: {row['median_ms']:.3f} ms, {row['ratio']:.2f} GEMMs", flush=True)
        run.done.append(label(group))
        run.save()
    run.begun = None
    run.save()
    return 0


# The command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure_gpu",
        description="Test linear_logprob on a GPU and measure it. A second start continues an unfinished run.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    add("--minutes", type=float, default=9.0, help="time limit of this start, tests included (9)")
    add("--case", action="append", choices=CASES, help="a model's head; may be repeated")
    add("--tokens", action="append", type=int, help="T; may be repeated")
    add("--logits", action="append", choices=GPU_LOGITS, help="may be repeated")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="compared implementations (all)")
    add("--commit", help="commit of the sources, for a copy without .git")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the command without a GPU (cuda)")
    add("--worker", type=float, help=argparse.SUPPRESS)  # seconds of a measuring process
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}; expected a number above 0")
    if options.out == RESULTS and (options.device == "cpu" or "smoke" in (options.case or ())):
        parser.error("--case smoke and --device cpu are trials; choose another folder for their rows with --out")
    for T in options.tokens or ():
        try:
            sequences(T)
        except ValueError as error:
            parser.error(f"--tokens: {error}")
    return options


def plan(options: argparse.Namespace) -> list[Group]:
    """The groups in the order in which they are measured."""
    sizes = itertools.product(options.tokens or GPU_TOKENS, options.case or GPU_CASES)
    return [(case, T, logits) for T, case in sizes for logits in options.logits or GPU_LOGITS]


def main(
    arguments: Sequence[str] | None = None,
    *,
    gate: Sequence[Path] = GATE,
    worker: Sequence[str] = ("-m", "benchmarks.measure_gpu"),
) -> int:
    """Run the command, optionally with other op tests and measuring process; 0 if tests and measurement succeed."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if options.worker is not None:
        return work(options)
    deadline = time.monotonic() + 60 * options.minutes - LAST_SECONDS
    try:
        where = gpu_origin(options.device, options.commit)
    except RuntimeError as error:
        print(f"nothing is measured: {error}")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.out / "unfinished.json", where)
    found = Run.load(run.path) if run.path.is_file() else None
    if found is not None and all(found.where[key] == where[key] for key in ("device", "commit", "dirty", "versions")):
        run = found
        print(f"continues the run of {run.where['run']}, recorded in {run.path}; delete that file to start again")
    else:
        run.where["tests"] = run_tests(gate, GATE_SHARE * 60 * options.minutes)
    print(f"{where['gpu']['name']}, torch {where['versions']['torch']}; op tests: {run.where['tests']}", flush=True)
    run.save()
    command = [sys.executable, *worker, *arguments, f"--out={options.out.resolve()}"]
    run = measure(run, plan(options), command, deadline)
    if not run.left(plan(options)):
        run.path.unlink()
    tests = run.where["tests"]
    green = tests["finished"] and tests["passed"] and not tests["failed"] + tests["error"]
    return 0 if report(run, options) and green else 1


def measure(run: Run, groups: list[Group], command: Sequence[str], deadline: float) -> Run:
    """Start measuring processes until every group is measured or the time is up."""
    while run.left(groups) and (seconds := deadline - time.monotonic()) > 0:
        status = run_process([*command, f"--worker={seconds}"], seconds + LAST_SECONDS / 2, alive=run.path)
        run = Run.load(run.path)
        if status == 0 or time.monotonic() >= deadline:
            break
        why = f"it took longer than {SILENCE} s" if status is None else f"the process ended with {status}"
        if run.begun is None:
            print(f"the measuring process ended outside any call: {why}")
            break
        group, variant = run.begun
        run.reasons.setdefault(f"{group}, {variant}", why)
        run.fatal.append(variant)
        run.begun = None
        run.save()
        print(f"  {variant} ended the measuring process, {why}; the next one leaves it out", flush=True)
    return run


def report(run: Run, options: argparse.Namespace) -> bool:
    """Print and write the tables and what is missing; whether this run has a row of ours."""
    rows = newest(options.out).get(run.where["device"], {})
    absent = [f"{peer}, {reason}" for peer in options.peers if (reason := PEERS[peer]()) is not None]
    left = "; ".join(map(label, run.left(plan(options))))
    text = section(rows) if rows else "no row was measured\n"
    text += f"Absent: {'; '.join(absent)}.\n" if absent else ""
    text += f"Not measured: {left}. The same command continues.\n" if left else ""
    print(f"\n{text}", flush=True)
    if rows:
        path = options.out / run.where["device"] / f"{run.where['run'][:10]}.md"
        path.write_text(text, encoding="utf-8")
        print(f"rows and tables: {path.with_suffix('.jsonl')}, {path}")
    measured = [row["variant"] for row in rows.values() if row["run"] == run.where["run"] and row["skipped"] is None]
    return any(variant.startswith("ours") for variant in measured)


if __name__ == "__main__":
    sys.exit(main())
