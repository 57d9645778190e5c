"""The Triton kernels, cross-compiled for sm_80, sm_90 and sm_100: no spills, and matrix instructions."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.rows import ROOT
from benchmarks.static_report import main

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that one program may have
KERNELS = {"scan", "combine", "check_reference", "target_logits", "product", "finish"}
KERNELS |= {"logit_gradients", "kl_scan", "kl_logit_gradients"}
SEQUENCE_KERNELS = {"sum_tokens", "all_rows", "spread"}  # of sequence_loss, fp32 whatever the model


DTYPES = {80: ["fp16"], 90: ["bf16", "fp32"], 100: ["bf16"]}  # `make static-report` compiles every combination


PROGRAM = """
import sys
from benchmarks.static_report import main

for words in sys.argv[1:]:
    sys.argv[1:] = ["--json", *words.split()]
    main()
"""


@pytest.fixture(scope="module")
def compiled():
    """The rows of the report, compiled in a process of its own, in which triton is not the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    calls = [f"--arch {arch} --dtype {dtype}" for arch, dtypes in DTYPES.items() for dtype in dtypes]
    command = [sys.executable, "-c", PROGRAM, *calls]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_keep_their_registers_and_use_the_matrix_units(arch, compiled):
    rows = [row for row in compiled if row["arch"] == arch]
    for dtype in DTYPES[arch]:
        assert {row["kernel"] for row in rows if row["dtype"] == dtype} >= KERNELS
        if dtype == "fp32":
            assert {row["kernel"] for row in rows if row["dtype"] == dtype} >= SEQUENCE_KERNELS
    for row in rows:
        name = f"{row['kernel']} {row['dtype']} sm_{arch} in {row['calls']}: {row['flags']}"
        assert row["spill_bytes"] == 0, name
        assert row["shared_bytes"] <= SHARED_LIMIT[arch], name
        assert not row["needs_matrix"] or row["matrix_instructions"] > 0, name
    assert any(row["needs_matrix"] for row in rows)


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["static_report"])
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        main()
