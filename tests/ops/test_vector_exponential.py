"""The vector exponential of csrc/cpu/vector.h, lane by lane, under the undefined-behaviour sanitizer."""

import math
import shutil
import struct
import subprocess

import pytest

from prefopt_kernels.ops import _sources

LARGEST = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
# from -178 to -266, among others, the exponent of two wraps around: a signed sum would overflow
FAR = [-87.34, *(-88.0 - 7 * i for i in range(100)), -1e3, -1e4, -1e9, -3.4e38, -LARGEST, -math.inf]
NEAR = [0.0, -0.0, 1.0, -1.0, 0.34, -0.35, 20.5, 87.9, -10.25, -50.0, -87.3]

PROGRAM = """
#include <stdio.h>
#define PREFOPT_ISA here
#define PREFOPT_LANES %d
#include "cpu/vector.h"
int main() {
  using namespace prefopt::here;
  float x[kLanes];
  while (fread(x, 4, kLanes, stdin) == kLanes) {
    store(x, exp_of(load(x)));
    fwrite(x, 4, kLanes, stdout);
  }
}
"""


def exponentials(folder, lanes: int, values: list[float]) -> list[float]:
    source, program = folder / "exponential.cpp", folder / "exponential"
    source.write_text(PROGRAM % lanes, encoding="utf-8")
    flags = ["-std=c++20", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-Wno-psabi"]
    command = ["g++", *flags, f"-I{_sources.CSRC}", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, encoding="utf-8")
    if "-lubsan" in built.stderr:
        pytest.skip("g++ has no undefined-behaviour sanitizer here")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], input=struct.pack(f"<{len(values)}f", *values), capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, b"")
    return list(struct.unpack(f"<{len(values)}f", ran.stdout))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_lane(tmp_path, lanes):
    """Each value comes in each lane, beside all the others."""
    values = [*FAR, *NEAR, math.nan]
    while math.gcd(len(values), lanes) > 1:
        values.append(-1e4)
    repeated = values * lanes
    for x, y in zip(repeated, exponentials(tmp_path, lanes, repeated), strict=True):
        if math.isnan(x):
            assert math.isnan(y)
        elif x < -87.33654:
            assert y == 0 and math.copysign(1, y) == 1
        else:
            x = struct.unpack("<f", struct.pack("<f", x))[0]
            # 1 ulp: at most 2**-23 of the value
            assert y == pytest.approx(math.exp(x), rel=2**-23, abs=0)
