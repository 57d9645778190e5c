"""Times, peak memory and the state of a CUDA device, and where a row of it comes from."""

import gc
import subprocess
import time

import torch

from benchmarks.origin import origin, slug, version

FLUSH_BYTES = 256 * 2**20  # several times any L2
# Writes of that much before each sample: one empties the cache, and all together keep the device busy for
# about 1.5 ms on an H100, in which the host launches what is timed, so that its pace is not what is timed.
FLUSHES = 16
STATE = ("clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit")


class Cuda:
    """The first CUDA device, as benchmarks.gpu_worker uses it."""

    device = "cuda"

    def __init__(self):
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def time(self, run) -> tuple[float, float]:
        """Seconds on the device, and seconds until the host had launched everything."""
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

    def allocated(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak(self, run):
        """What ``run()`` returns, and the bytes allocated at its highest point."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated()

    def tidy(self) -> None:
        """Give back what is no longer used; raises where an earlier fault has left the device unusable."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def state(self) -> dict[str, float] | None:
        """Clocks in MHz, temperature in degrees Celsius, power in W; None without nvidia-smi."""
        answers = nvidia_smi(*STATE)
        return answers and {name: float(value) for name, value in answers.items() if value[:1].isdigit()}


def nvidia_smi(*names: str) -> dict[str, str] | None:
    """What it says of the device that torch calls the first."""
    uuid = torch.cuda.get_device_properties(0).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(names)}"]
    try:
        done = subprocess.run([*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.split(",")]
    if done.returncode != 0 or len(values) != len(names):
        return None
    return dict(zip(names, values, strict=True))


def gpu_origin() -> dict:
    """benchmarks.origin of this machine, with the GPU as the device.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: torch.cuda.is_available() is False")
    properties = torch.cuda.get_device_properties(0)
    where = origin()
    peers = ("cut_cross_entropy", "quack_kernels")
    return where | {
        "device": slug(properties.name),
        "gpu": {
            "name": properties.name,
            "architecture": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": (nvidia_smi("driver_version") or {}).get("driver_version"),
            "cuda": torch.version.cuda,
        },
        "versions": where["versions"] | {package: version(package) for package in peers},
    }
