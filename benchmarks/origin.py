"""Where a row comes from: the machine, the versions, the commit."""

import importlib.metadata
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "trl", "liger_kernel", "transformers")
# In the order of what they bring to a matrix product; the last one present names the device.
EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def origin() -> dict:
    """The fields that all rows of one run share."""
    cpu, extensions = _cpu()
    return {
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "-".join(["cpu", slug(cpu), *extensions[-1:]]),
        "cpu": cpu,
        "instruction_set": extensions,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {package: version(package) for package in PACKAGES},
        **commit(),
    }


def slug(text: str) -> str:
    """Lower case, and one hyphen for each run of anything but letters and digits.

    >>> slug("Intel(R) Xeon(R) Platinum 8488C")
    'intel-r-xeon-r-platinum-8488c'
    """
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict:
    """Hash of HEAD, and whether a file other than the results differs from it; None outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(changes)}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _cpu() -> tuple[str, list[str]]:
    fields = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", "").split()
    return fields.get("model name", "unknown"), [name for name in EXTENSIONS if name in flags]
