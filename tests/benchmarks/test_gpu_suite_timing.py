"""How a CUDA device is timed and described, with a stand-in for torch.cuda and for nvidia-smi."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_timing
from benchmarks.gpu_suite import spawn
from benchmarks.gpu_timing import Cuda, gpu_origin, nvidia_smi
from support.gpu_suite import Clock

PROPERTIES = SimpleNamespace(
    uuid="0a1b",
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
)


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda with a clock that counts milliseconds; returns what was done in its order."""
    done, clock = [], Clock()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")
            self.at = clock()

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return end.at - self.at

    stand_ins = {
        "Event": Event,
        "synchronize": lambda: done.append("synchronize"),
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 5000,
        "reset_peak_memory_stats": lambda: done.append("reset"),
        "empty_cache": lambda: done.append("empty"),
        "get_device_properties": lambda index: PROPERTIES,
        "is_available": lambda: True,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Cuda, "device", "cpu")
    monkeypatch.setattr(gpu_timing, "FLUSH_BYTES", 64)
    return done, clock


def test_the_cache_is_written_over_before_the_first_event(cuda, monkeypatch):
    done, clock = cuda
    device = Cuda()
    assert device._flush.numel() == 64
    monkeypatch.setattr(device, "_flush", SimpleNamespace(zero_=lambda: done.append("flush")))

    def run():
        done.append("run")
        clock.pass_by(2.5)

    seconds, host = device.time(run)
    assert seconds == 2.5e-3 and 0 <= host < 10
    assert done == ["synchronize", *["flush"] * 16, "record", "run", "record", "wait"]


def test_the_peak_is_read_after_the_run(cuda):
    done, _ = cuda
    device = Cuda()
    assert device.allocated() == 1000
    done.clear()
    assert device.peak(lambda: done.append("run") or "result") == ("result", 5000)
    assert done == ["synchronize", "reset", "run", "synchronize"]
    done.clear()
    device.tidy()
    assert done == ["synchronize", "empty"]


def smi(folder, monkeypatch, script):
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_state_is_that_of_this_device(cuda, tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/asked; echo "1755, 1980, 45, [N/A], 700.00"')
    assert Cuda().state() == {
        "clocks.sm": 1755.0,
        "clocks.max.sm": 1980.0,
        "temperature.gpu": 45.0,
        "power.limit": 700.0,
    }
    asked = (tmp_path / "asked").read_text(encoding="utf-8")
    assert asked == (
        "--id=GPU-0a1b --query-gpu=clocks.sm,clocks.max.sm,temperature.gpu,power.draw,power.limit "
        "--format=csv,noheader,nounits\n"
    )


@pytest.mark.parametrize("script", ["echo 'No devices were found'; exit 6", "echo 1, 2", None])
def test_no_answer_is_no_state(cuda, tmp_path, monkeypatch, script):
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        smi(tmp_path, monkeypatch, script)
    assert Cuda().state() is None
    assert nvidia_smi("driver_version") is None


def test_where_a_row_comes_from(cuda, tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, "echo 580.159.04")
    where = gpu_origin()
    assert where["device"] == "nvidia-h100-80gb-hbm3"
    assert where["gpu"] == {
        "name": "NVIDIA H100 80GB HBM3",
        "architecture": "sm_90",
        "multiprocessors": 132,
        "memory_bytes": 80 * 2**30,
        "driver": "580.159.04",
        "cuda": torch.version.cuda,
    }
    assert {"run", "commit", "dirty", "cpu"} <= set(where)
    assert {"torch", "triton", "trl", "liger_kernel", "cut_cross_entropy", "quack_kernels"} <= set(where["versions"])


def test_without_a_device_there_is_no_origin(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        gpu_origin()


def test_the_measuring_process_tells_what_it_measured():
    """The real process, with a stand-in for the device: ours has no kernels for a CPU, and says so."""
    code = (
        "import sys\n"
        "sys.path.insert(0, 'tests')\n"
        "from benchmarks import gpu_worker\n"
        "from support.gpu_suite import Clock, Device\n"
        "class Slow(Device):\n"
        "    def time(self, run):\n"
        "        run()\n"
        "        return 0.5, 0.1\n"
        "gpu_worker.Cuda = lambda: Slow(Clock())\n"
        "gpu_worker.main(*sys.argv[1:])\n"
    )
    heard = []
    group = ["smoke", 64, "random"]
    spec = {"groups": [group], "peers": ["torch"], "everything_at": 0, "avoid": [], "seconds": 60}
    assert spawn(spec, 60, heard.append, command=(sys.executable, "-c", code)) is None
    (rows,) = (event["rows"] for event in heard if "rows" in event)
    times = {row["variant"]: row.get("median_ms") for row in rows}
    assert times == {
        **{name: 500.0 for name in ("gemm", "gemm-frozen", "gemm-trainable")},
        **{f"ours-{passed}": None for passed in ("forward", "frozen", "trainable")},
        **{f"torch-{passed}": 500.0 for passed in ("forward", "frozen", "trainable")},
    }
    reasons = {row["skipped"] for row in rows if row["variant"].startswith("ours")}
    assert all("backend 'triton' cannot run this call" in reason for reason in reasons)
    assert heard[-1] == {"end": True}
