"""Options of `pytest benchmarks`, what it measures, and the gate: red op tests mean no numbers."""

import itertools
import subprocess
import sys

import pytest

from benchmarks.cases import CASES, DTYPES, GRID, PASSES
from benchmarks.origin import ROOT
from benchmarks.variants import VARIANTS

GATE = ("tests/ops", "tests/losses", "tests/test_modules.py")


COMPETITORS = sorted({variant.who for variant in VARIANTS.values()} - {"gemm"})


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of prefopt-kernels; options with a value may be repeated")
    group.addoption("--case", action="append", choices=CASES, help="a model's head")
    group.addoption("--tokens", action="append", type=int, help="T")
    group.addoption("--dtype", action="append", choices=DTYPES)
    group.addoption("--pass", action="append", choices=PASSES, dest="passes")
    group.addoption("--who", action="append", choices=COMPETITORS)
    group.addoption("--rounds", type=int, default=5, help="timed rounds; 5 or more keep their rows")
    group.addoption("--threads", type=int, default=2)


def pytest_configure(config):
    if (rounds := config.getoption("rounds")) < 2:
        raise pytest.UsageError(f"--rounds is {rounds}; expected 2 or more, for the percentiles")


def pytest_generate_tests(metafunc):
    if "group" in metafunc.fixturenames:
        grid, names = chosen(metafunc.config)
        ids = [f"{case}-{T}-{dtype}" for case, T, dtype in grid]
        metafunc.parametrize("group", grid, ids=ids, indirect=True, scope="session")
        metafunc.parametrize("name", names)


def chosen(config) -> tuple[list[tuple[str, int, str]], list[str]]:
    """The (case, T, dtype) and the variants that the options leave."""
    option = config.getoption
    grid = GRID
    if option("case") or option("tokens"):
        cases = option("case") or dict.fromkeys(case for case, _, _ in GRID)
        sizes = itertools.product(cases, option("tokens") or [512], option("dtype") or ["bf16"])
        grid = list(sizes)
    elif option("dtype"):
        grid = [entry for entry in GRID if entry[2] in option("dtype")]
    names = [
        name
        for name, variant in VARIANTS.items()
        if name == "gemm"
        or variant.passed in (option("passes") or PASSES)
        and variant.who in (option("who") or COMPETITORS)
    ]
    return grid, names


@pytest.fixture(scope="session")
def names(request):
    return chosen(request.config)[1]


@pytest.fixture(scope="session")
def green():
    """The op's tests pass in this very checkout, or the session ends before a number is shown."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *GATE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        red = f"{' '.join(GATE)} failed: no numbers from a wrong kernel"
        pytest.exit(f"{done.stdout}{done.stderr}\n{red}", returncode=1)
