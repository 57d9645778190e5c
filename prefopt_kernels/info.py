"""``python -m prefopt_kernels.info``: what this installation can run, and the reasons for the rest.

``--build`` builds the C++ kernels now instead of at their first use, and exits with 1 if that fails.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path

import torch

import prefopt_kernels
from prefopt_kernels import explain
from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.linear_logprob import cpu as cpu_backend

# The instruction sets that the kernels use, by their names in /proc/cpuinfo.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def cpu() -> tuple[str, list[str]]:
    """The processor's model and those of INSTRUCTION_SETS that it has; /proc/cpuinfo is the source.

    >>> model, sets = cpu()
    >>> set(sets) <= set(INSTRUCTION_SETS)
    True
    """
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, [name for name in INSTRUCTION_SETS if name in flags]


def extension() -> str:
    """The origin and instruction set of the C++ kernels, or why they cannot be used."""
    reason = _extension.why_not()
    if reason is not None:
        return f"no: {reason}"
    installed = _extension.library() == _extension.installed_library()
    origin = "installed" if installed else "built on the fly"
    sets = cpu_backend.instruction_sets()
    return f"{sets[0]}, the first of {', '.join(sets)}; {_extension.library()} ({origin})"


def backends(device: torch.device) -> dict[str, str | None]:
    """Why each backend would refuse a call on ``device``; None where it would run.

    >>> backends(torch.device("cpu"))["reference"] is None
    True
    """
    return explain(torch.zeros(2, 8, device=device), torch.zeros(16, 8, device=device))


def version_of(package: str) -> str:
    """The installed version of a package, or "not installed".

    >>> version_of("no-such-package")
    'not installed'
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> list[tuple[str, str]]:
    """Every line of the output as name and value."""
    model, sets = cpu()
    lines = [
        ("prefopt_kernels", f"{prefopt_kernels.__version__} in {Path(__file__).resolve().parent}"),
        ("python", f"{platform.python_version()} ({platform.platform()})"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        ("triton", version_of("triton")),
        ("cpu", f"{model}: {', '.join(sets) or 'none of ' + ', '.join(INSTRUCTION_SETS)}"),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("C++ kernels", extension()),
    ]
    lines += [(name, os.environ[name]) for name in ("PREFOPT_BACKEND", "PREFOPT_BUILD") if name in os.environ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
        lines.append(("gpu", torch.cuda.get_device_name()))
    else:
        lines.append(("gpu", "none that this torch can use"))
    for device in devices:
        for name, reason in backends(device).items():
            lines.append((f"{name} on {device}", "yes" if reason is None else f"no: {reason}"))
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Prints ``report()``, or builds."""
    parser = argparse.ArgumentParser(
        prog="python -m prefopt_kernels.info", description="What this installation can run."
    )
    parser.add_argument("--build", action="store_true", help="build the C++ kernels if need be")
    build = parser.parse_args(arguments).build
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason for missing C++ kernels is one of the lines
        if build:
            print(f"C++ kernels: {extension()}")
            sys.exit(int(_extension.why_not() is not None))
        lines = report()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
