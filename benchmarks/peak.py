"""Peak memory of one variant above its inputs, in a process of its own.

The kernel keeps the largest resident size a process ever had (VmHWM), and forgets it when 5 is written to
``/proc/self/clear_refs``. So: make the inputs, run once at a tiny size (libraries, threads and their
buffers are then there), give freed memory back (malloc_trim), forget, run, read. What a run leaves behind,
gradients and caches, counts. Exact to a MiB or so: pages that stayed free after the trim are reused and
not seen, and the kernel's counters lag by some hundred KiB.

    python -m benchmarks.peak CASE T DTYPE VARIANT THREADS      prints the bytes
"""

import ctypes
import subprocess
import sys

import torch

from benchmarks.cases import CASES, Case
from benchmarks.variants import VARIANTS, make_inputs

WARM_UP = Case("warm-up", "no model", H=64, V=1000)


def peak_extra_bytes(case: Case, T: int, dtype: str, variant: str, threads: int) -> int:
    """Bytes at the highest point of one run, less those before it."""
    command = [sys.executable, "-m", "benchmarks.peak", case.name, str(T), dtype, variant]
    done = subprocess.run([*command, str(threads)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"measuring the memory of {variant} at {case.name}, T {T}, {dtype} ended with "
            f"{done.returncode} (-9: killed, most likely out of memory)\n{done.stderr}"
        )
    return int(done.stdout.split()[-1])


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields[field].split()[0]) * 1024


def extra_bytes_of(run) -> int:
    """Largest resident size while ``run()`` ran, less the size before."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as forget:
        forget.write("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def main(case: str, T: str, dtype: str, name: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    variant = VARIANTS[name]
    variant.run(make_inputs(WARM_UP, 32, dtype))
    x = make_inputs(CASES[case], int(T), dtype)
    if variant.compiles:
        variant.run(x)
    print(extra_bytes_of(lambda: variant.run(x)))


if __name__ == "__main__":
    main(*sys.argv[1:])
