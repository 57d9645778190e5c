"""Result rows: results/<device>/<date>.jsonl, one JSON object per line, and the provenance that every row carries."""

import importlib.metadata
import json
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from prefopt_kernels.info import cpu

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "trl", "liger_kernel", "transformers")
# In the order of what they bring to a matrix product; the last one present is part of the device's name.
EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def origin() -> dict:
    """The fields shared by all rows of one run: machine, versions, commit."""
    model, found = cpu()
    extensions = [name for name in EXTENSIONS if name in found]
    return {
        "run": now(),
        "device": "-".join(["cpu", slug(model), *extensions[-1:]]),
        "cpu": model,
        "instruction_set": extensions,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {package: version(package) for package in PACKAGES},
        **commit(),
    }


def nvidia_smi(*names: str) -> dict[str, str]:
    """Properties of torch's first CUDA device as nvidia-smi reports them; empty without nvidia-smi."""
    uuid = torch.cuda.get_device_properties(0).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, map(str.strip, text.split(",")), strict=False))


def gpu_origin(kind: str, commit: str | None) -> dict:
    """:func:`origin` with the GPU as the device, and ``commit`` if git has none."""
    where = origin()
    if where["commit"] is None:
        where["commit"] = commit
    elif commit is not None and not where["commit"].startswith(commit):
        raise RuntimeError(f"--commit is {commit}, but git has {where['commit']}")
    where["versions"] |= {package: version(package) for package in ("cut_cross_entropy", "quack_kernels")}
    if kind == "cpu":
        trial = dict.fromkeys(("architecture", "multiprocessors", "driver", "cuda"), "none")
        return where | {"device": f"{where['device']}-trial", "gpu": {"name": f"Trial on {where['cpu']}"} | trial}
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: torch.cuda.is_available() is False")
    properties = torch.cuda.get_device_properties(0)
    gpu = {
        "name": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": nvidia_smi("driver_version").get("driver_version"),
        "cuda": torch.version.cuda,
    }
    return where | {"device": slug(properties.name), "gpu": gpu}


def slug(text: str) -> str:
    """Lower case, with one hyphen for each run of other characters than letters and digits.

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
    """Hash of HEAD, and whether the tree differs from it outside the results; None outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(changes)}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def keep(rows: list[dict], results: Path = RESULTS) -> Path:
    """Append rows of one run to its file; existing rows are never changed."""
    path = results / rows[0]["device"] / f"{rows[0]['run'][:10]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read(results: Path = RESULTS) -> list[dict]:
    """All rows, file by file."""
    rows = []
    for path in sorted(results.glob("*/*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not a JSON object: {error}") from None
    return rows


def newest(
    results: Path = RESULTS, fields: Sequence[str] = ("case", "T", "dtype", "variant")
) -> dict[str, dict[tuple, dict]]:
    """The newest row of every combination of the fields, by device."""
    devices: dict[str, dict[tuple, dict]] = {}
    for row in read(results):
        rows = devices.setdefault(row["device"], {})
        key = tuple(row[field] for field in fields)
        if key not in rows or rows[key]["time"] <= row["time"]:
            rows[key] = row
    return devices
