"""The Triton kernels of sequence_loss compile for GPUs that are not here, without spills."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.origin import ROOT
from prefopt_kernels.ops.sequence_loss import backend_triton

ARCHITECTURES = (80, 90, 100)


@pytest.mark.slow
def test_every_kernel_compiles_and_none_spills():
    """In a process of its own, where triton is not the interpreter."""
    if backend_triton.MISSING is not None:
        pytest.skip(backend_triton.MISSING)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "sequence_loss_static"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for arch in ARCHITECTURES:
        kernels = [row["kernel"] for row in rows if row["arch"] == arch]
        assert sorted(kernels) == ["all_rows"] * 5 + ["spread", "sum_tokens"]
    for row in rows:
        name = f"{row['kernel']} sm_{row['arch']} in {row['calls']}"
        spills = [value for key, value in row.items() if key.startswith("spill")]
        assert spills and not any(spills), name
        assert row["registers"] <= 128, name  # of 4 warps: a quarter of a multiprocessor's 64 Ki
