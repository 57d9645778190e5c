"""``python -m prefopt_kernels.info`` says what is so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prefopt_kernels
from prefopt_kernels import info
from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.linear_logprob import cpu as backend_cpu

ROOT = Path(__file__).resolve().parents[1]


def test_prints_versions_threads_and_every_backend():
    run = subprocess.run(
        [sys.executable, "-m", "prefopt_kernels.info"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    lines = dict(line.split("  ", 1) for line in run.stdout.splitlines())
    values = {name.strip(): value.strip() for name, value in lines.items()}
    assert values["prefopt_kernels"].startswith(prefopt_kernels.__version__ + " ")
    assert values["torch"].startswith(torch.__version__ + ",")
    assert values["threads"].startswith("1 of ")
    for name, reason in info.backends(torch.device("cpu")).items():
        assert values[f"{name} on cpu"] == ("yes" if reason is None else f"no: {reason}")


def test_build_ends_with_0_where_the_kernels_are_there_and_with_1_and_the_reason_elsewhere(monkeypatch, capsys):
    for reason, code in ((None, 0), ("the disk is full", 1)):
        monkeypatch.setattr(_extension, "why_not", lambda reason=reason: reason)
        monkeypatch.setattr(_extension, "library", lambda: Path("/cache/kernels.so"))
        monkeypatch.setattr(backend_cpu, "instruction_sets", lambda: ("avx2", "generic"))
        with pytest.raises(SystemExit) as ended:
            info.main(["--build"])
        assert ended.value.code == code
        said = capsys.readouterr().out
        assert said == (
            "C++ kernels: avx2, the first of avx2, generic; /cache/kernels.so (built on the fly)\n"
            if reason is None
            else "C++ kernels: no: the disk is full\n"
        )


def test_cpu_agrees_with_torch():
    if not sys.platform.startswith("linux"):
        pytest.skip("the instruction sets are read from Linux's /proc/cpuinfo")
    capability = torch.backends.cpu.get_cpu_capability()
    _, sets = info.cpu()
    if "ATEN_CPU_CAPABILITY" not in os.environ and capability in ("DEFAULT", "AVX2", "AVX512"):
        assert ("avx512f" in sets) == (capability == "AVX512")
        assert ("avx2" in sets) == (capability != "DEFAULT")


def test_a_missing_extension_is_told_with_its_reason(monkeypatch):
    monkeypatch.setattr(_extension, "why_not", lambda: "the disk is full")
    assert dict(info.report())["C++ kernels"] == "no: the disk is full"


def test_a_loaded_extension_is_told_with_its_place_and_instruction_set():
    if _extension.why_not() is not None:
        pytest.skip(f"needs the C++ kernels: {_extension.why_not()}")
    line = dict(info.report())["C++ kernels"]
    assert str(_extension.library()) in line
    assert line.startswith(f"{backend_cpu.instruction_set()}, the first of ")
    assert "generic" in line


def test_environment_variables_in_force_are_told(monkeypatch):
    monkeypatch.delenv("PREFOPT_BACKEND", raising=False)
    assert "PREFOPT_BACKEND" not in dict(info.report())
    monkeypatch.setenv("PREFOPT_BACKEND", "reference")
    assert dict(info.report())["PREFOPT_BACKEND"] == "reference"
