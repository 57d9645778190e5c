"""Memory before, during and after training, in bytes; printed, and kept as memory.json in the run folder."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from prefopt.files import write_whole

NAME = "memory.json"
MIB = 2**20


@contextmanager
def measured(folder: Path, device: torch.device, writes: bool) -> Iterator[None]:
    """Measure a block.

    On a GPU: bytes that torch has allocated, and reserved. On a CPU: resident bytes of this process. The peak is that
    of the block, or that since the start of the process where the system does not reset it; ``peak_since`` says which.

    Args:
        folder: gets memory.json: before_bytes, peak_bytes, after_bytes, device, what, peak_since; on a GPU also
            reserved_before_bytes, reserved_peak_bytes and total_bytes.
        device: where the model is.
        writes: whether this process, the first rank, prints and writes.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with measured(folder, torch.device("cpu"), writes=False):
        ...     pass
        >>> (folder / "memory.json").exists()
        False
    """
    probe = _OnGPU(device) if device.type == "cuda" else _OnCPU()
    found = probe.before()
    if writes:
        print(f"memory before training: {_shown(found, 'before')}", flush=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # of a full disk: the error that stopped the run says more
            _keep(found | probe.after(), folder, writes)
        raise
    _keep(found | probe.after(), folder, writes)


def _keep(found: dict, folder: Path, writes: bool) -> None:
    if writes:
        peak, after = _shown(found, "peak"), _shown(found, "after")
        print(f"memory at its peak: {peak}; after: {after}", flush=True)
        write_whole(folder / NAME, json.dumps(found, indent=2) + "\n")


class _OnGPU:
    def __init__(self, device: torch.device):
        self.device = device

    def before(self) -> dict:
        device = self.device
        torch.cuda.reset_peak_memory_stats(device)
        return {
            "device": torch.cuda.get_device_name(device),
            "what": "allocated by torch",
            "total_bytes": torch.cuda.get_device_properties(device).total_memory,
            "before_bytes": torch.cuda.memory_allocated(device),
            "reserved_before_bytes": torch.cuda.memory_reserved(device),
        }

    def after(self) -> dict:
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(self.device),
            "reserved_peak_bytes": torch.cuda.max_memory_reserved(self.device),
            "peak_since": "training began",
            "after_bytes": torch.cuda.memory_allocated(self.device),
        }


class _OnCPU:
    def __init__(self) -> None:
        self.forgotten, self.start = False, 0

    def before(self) -> dict:
        try:  # Linux forgets the largest size so far when 5 is written here
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.forgotten = True
        except OSError:
            self.forgotten = False
        self.start = _resident()
        return {"device": "cpu", "what": "resident", "before_bytes": self.start}

    def after(self) -> dict:
        after = _resident()
        if self.forgotten:
            peak, since = _high_water(), "training began"
        else:
            peak, since = _largest_ever(), "the process began"
        # the counters lag behind each other by some hundred KiB
        return {
            "peak_bytes": max(peak, self.start, after),
            "peak_since": since,
            "after_bytes": after,
        }


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def _largest_ever() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Unix alone has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _shown(found: dict, when: str) -> str:
    text = f"{found[f'{when}_bytes'] / MIB:,.0f} MiB {found['what']}"
    reserved = found.get(f"reserved_{when}_bytes")
    return text if reserved is None else f"{text} ({reserved / MIB:,.0f} MiB reserved)"
