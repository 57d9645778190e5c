"""linear_logprob and the KTO step beside plain torch, TRL and Liger: `make bench`.

All variants of a group (head, T, dtype) are timed together, in interleaved rounds, and their rows kept.
pytest-benchmark then does what it is good at, the statistics and the comparison, on those same samples:
its clock plays them back.
"""

import pytest

from benchmarks.cases import CASES
from benchmarks.measure import measure
from benchmarks.origin import origin
from benchmarks.rows import keep

KEPT_ROUNDS = 5  # fewer show a number and keep no row


class Playback:
    """A clock that is read before and after each of the given durations."""

    def __init__(self):
        self.readings = iter(())

    def load(self, seconds: list[float]) -> None:
        self.readings = iter([reading for duration in seconds for reading in (0.0, duration)])

    def __call__(self) -> float:
        return next(self.readings)


PLAYBACK = Playback()


@pytest.fixture(scope="session")
def run_origin():
    return origin()


@pytest.fixture(scope="session")
def say(request):
    """Write a line to the terminal at once; a group takes minutes, and pytest holds output back."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{line}", end="", flush=True)

    return write


@pytest.fixture(scope="session")
def group(request, green, run_origin, names, say):
    """Rows by variant, and seconds by variant, of one head, T and dtype; appended to the results."""
    case, T, dtype = request.param
    option = request.config.getoption
    rows, seconds = measure(
        CASES[case],
        T,
        dtype,
        names=names,
        rounds=option("rounds"),
        threads=option("threads"),
        origin=run_origin,
        say=say,
    )
    if case != "smoke" and option("rounds") >= KEPT_ROUNDS:
        keep(rows)
    return {row["variant"]: row for row in rows}, seconds


@pytest.mark.benchmark(timer=PLAYBACK)
def test_linear_logprob(benchmark, group, name):
    rows, seconds = group
    row = rows[name]
    benchmark.group = f"{row['case']} T={row['T']} {row['dtype']}"
    if row["skipped"] is not None:
        pytest.skip(row["skipped"])
    PLAYBACK.load(seconds[name])
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: None, rounds=len(seconds[name]))
