"""One command that measures linear_logprob on a GPU: its tests, then times, memory and errors, then tables.

    python -m benchmarks.gpu_suite [--out DIR] [--minutes 9] [--case qwen3-0.6b] [--tokens 4096] [--peers trl cce]

Needs torch, triton and pytest; a peer is measured where it is installed. If a test fails, nothing is timed.
Rows go to DIR/<device>/<date>.jsonl as they come, the tables to DIR/<device>/<date>.md at the end.
benchmarks/README.md has the protocol.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cases import CASES, GPU_CASES, GPU_LOGITS, GPU_TOKENS
from benchmarks.gpu_table import gpu_section
from benchmarks.gpu_timing import gpu_origin
from benchmarks.gpu_variants import PEERS, absent
from benchmarks.origin import ROOT
from benchmarks.rows import RESULTS, keep, newest
from benchmarks.variants import sequences

# Files that need nothing but pytest, torch and triton. The first must be there.
GATE = ("tests/ops/test_linear_logprob_triton*.py", "tests/ops/test_sequence_loss*.py")
GATE_SHARE = 0.5  # of the time
GATE_PROCESSES = 8  # compiling the kernels takes most of the tests' time
LAST_SECONDS = 15  # kept for ending the measuring process and for the tables
SILENCE = 60  # seconds; a call that takes longer, compilation included, is ended
MOST_PROCESSES = 6  # each further one follows a fault


@dataclass(frozen=True)
class Gate:
    """How the tests went."""

    reason: str | None  # why nothing may be timed; None where everything is green
    text: str = ""
    passed: int = 0
    skipped: int = 0


def run_tests(seconds: float, root: Path = ROOT) -> Gate:
    """The op tests of the checkout at ``root`` in a process of their own, for at most so long."""
    found = [sorted(root.glob(pattern)) for pattern in GATE]
    if not found[0]:
        return Gate(f"there are no tests at {GATE[0]}")
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.xml", Path(folder) / "log.txt"
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"--junitxml={report}"]
        command += ["-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(GATE_PROCESSES, os.cpu_count() or 1))]
        with log.open("w", encoding="utf-8") as output:
            try:
                status = subprocess.run(
                    [*command, *(str(path) for paths in found for path in paths)],
                    cwd=root,
                    env=environment(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                ).returncode
            except subprocess.TimeoutExpired:
                status = None
        text = log.read_text(encoding="utf-8", errors="replace")
        if status is None:
            return Gate(f"the tests did not end within {seconds:.0f} s", text)
        if status != 0:
            return Gate(f"the tests failed: pytest ended with {status}", text)
        suite = next(xml.etree.ElementTree.parse(report).iter("testsuite"))
    total, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    if total == skipped:
        return Gate(f"no test ran, {skipped} were skipped", text)
    return Gate(None, text, total - skipped, skipped)


def environment() -> dict[str, str]:
    """Kernels run on the device, never in Triton's interpreter, and no C++ is compiled."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PREFOPT_BUILD": "none"}


def spawn(
    spec: dict,
    seconds: float,
    hear: Callable[[dict], None],
    *,
    command: tuple[str, ...] = (sys.executable, "-m", "benchmarks.gpu_worker"),
    silence: float = SILENCE,
) -> str | None:
    """Run the measuring process and pass on what it tells; None where it ended well, else how it ended."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [*command, str(write), json.dumps(spec)],
        cwd=ROOT,
        env=environment(),
        pass_fds=[write],
        start_new_session=True,
    )
    os.close(write)
    deadline = time.monotonic() + seconds
    ended, why, rest = False, None, b""
    try:
        while not ended:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([read], [], [], max(0, min(left, silence)))
            if not ready:
                why = f"it took longer than {min(seconds, silence):.0f} s"
                break
            chunk = os.read(read, 2**16)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                event = json.loads(line)
                ended = ended or "end" in event
                hear(event)
    finally:
        os.close(read)
        status = end(process, patience=5 if why is None else 0)
    return None if ended else why or f"the process ended with {status}"


def end(process: subprocess.Popen, patience: float) -> int:
    """The exit status; after ``patience`` seconds the process is killed, and what it started in any case."""
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError):  # none is left
        os.killpg(process.pid, signal.SIGKILL)
    return process.returncode


@dataclass
class Measured:
    """What the measuring processes told, and which variants ended them."""

    keep: Callable[[list[dict]], None]
    say: Callable[[str], None]
    waiting: list[tuple]
    avoid: list[tuple[tuple, str, str]] = field(default_factory=list)
    running: tuple[tuple, str] | None = None
    failed: dict[tuple[tuple, str], str] = field(default_factory=dict)
    times: int = 0

    def hear(self, event: dict) -> None:
        if "say" in event:
            self.say(event["say"])
        elif "begin" in event:
            self.running = (tuple(event["group"]), event["begin"])
        elif "failed" in event:
            self.failed[tuple(event["group"]), event["failed"]] = event["reason"]
            self.say(f"  {event['failed']}: not measured, {event['reason']}")
        elif "rows" in event:
            self.waiting.remove(tuple(event["group"]))
            self.running = None
            self.keep(event["rows"])
            for row in event["rows"]:
                if row["skipped"] is None:
                    self.times += row["variant"].startswith("ours")
                    self.say(f"  {row['variant']}: {row['median_ms']:.3f} ms, {row['ratio']:.2f} GEMMs")


def measure(measured: Measured, spec: dict, spawn, deadline: float, now) -> None:
    """Process after process, until all is measured, the time is up, or faults come too often."""
    for _ in range(MOST_PROCESSES):
        seconds = deadline - now()
        if not measured.waiting or seconds <= 0:
            return
        asked = {"groups": list(measured.waiting), "avoid": measured.avoid, "seconds": seconds}
        why = spawn(spec | asked, seconds + LAST_SECONDS / 2, measured.hear)
        if why is None:
            return
        if now() >= deadline:
            return
        if measured.running is None:
            measured.say(f"the measuring process ended outside any call: {why}")
            return
        group, variant = measured.running
        reason = measured.failed.get(measured.running, why)
        measured.avoid.append((group, variant, reason))
        measured.running = None
        measured.say(f"  {variant} ended the measuring process, {reason}; going on without it here")
    measured.say(f"{MOST_PROCESSES} measuring processes ended so; no further one is started")


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description="Tests linear_logprob on a GPU, then measures it; if a test fails, nothing is timed.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    add("--minutes", type=float, default=9.0, help="for everything, the tests included (9)")
    add("--case", action="append", choices=CASES, help="a model's head; may be repeated")
    add("--tokens", action="append", type=int, help="T; may be repeated")
    add("--logits", action="append", choices=GPU_LOGITS, help="may be repeated")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="none, if none is named")
    add("--commit", help="commit of the sources, where they are a copy without .git")
    asked = parser.parse_args(arguments)
    if not asked.minutes > 0:
        parser.error(f"--minutes is {asked.minutes}; expected a number above 0")
    if "smoke" in (asked.case or ()) and asked.out == RESULTS:
        parser.error("--case smoke is for trying the suite; name a folder for its rows with --out")
    for T in asked.tokens or ():
        if T < 1:
            parser.error(f"--tokens is {T}; expected 1 or more")
        try:
            sequences(T)
        except ValueError as error:
            parser.error(f"--tokens: {error}")
    return asked


def plan(asked: argparse.Namespace) -> list[tuple[str, int, str]]:
    """The groups (case, T, logits) in the order in which they are measured."""
    sizes = itertools.product(asked.tokens or GPU_TOKENS, asked.case or GPU_CASES)
    return [(case, T, logits) for T, case in sizes for logits in asked.logits or GPU_LOGITS]


def with_commit(where: dict, named: str | None) -> dict:
    """``where`` with the named commit, if git does not know it."""
    if named is None:
        return where
    if where["commit"] is not None and not where["commit"].startswith(named):
        raise RuntimeError(f"--commit is {named}; git says {where['commit']}")
    return where if where["commit"] is not None else where | {"commit": named}


def say(line: str) -> None:
    print(line, flush=True)


def main(
    arguments: list[str] | None = None,
    *,
    origin: Callable[[], dict] = gpu_origin,
    tests: Callable[[float], Gate] = run_tests,
    spawn: Callable[[dict, float, Callable], str | None] = spawn,
    now: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = say,
) -> int:
    """0 where ours was timed; 1 where it was not, with the reason said."""
    asked = options(arguments)
    start = now()
    deadline = start + 60 * asked.minutes - LAST_SECONDS
    try:
        where = with_commit(origin(), asked.commit)
    except RuntimeError as error:
        say(f"nothing is measured: {error}")
        return 1
    missing = {peer: reason for peer, reason in absent().items() if peer in asked.peers}
    say(f"{where['gpu']['name']}, torch {where['versions']['torch']}")
    if missing:
        say(f"absent: {', '.join(f'{peer} ({reason})' for peer, reason in missing.items())}")

    gate = tests(GATE_SHARE * 60 * asked.minutes)
    if gate.reason is not None:
        say(f"{gate.text}\nnothing is timed: {gate.reason}")
        return 1
    say(f"op tests: {gate.passed} passed, {gate.skipped} skipped, {now() - start:.0f} s")

    shared = where | {"tests": {"passed": gate.passed, "skipped": gate.skipped}}
    groups = plan(asked)
    measured = Measured(
        keep=lambda rows: keep([shared | row for row in rows], asked.out),
        say=say,
        waiting=list(groups),
    )
    spec = {
        "peers": [peer for peer in asked.peers if peer not in missing],
        "everything_at": groups[0][1],
    }
    measure(measured, spec, spawn, deadline, now)
    report(measured, missing, asked.out, shared)
    return 0 if measured.times else 1


def report(measured: Measured, missing: dict[str, str], out: Path, shared: dict) -> None:
    """The tables, said and written beside the rows, and what is not in them."""
    lines = []
    if missing:
        lines.append(f"Absent: {'; '.join(f'{peer}, {why}' for peer, why in missing.items())}.")
    if measured.waiting:
        groups = "; ".join(f"{case} T {T:,} {logits}" for case, T, logits in measured.waiting)
        lines.append(f"Not measured in this run: {groups}.")
    rows = newest(out).get(shared["device"])
    if rows is None:
        measured.say("\n".join([*lines, "no row was measured"]))
        return
    path = out / shared["device"] / f"{shared['run'][:10]}.md"
    text = "\n".join([gpu_section(rows), *lines]) + "\n"
    path.write_text(text, encoding="utf-8")
    measured.say(f"\n{text}\nrows and tables: {path.with_suffix('.jsonl')}, {path}")


if __name__ == "__main__":
    sys.exit(main())
