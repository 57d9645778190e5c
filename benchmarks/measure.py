"""How it is measured: interleaved rounds, the error against fp64, one row per variant."""

import gc
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peak import peak_extra_bytes
from benchmarks.variants import VARIANTS, Inputs, make_inputs, why_not
from prefopt_kernels.ops.linear_logprob.op import select_backend

EXACT_ROWS = 512  # tokens whose log-probability is computed in fp64; spread evenly over all T


def interleaved(
    calls: dict[str, Callable[[], Tensor | None]], rounds: int, say: Callable[[str], None] = print
) -> tuple[dict[str, list[float]], dict[str, Tensor | None]]:
    """Seconds of each call, one sample a round, the calls taking turns; and what each returned last.

    Whatever slows the machine down for a while then slows all of them. One more round first, unrecorded,
    pays for what happens once. The order moves on by one call a round, so that none always follows the
    same neighbour.
    """
    seconds, last = {name: [] for name in calls}, {}
    names = list(calls)
    for i in range(-1, rounds):
        say("warm-up round" if i < 0 else f"round {i + 1} of {rounds}")
        first = i % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            start = time.perf_counter()
            last[name] = calls[name]()
            elapsed = time.perf_counter() - start
            if i >= 0:
                seconds[name].append(elapsed)
    return seconds, last


def exact_logp(x: Inputs, rows: Tensor) -> Tensor:
    """(len(rows),) fp64 log-probabilities of the same inputs."""
    weight, logps = x.weight.double(), []
    for part in rows.split(64):  # 64 x V x 8 bytes of logits at a time
        z = x.hidden[part].double() @ weight.T
        if x.case.softcap is not None:
            z = x.case.softcap * torch.tanh(z / x.case.softcap)
        at_target = z.gather(1, x.targets[part, None]).squeeze(1)
        logps.append(at_target - z.logsumexp(1))
    return torch.cat(logps)


def available_bytes() -> int:
    """What the system could still give, by its own estimate."""
    with open("/proc/meminfo", encoding="utf-8") as lines:
        fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def measure(
    case: Case,
    T: int,
    dtype: str,
    *,
    names: list[str],
    rounds: int,
    threads: int,
    origin: dict,
    say: Callable[[str], None] = print,
) -> tuple[list[dict], dict[str, list[float]]]:
    """A row per variant, and each variant's seconds per round.

    Args:
        case, T, dtype: the inputs, as :func:`benchmarks.variants.make_inputs`.
        names: keys of VARIANTS; "gemm" is measured whether named or not, it is the unit.
        rounds: timed rounds.
        threads: for torch, here and where the memory is measured.
        origin: what :func:`benchmarks.origin.origin` says of the machine and the commit.
        say: told of the progress, a line at a time; the larger groups take many minutes.
    """
    torch.set_num_threads(threads)
    names = [name for name in VARIANTS if name == "gemm" or name in names]
    free = available_bytes()
    skipped = {name: why_not(VARIANTS[name], case, T, free) for name in names}
    if skipped["gemm"] is not None:
        raise MemoryError(f"the bare GEMM at {case.name}, T {T}, {dtype}: {skipped['gemm']}")
    runnable = [name for name in names if skipped[name] is None]
    # Before the inputs are made here: each child makes its own.
    peaks = {}
    for name in runnable:
        say(f"{case.name}, T {T}, {dtype}: memory of {name}")
        peaks[name] = peak_extra_bytes(case, T, dtype, name, threads)

    x = make_inputs(case, T, dtype)
    seconds, last = interleaved({name: lambda name=name: VARIANTS[name].run(x) for name in runnable}, rounds, say)
    sample = torch.arange(0, T, max(1, T // EXACT_ROWS))
    exact = exact_logp(x, sample)
    unit = statistics.median(seconds["gemm"])
    rows = []
    for name in names:
        variant = VARIANTS[name]
        row = {
            **origin,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "op": "linear_logprob",
            "case": case.name,
            "H": case.H,
            "V": case.V,
            "T": T,
            "dtype": dtype,
            "threads": threads,
            "variant": name,
            "skipped": skipped[name],
        }
        if skipped[name] is None:
            logp = last[name] if variant.passed in ("forward", "frozen", "trainable") else None
            row |= {
                "backend": select_backend(x.hidden, x.weight) if variant.who == "ours" else None,
                "rounds": rounds,
                **summary(seconds[name]),
                "ratio": statistics.median(seconds[name]) / unit,
                "peak_extra_bytes": peaks[name],
                "logp_error": None if logp is None else (logp[sample].double() - exact).abs().max().item(),
            }
        rows.append(row)
    return rows, seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile, in milliseconds."""
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p20_ms": 1e3 * p20,
        "p80_ms": 1e3 * p80,
    }
