"""Measure linear_logprob and the KTO step, or linear_kl, on a CPU beside plain torch, TRL and Liger: `make bench`.

    python -m benchmarks.measure_cpu [--case qwen3-0.6b] [--tokens 512] [--dtype bf16] [--pass forward] [--who ours]
    python -m benchmarks.measure_cpu --op linear_kl

Runs the op tests, then times all variants of a (head, T, dtype) in interleaved rounds, and appends their rows to
benchmarks/results/<device>/<date>.jsonl. benchmarks/README.md has the protocol.
"""

import argparse
import ctypes
import gc
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.cases import CASES, DTYPES, GRID, KL_GRID, KL_PASSES, KTO_PASSES, PASSES, Case
from benchmarks.rows import RESULTS, ROOT, keep, now, origin
from benchmarks.variants import Inputs, Variant, cpu_variants, kl_variants, make_inputs
from prefopt_kernels._backends import select_backend
from prefopt_kernels.ops.linear_logprob.op import BACKENDS

GATE = ("tests/ops", "tests/losses", "tests/test_modules.py")
KL_GATE = tuple(f"tests/ops/test_linear_kl_{name}.py" for name in ("values", "special", "autograd", "memory"))
KL_RESULTS = RESULTS / "linear_kl"
EXACT_ROWS = 512  # tokens whose log-probability is computed in fp64, evenly spread over T
KEPT_ROUNDS = 5  # with fewer the times are printed and no row is kept
VARIANTS = cpu_variants() | kl_variants()
WARM_UP = Case("warm-up", "no model", H=64, V=1000)


def interleaved(
    calls: dict[str, Callable[[], Tensor | None]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Tensor | None]]:
    """Time the calls in turns, one sample each per round.

    A slow phase of the machine then affects all of them. One round before the timed ones warms up. The order rotates by
    one call per round, so that no call always follows the same one.

    Returns:
        Seconds of each call, and what each returned last.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    last: dict[str, Tensor | None] = {}
    names = list(calls)
    for i in range(-1, rounds):
        print("warm-up round" if i < 0 else f"round {i + 1} of {rounds}", flush=True)
        first = i % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            start = time.perf_counter()
            last[name] = calls[name]()
            elapsed = time.perf_counter() - start
            if i >= 0:
                seconds[name].append(elapsed)
    return seconds, last


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median_ms": 1e3 * statistics.median(seconds), "p20_ms": 1e3 * p20, "p80_ms": 1e3 * p80}


def exact_logp(x: Inputs, rows: Tensor) -> Tensor:
    """(len(rows),) fp64 log-probabilities of the same inputs."""
    weight, logps = x.weight.double(), []
    for part in rows.split(64):  # 64 x V x 8 bytes of logits at a time
        z = x.hidden[part].double() @ weight.T
        if x.case.softcap is not None:
            z = x.case.softcap * torch.tanh(z / x.case.softcap)
        logps.append(z.gather(1, x.targets[part, None]).squeeze(1) - z.logsumexp(1))
    return torch.cat(logps)


def exact_sample(x: Inputs) -> tuple[Tensor, Tensor]:
    """About EXACT_ROWS row numbers, and the fp64 log-probabilities of those rows."""
    T = x.targets.shape[0]
    rows = torch.arange(0, T, max(1, T // EXACT_ROWS), device=x.targets.device)
    return rows, exact_logp(x, rows)


def exact_kl(x: Inputs, rows: Tensor) -> Tensor:
    """(len(rows),) fp64 KL of the same inputs."""
    weight, kls = x.weight.double(), []
    for part in rows.split(64):
        raw = (hidden[part].double() @ weight.T for hidden in (x.hidden, x.ref_hidden))
        cap = x.case.softcap
        log_p, log_q = ((z if cap is None else cap * torch.tanh(z / cap)).log_softmax(1) for z in raw)
        kls.append((log_p.exp() * (log_p - log_q)).sum(1))
    return torch.cat(kls)


def row_start(case: Case, T: int, dtype: str, variant: str, skipped: str | None) -> dict:
    """The fields that every row of a measurement has, after those of its origin."""
    return {
        "time": now(),
        "op": "linear_logprob",
        "case": case.name,
        "H": case.H,
        "V": case.V,
        "T": T,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "variant": variant,
        "skipped": skipped,
    }


def measure(case: Case, T: int, dtype: str, names: Sequence[str], rounds: int, where: dict) -> list[dict]:
    """One row per variant.

    Args:
        case, T, dtype: the inputs, see :func:`benchmarks.variants.make_inputs`.
        names: keys of VARIANTS; "gemm", the unit, is always measured.
        rounds: timed rounds.
        where: fields of the origin, see :func:`benchmarks.rows.origin`.
    """
    with open("/proc/meminfo", encoding="utf-8") as lines:
        available = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    variants = {name: variant for name, variant in VARIANTS.items() if name == "gemm" or name in names}
    skipped = {name: variant.why_not(case, T, available) for name, variant in variants.items()}
    if skipped["gemm"] is not None:
        raise MemoryError(f"the bare GEMM at {case.name}, T {T}, {dtype}: {skipped['gemm']}")
    running = [name for name in variants if skipped[name] is None]
    # Each in a process of its own, before the inputs are made in this one.
    peaks = {name: peak_extra_bytes(case, T, dtype, name) for name in running}
    x = make_inputs(case, T, dtype)
    seconds, last = interleaved({name: lambda name=name: variants[name].run(x) for name in running}, rounds)
    sample, exact = exact_sample(x)
    kl = exact_kl(x, sample) if any(variants[name].passed in KL_PASSES for name in running) else None
    unit = statistics.median(seconds["gemm"])
    rows = []
    for name, variant in variants.items():
        row = where | row_start(case, T, dtype, name, skipped[name])
        if skipped[name] is None:
            logp = last[name] if variant.passed in PASSES else None
            row |= {
                "backend": select_backend(BACKENDS, "auto", x.hidden, x.weight) if variant.who == "ours" else None,
                "rounds": rounds,
                **summary(seconds[name]),
                "ratio": statistics.median(seconds[name]) / unit,
                "peak_extra_bytes": peaks[name],
                "logp_error": None if logp is None else (logp[sample].double() - exact).abs().max().item(),
            }
            if kl is not None:
                found = last[name]
                row |= {
                    "op": "linear_kl",
                    "kl_error": None if found is None else (found[sample].double() - kl).abs().max().item(),
                }
        rows.append(row)
    return rows


# Peak memory. The kernel keeps the largest resident size of a process (VmHWM) and resets it when 5 is written to
# /proc/self/clear_refs. So: make the inputs, run once at a tiny size (libraries, threads and their buffers are then
# there), give freed memory back, reset, run, read. What a run returns counts. Accurate to about 1 MiB.


def peak_extra_bytes(case: Case, T: int, dtype: str, name: str) -> int:
    """Peak memory of a variant above its inputs, measured in a process of its own, bytes."""
    print(f"{case.name}, T {T}, {dtype}: memory of {name}", flush=True)
    command = (
        f"from benchmarks.measure_cpu import print_peak; print_peak{case.name, T, dtype, name, torch.get_num_threads()}"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"measuring the memory of {name} at {case.name}, T {T}, {dtype} ended with {done.returncode} "
            f"(-9: killed, most likely out of memory)\n{done.stderr}"
        )
    return int(done.stdout.split()[-1])


def print_peak(case: str, T: int, dtype: str, name: str, threads: int) -> None:
    """What the process of :func:`peak_extra_bytes` does."""
    torch.set_num_threads(threads)
    variant: Variant = VARIANTS[name]
    variant.run(make_inputs(WARM_UP, 32, dtype))
    x = make_inputs(CASES[case], T, dtype)
    if variant.compiles:
        variant.run(x)
    print(extra_bytes_of(lambda: variant.run(x)))


def extra_bytes_of(run: Callable[[], object]) -> int:
    """Largest resident size while ``run()`` runs, minus the size before it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as clear:
        clear.write("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as lines:
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def require_green(*tests: str) -> None:
    """Exit unless these tests pass in this checkout."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *tests], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}\n{' '.join(tests)} failed: nothing is measured")


def grid_of(options: argparse.Namespace) -> list[tuple[str, int, str]]:
    """The (case, T, dtype) that the options select."""
    grid = KL_GRID if options.op == "linear_kl" else GRID
    if options.case or options.tokens:
        cases = options.case or dict.fromkeys(case for case, _, _ in grid)
        return list(itertools.product(cases, options.tokens or [512], options.dtype or ["bf16"]))
    return [entry for entry in grid if entry[2] in (options.dtype or DTYPES)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure_cpu",
        description="Time linear_logprob and the KTO step on this CPU. Options with a value may be repeated.",
    )
    add = parser.add_argument
    add("--op", choices=("linear_logprob", "linear_kl"), default="linear_logprob", help="with the KTO step, or the KL")
    add("--case", action="append", choices=CASES, help="a model's head")
    add("--tokens", action="append", type=int, help="T")
    add("--dtype", action="append", choices=DTYPES)
    add("--pass", action="append", choices=(*PASSES, *KTO_PASSES, *KL_PASSES), dest="passes")
    add("--who", action="append", choices=sorted({variant.who for variant in VARIANTS.values()} - {"gemm"}))
    add("--rounds", type=int, default=KEPT_ROUNDS, help=f"timed rounds; rows are kept from {KEPT_ROUNDS} on (5)")
    add("--threads", type=int, default=2, help="of torch (2)")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}; expected 2 or more, for the percentiles")
    kl = options.op == "linear_kl"
    passes = KL_PASSES if kl else (*PASSES, *KTO_PASSES)
    names = [
        name
        for name, variant in VARIANTS.items()
        if variant.passed in passes
        and (options.passes is None or variant.passed in options.passes)
        and (options.who is None or variant.who in options.who)
    ]
    require_green(*(KL_GATE if kl else GATE))
    torch.set_num_threads(options.threads)
    where = origin()
    for case, T, dtype in grid_of(options):
        rows = measure(CASES[case], T, dtype, names, options.rounds, where)
        for row in rows:
            time_ = (
                f"{row['median_ms']:,.1f} ms, {row['ratio']:.2f} GEMMs" if row["skipped"] is None else row["skipped"]
            )
            print(f"  {row['variant']}: {time_}", flush=True)
        if case != "smoke" and options.rounds >= KEPT_ROUNDS:
            print(keep(rows, KL_RESULTS if kl else RESULTS))


if __name__ == "__main__":
    main()
