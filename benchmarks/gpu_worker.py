"""Measures groups of the GPU suite and tells of it, in a process of its own: a fault on the device ends the process.

    python -m benchmarks.gpu_worker FD '{"groups": [["qwen3-0.6b", 4096, "random"]], ...}'

It writes to file descriptor FD one JSON object a line (:func:`work` says which); benchmarks.gpu_suite
starts it and reads them.
"""

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.gpu_timing import Cuda
from benchmarks.gpu_variants import GRAD_FILTER, chosen, gpu_variants, keep_rate
from benchmarks.measure import EXACT_ROWS, exact_logp, summary
from benchmarks.variants import Inputs, Variant, gemm, make_inputs

try:
    from triton.errors import TritonError
except ImportError:  # ours and most peers then say so, each in its row
    TritonError = RuntimeError

DTYPE = "bf16"
BACKEND = "triton"
GROUP_SECONDS = 4.0  # of timed rounds
MIN_ROUNDS, MAX_ROUNDS = 5, 25
PRODUCTS = {"gemm": 1, "forward": 1, "frozen": 2, "trainable": 3}  # the fewest of a pass, each F

# What a variant may end with: it becomes the reason in its row. Anything else ends the process, and
# benchmarks.gpu_suite starts another one without that variant.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,  # out of memory, faults on the device, torch.compile
    TypeError,
    ValueError,
    subprocess.SubprocessError,
    TritonError,
)


def work(
    spec: dict,
    emit: Callable[[dict], None],
    device,
    *,
    variants: dict[str, Variant] | None = None,
    backend: str = BACKEND,
    rho: Callable[[Inputs], float] = keep_rate,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Measure group after group until the time is up.

    Args:
        spec: "groups", a list of (case, T, logits); "peers"; "everything_at", the T at which a group has
            the variants that compile anew at each size; "avoid", a list of (group, variant, reason);
            "seconds" to take at most.
        emit: told {"say": line}; {"begin": variant, "group": group} before each call of a variant;
            {"failed": variant, "group": group, "reason": text}; {"rows": list, "group": group}; and, at the
            end, {"end": True}.
        device: benchmarks.gpu_timing.Cuda, or what has its attributes.
        variants: benchmarks.gpu_variants.gpu_variants(backend) unless given.
        backend: of ours.
        rho: the share of tiles that ours-skip keeps.
    """
    until = now() + spec["seconds"]
    variants = gpu_variants(backend) if variants is None else variants
    avoid: dict[tuple, dict[str, str]] = {}
    for group, name, reason in spec["avoid"]:
        avoid.setdefault(tuple(group), {})[name] = reason
    for group in map(tuple, spec["groups"]):
        if now() >= until:
            break
        _, T, logits = group
        names = chosen(variants, logits, spec["peers"], T == spec["everything_at"])
        measure = GroupMeasurement(group, names, avoid.get(group, {}), emit, device, backend, rho, now)
        rows = measure.rows(until)
        if rows is None:
            break
        emit({"rows": rows, "group": group})
    emit({"end": True})


class GroupMeasurement:
    """One (case, T, logits): first calls, then rounds in which the variants take turns, then rows."""

    def __init__(self, group, variants, avoid, emit, device, backend, rho, now):
        self.group = case, self.T, self.logits = group
        self.case = CASES[case]
        self.variants = variants
        self.emit, self.device, self.backend, self.rho, self.now = emit, device, backend, rho, now
        # Why a variant is not measured; None for those that are.
        self.reasons = {name: avoid.get(name) or variant.why_not(self.case) for name, variant in variants.items()}
        self.found: dict[str, dict] = {}
        self.round_count = 0
        self.state: dict[str, dict | None] = {}
        self.samples: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}

    def rows(self, until: float) -> list[dict] | None:
        """One for each variant; None where the time ended before there were enough rounds."""
        self.emit({"say": f"{self.group[0]}, T {self.T:,}, {self.logits} logits"})
        made = self._attempt("gemm", self._inputs) if self.reasons["gemm"] is None else None
        if made is not None:
            if not self._first_calls(*made, until) or not self._rounds(made[0], until):
                return None
        if self.reasons["gemm"] is not None:
            for name, reason in self.reasons.items():
                self.reasons[name] = reason or "its unit, the bare GEMM, was not measured"
        return [self._row(name) for name in self.variants]

    def _inputs(self) -> tuple[Inputs, Tensor, Tensor]:
        """The inputs, some of the rows, and the exact log-probabilities of those."""
        device = self.device.device
        x = make_inputs(self.case, self.T, DTYPE, device=device, logits=self.logits)
        sample = torch.arange(0, self.T, max(1, self.T // EXACT_ROWS), device=device)
        exact = exact_logp(x, sample)
        gemm(x)  # the library's workspace is there before any variant's memory is read
        return x, sample, exact

    def _attempt(self, name: str, action: Callable):
        """What the action returns; None, and the reason kept, where it fails."""
        self.emit({"begin": name, "group": self.group})
        try:
            return action()
        except FAILURES as error:
            self.reasons[name] = in_a_line(error)
        # Said before the device is used again, which after some faults ends the process.
        self.emit({"failed": name, "group": self.group, "reason": self.reasons[name]})
        self.device.tidy()
        return None

    def _running(self) -> list[str]:
        return [name for name, reason in self.reasons.items() if reason is None]

    def _first_calls(self, x: Inputs, sample: Tensor, exact: Tensor, until: float) -> bool:
        """Compilation, memory and errors; False where the time is up."""
        for name in self._running():
            if self.now() >= until:
                return False
            found = self._attempt(name, partial(self._first_call, self.variants[name], x, sample, exact))
            if found is not None:
                self.found[name] = found
        return True

    def _first_call(self, variant: Variant, x: Inputs, sample: Tensor, exact: Tensor) -> dict:
        before = self.device.allocated()
        variant.run(x)  # compiles, tunes, and makes what is kept between calls, which counts
        logp, peak = self.device.peak(lambda: variant.run(x))
        error = None
        if logp is not None and logp.shape == x.targets.shape:
            error = (logp[sample].double() - exact).abs().max().item()
            if not math.isfinite(error):
                raise ArithmeticError("log-probabilities that are not finite")
        skipping = variant.who == "ours-skip"
        return {
            "peak_extra_bytes": peak - before,
            "logp_error": error,
            "grad_filter": GRAD_FILTER if skipping else None,
            "keep_rate": self._keep_rate(x) if skipping else None,
        }

    def _keep_rate(self, x: Inputs) -> float | None:
        try:
            return self.rho(x)
        except FAILURES as error:
            self.emit({"say": f"the share of live tiles is unknown, {in_a_line(error)}"})
        return None

    def _rounds(self, x: Inputs, until: float) -> bool:
        """The timed rounds; False where the time is up before there are MIN_ROUNDS."""
        self.device.tidy()
        gc.disable()  # it would run inside a sample now and then
        try:
            started = self.now()
            self._round(x, -1)  # settles the clocks
            one = max(self.now() - started, 1e-3)
            if self.now() + MIN_ROUNDS * one > until:
                return False
            self.state = {"before": self.device.state()}
            self.round_count = min(MAX_ROUNDS, max(MIN_ROUNDS, int(GROUP_SECONDS / one)))
            for i in range(self.round_count):
                self._round(x, i)
            self.state["after"] = self.device.state()
        finally:
            gc.enable()
        return True

    def _round(self, x: Inputs, i: int) -> None:
        """One sample of each, beginning with another one each time; the one before round 0 is not kept."""
        names = self._running()
        first = i % max(1, len(names))
        for name in names[first:] + names[:first]:
            run = partial(self.variants[name].run, x)
            sample = self._attempt(name, partial(self.device.time, run))
            if sample is not None and i >= 0:
                self.samples[name].append(sample)

    def _row(self, name: str) -> dict:
        variant, reason = self.variants[name], self.reasons[name]
        H, V = self.case.H, self.case.V
        row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "op": "linear_logprob",
            "case": self.case.name,
            "H": H,
            "V": V,
            "T": self.T,
            "dtype": DTYPE,
            "logits": self.logits,
            "threads": torch.get_num_threads(),
            "variant": name if self.logits == "random" else f"{name}/{self.logits}",
            "skipped": reason,
        }
        if reason is not None:
            return row
        seconds = [device for device, _ in self.samples[name]]
        turns = zip(seconds, self.samples["gemm"], strict=True)
        ratios = [device / unit for device, (unit, _) in turns]
        p20, _, _, p80 = statistics.quantiles(ratios, n=5, method="inclusive")
        products = PRODUCTS.get(variant.passed)
        return row | {
            "backend": self.backend if variant.who in ("ours", "ours-skip") else None,
            "rounds": self.round_count,
            **summary(seconds),
            "host_ms": 1e3 * statistics.median(host for _, host in self.samples[name]),
            "ratio": statistics.median(ratios),
            "ratio_p20": p20,
            "ratio_p80": p80,
            "tflops": products and 2e-12 * products * self.T * H * V / statistics.median(seconds),
            "state": self.state,
            **self.found[name],
        }


def in_a_line(error: BaseException) -> str:
    first, *_ = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {first}"


def main(descriptor: str, spec: str) -> None:
    os.set_inheritable(int(descriptor), False)  # what a variant starts must not keep it open
    with open(int(descriptor), "w", encoding="utf-8", buffering=1) as pipe:
        work(json.loads(spec), lambda event: pipe.write(json.dumps(event) + "\n"), Cuda())


if __name__ == "__main__":
    main(*sys.argv[1:])
