"""How the GPU suite measures: turns, ratios of one round, rows with reasons, and no more time than it has."""

import json
import subprocess

import pytest
import torch

from benchmarks.gpu_variants import GRAD_FILTER, PEERS
from benchmarks.gpu_worker import MAX_ROUNDS, MIN_ROUNDS, work
from benchmarks.variants import Variant
from support.gpu_suite import Clock, Device, Stub, variants

GROUP = ("smoke", 256, "random")
PLANTED = ("smoke", 256, "planted")
# A first call that makes what is kept, a second for the memory, a round to settle: then the timed rounds.
BEFORE_ROUNDS = 3


def run(made, clock, *, groups=(GROUP,), seconds=1000.0, device=None, avoid=(), rho=lambda x: 0.25):
    """The events of a worker with these variants."""
    events = []
    spec = {
        "groups": list(groups),
        "peers": list(PEERS),
        "everything_at": 256,
        "avoid": list(avoid),
        "seconds": seconds,
    }
    device = device or Device(clock)
    work(spec, events.append, device, variants=made, backend="fake", rho=rho, now=clock)
    return events


def rows_of(events) -> dict[str, dict]:
    return {row["variant"]: row for event in events for row in event.get("rows", ())}


@pytest.fixture
def clock():
    return Clock()


def test_a_row_says_everything(clock):
    rows = rows_of(run(variants(gemm=Stub(clock, [0.5]), ours_frozen=Stub(clock, [1.5])), clock))
    assert list(rows) == ["gemm", "ours-frozen"]
    for row in rows.values():
        assert json.loads(json.dumps(row)) == row
        assert (row["case"], row["T"], row["H"], row["V"]) == ("smoke", 256, 64, 1000)
        assert (row["dtype"], row["logits"], row["skipped"]) == ("bf16", "random", None)
        assert row["rounds"] == MIN_ROUNDS  # 2 s a round, and no more than a few seconds of rounds
        assert row["peak_extra_bytes"] == 4000  # highest less the bytes before the first call
        assert row["host_ms"] == 0.1
        assert row["state"]["before"]["clocks.sm"] < row["state"]["after"]["clocks.sm"]
    ours = rows["ours-frozen"]
    assert (ours["backend"], ours["median_ms"], ours["ratio"]) == ("fake", 1500.0, 3.0)
    assert (ours["ratio_p20"], ours["ratio_p80"]) == (3.0, 3.0)
    assert ours["tflops"] == pytest.approx(2 * 2e-12 * 256 * 64 * 1000 / 1.5, rel=1e-12)  # 2 F
    assert rows["gemm"]["backend"] is None and rows["gemm"]["ratio"] == 1.0
    # -1 for each token, against the exact ones
    assert 1 < ours["logp_error"] < 20


def test_the_ratio_is_that_of_the_same_round(clock):
    settled = [1.0] * BEFORE_ROUNDS
    # The machine is slow in three of five rounds; the ratio of the medians would be 4 / 3.
    unit = Stub(clock, [*settled, 1.0, 3.0, 3.0, 3.0, 1.0])
    ours = Stub(clock, [*settled, 2.0, 4.0, 6.0, 6.0, 2.0])
    row = rows_of(run(variants(gemm=unit, ours_frozen=ours), clock))["ours-frozen"]
    assert row["rounds"] == 5
    assert row["median_ms"] == 4000.0
    assert row["ratio"] == 2.0
    # of 4/3, 2, 2, 2, 2: four fifths of the way from the first to the second, and the fourth
    assert row["ratio_p20"] == pytest.approx(4 / 3 + 0.8 * 2 / 3, rel=1e-12)
    assert row["ratio_p80"] == 2.0


def test_the_variants_take_turns(clock):
    made = variants(gemm=Stub(clock, [1.0]), ours_frozen=Stub(clock, [1.0]), trl_frozen=Stub(clock, [1.0]))
    begun = [event["begin"] for event in run(made, clock) if "begin" in event]
    letters = {"gemm": "g", "ours-frozen": "o", "trl-frozen": "t"}
    order = "".join(letters[name] for name in begun)
    # the inputs, then first calls; then a round that is not kept, and five that begin one further each
    assert order == "g" + "got" + "tgo" + "got" + "otg" + "tgo" + "got" + "otg"


def test_short_calls_get_more_rounds(clock):
    made = variants(gemm=Stub(clock, [0.001]), ours_frozen=Stub(clock, [0.001]))
    assert rows_of(run(made, clock))["gemm"]["rounds"] == MAX_ROUNDS


class OddError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "CUDA out of memory."),
        (AssertionError(), "AssertionError: no message"),
        (ImportError("No module named 'cutlass'"), "ImportError: No module named 'cutlass'"),
        (OddError("unsupported shape"), "OddError: unsupported shape"),
        (subprocess.TimeoutExpired("nvcc", 3), "TimeoutExpired"),
    ],
)
@pytest.mark.parametrize("at_call", [0, 1, BEFORE_ROUNDS, BEFORE_ROUNDS + 2])
def test_what_fails_has_a_row_with_the_reason_and_the_rest_is_measured(clock, error, reason, at_call):
    made = variants(
        gemm=Stub(clock, [1.0]),
        trl_frozen=Stub(clock, [1.0], error=error, at_call=at_call),
        ours_frozen=Stub(clock, [2.0]),
    )
    device = Device(clock)
    events = run(made, clock, device=device, groups=[GROUP, ("smoke", 512, "random")])
    assert sum("rows" in event for event in events) == 2 and events[-1] == {"end": True}
    for rows in (rows_of([event]) for event in events if "rows" in event):
        assert reason in rows["trl-frozen"]["skipped"]
        assert "\n" not in rows["trl-frozen"]["skipped"]
        assert "ratio" not in rows["trl-frozen"]
        assert rows["ours-frozen"]["ratio"] == 2.0
    failed = [event for event in events if "failed" in event]
    assert {event["failed"] for event in failed} == {"trl-frozen"}
    assert device.tidied >= 2


def test_without_its_unit_a_group_has_reasons_only(clock):
    made = variants(gemm=Stub(clock, [1.0], error=RuntimeError("no")), ours_frozen=Stub(clock, [1.0]))
    made["gemm"].run.at_call = 2
    rows = rows_of(run(made, clock))
    assert rows["gemm"]["skipped"] == "RuntimeError: no"
    assert rows["ours-frozen"]["skipped"] == "its unit, the bare GEMM, was not measured"


def test_what_a_case_does_not_have_is_not_called(clock):
    made = variants(gemm=Stub(clock, [1.0]), ours_frozen=Stub(clock, [1.0]))
    stub = Stub(clock, [1.0])
    made["quack-frozen"] = Variant("quack", "frozen", stub, lambda case: "no softcap")
    assert rows_of(run(made, clock))["quack-frozen"]["skipped"] == "no softcap"
    assert not stub.calls


def test_numbers_that_are_not_finite_are_no_result(clock):
    made = variants(gemm=Stub(clock, [1.0]), ours_frozen=Stub(clock, [1.0], value=float("nan")))
    row = rows_of(run(made, clock))["ours-frozen"]
    assert row["skipped"] == "ArithmeticError: log-probabilities that are not finite"


def test_planted_logits_have_rows_of_their_own_and_the_share_of_live_tiles(clock):
    made = variants(gemm=Stub(clock, [1.0]), ours_frozen=Stub(clock, [2.0]), ours_skip_frozen=Stub(clock, [1.0]))
    rows = rows_of(run(made, clock, groups=[GROUP, PLANTED]))
    assert list(rows) == ["gemm", "ours-frozen"] + [
        "gemm/planted",
        "ours-frozen/planted",
        "ours-skip-frozen/planted",
    ]
    skip = rows["ours-skip-frozen/planted"]
    assert (skip["keep_rate"], skip["grad_filter"], skip["backend"]) == (0.25, GRAD_FILTER, "fake")
    assert rows["ours-frozen/planted"]["keep_rate"] is None
    inputs = made["ours-frozen"].run.calls
    assert inputs[0].hidden.shape == inputs[-1].hidden.shape
    assert not torch.equal(inputs[0].hidden, inputs[-1].hidden)


def test_an_unknown_share_of_live_tiles_costs_no_timing(clock):
    def rho(x):
        raise AttributeError("no keep_rate")

    made = variants(gemm=Stub(clock, [1.0]), ours_skip_frozen=Stub(clock, [1.0]))
    events = run(made, clock, groups=[PLANTED], rho=rho)
    row = rows_of(events)["ours-skip-frozen/planted"]
    assert (row["skipped"], row["keep_rate"], row["ratio"]) == (None, None, 1.0)
    assert any("no keep_rate" in event.get("say", "") for event in events)


@pytest.mark.parametrize("seconds", [0.0, 3.0, 8.0, 14.0])
def test_a_group_without_enough_time_leaves_no_rows(clock, seconds):
    # 4 s of first calls, 2 s for the round that is not kept, 10 s for five that are
    made = variants(gemm=Stub(clock, [1.0]), ours_frozen=Stub(clock, [1.0]))
    events = run(made, clock, seconds=seconds)
    assert rows_of(events) == {} and events[-1] == {"end": True}
    assert clock() <= 6.0  # it does not begin rounds that it cannot finish


def test_the_groups_that_fit_are_kept(clock):
    made = variants(gemm=Stub(clock, [1.0]), ours_frozen=Stub(clock, [1.0]))
    groups = [("smoke", T, "random") for T in (256, 512, 1024)]
    events = run(made, clock, groups=groups, seconds=40.0)
    assert [event["group"] for event in events if "rows" in event] == groups[:2]
    assert clock() <= 40.0


def test_a_variant_to_avoid_is_not_called_in_its_group(clock):
    stub = Stub(clock, [1.0])
    made = variants(gemm=Stub(clock, [1.0]), ours_frozen=stub)
    second = ("smoke", 512, "random")
    events = run(made, clock, groups=[GROUP, second], avoid=[(GROUP, "ours-frozen", "it crashed")])
    first, other = (rows_of([event]) for event in events if "rows" in event)
    assert first["ours-frozen"]["skipped"] == "it crashed"
    assert other["ours-frozen"]["skipped"] is None
    assert {x.hidden.shape[0] for x in stub.calls} == {512}


def test_a_group_whose_unit_is_to_be_avoided_is_not_begun(clock):
    made = variants(gemm=Stub(clock, [1.0]), ours_frozen=Stub(clock, [1.0]))
    events = run(made, clock, avoid=[(GROUP, "gemm", "it crashed")])
    assert rows_of(events)["gemm"]["skipped"] == "it crashed"
    assert not any("begin" in event for event in events)


def test_a_lost_device_ends_the_process_after_the_reason_is_told(clock):
    made = variants(gemm=Stub(clock, [1.0]), ours_frozen=Stub(clock, [1.0], error=RuntimeError("fault")))
    events = []
    spec = {"groups": [GROUP], "peers": [], "everything_at": 256, "avoid": [], "seconds": 100}
    with pytest.raises(RuntimeError, match="the device is lost"):
        work(spec, events.append, Device(clock, broken=True), variants=made, now=clock)
    assert events[-1] == {"failed": "ours-frozen", "group": GROUP, "reason": "RuntimeError: fault"}
