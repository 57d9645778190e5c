"""Stand-ins for a GPU and for what is measured on it: a clock that the variants move, and a device that reads it."""

from dataclasses import dataclass, field

import torch

from benchmarks.variants import Inputs, Variant

GPU_ROW = {
    "run": "2026-11-20T10:00:00+00:00",
    "device": "some-gpu",
    "gpu": {
        "name": "Some GPU",
        "architecture": "sm_90",
        "multiprocessors": 132,
        "memory_bytes": 80 * 2**30,
        "driver": "580.1",
        "cuda": "13.0",
    },
    "cpu": "Some CPU",
    "instruction_set": [],
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "trl": None},
    "commit": "0123456789abcdef",
    "dirty": False,
}


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds


@dataclass
class Device:
    """What benchmarks.gpu_timing.Cuda is to the worker, on the CPU."""

    clock: Clock
    peak_bytes: int = 5000
    broken: bool = False
    device: str = "cpu"
    tidied: int = 0

    def time(self, run) -> tuple[float, float]:
        start = self.clock()
        run()
        return self.clock() - start, 1e-4

    def allocated(self) -> int:
        return 1000

    def peak(self, run):
        return run(), self.peak_bytes

    def tidy(self) -> None:
        self.tidied += 1
        if self.broken:
            raise RuntimeError("the device is lost")

    def state(self) -> dict[str, float]:
        return {
            "clocks.sm": 1500.0 + self.clock(),
            "clocks.max.sm": 1980.0,
            "temperature.gpu": 40.0,
        }


@dataclass
class Stub:
    """A variant's run: takes these seconds, the last of them for ever, and may raise at a given call."""

    clock: Clock
    seconds: list[float]
    error: BaseException | None = None
    at_call: int = 0
    value: float = -1.0
    calls: list[Inputs] = field(default_factory=list)

    def __call__(self, x: Inputs) -> torch.Tensor:
        call = len(self.calls)
        self.calls.append(x)
        if self.error is not None and call >= self.at_call:
            raise self.error
        self.clock.pass_by(self.seconds[min(call, len(self.seconds) - 1)])
        return torch.full(x.targets.shape, self.value)


def variants(**runs) -> dict[str, Variant]:
    """By name, who_pass or who: variants(gemm=..., ours_frozen=..., trl_frozen=...)."""
    made = {}
    for name, run in runs.items():
        who, _, passed = name.rpartition("_")
        who = who.replace("_", "-")
        made[f"{who}-{passed}" if who else passed] = Variant(who or passed, passed, run)
    return made
