"""The GPU suite as a command: no time after a red test, no more time than asked for, and on past every fault."""

import json
import re
import subprocess
import sys
import time
from functools import partial

import pytest

from benchmarks.gpu_suite import GATE, Gate, environment, main, options, plan, run_tests, spawn
from benchmarks.gpu_worker import work
from benchmarks.origin import ROOT
from benchmarks.rows import RESULTS, newest
from support.gpu_suite import GPU_ROW, Clock, Device

GREEN = Gate(None, "", passed=7, skipped=1)
GROUP = ["smoke", 256, "random"]


class Said(list):
    def __call__(self, line):
        self.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self)


def measured_row(group, variant, skipped=None):
    case, T, logits = group
    row = {"time": GPU_ROW["run"], "case": case, "T": T, "dtype": "bf16", "logits": logits}
    row |= {"variant": variant, "skipped": skipped, "threads": 2}
    if skipped is None:
        row |= {"median_ms": 1.5, "ratio": 1.0, "tflops": 700.0, "backend": "triton", "state": {}}
        row |= {"peak_extra_bytes": 1000, "logp_error": 1e-6, "keep_rate": None}
    return row


@pytest.fixture
def command(tmp_path):
    """Run the command with stand-ins; returns (exit status, what it said, the specs of its processes)."""

    def run(*arguments, answers=(), gate=GREEN, origin=lambda: dict(GPU_ROW), clock=None):
        said, specs, clock = Said(), [], clock or Clock()
        answers = iter(answers)

        def spawn(spec, seconds, hear):
            specs.append(json.loads(json.dumps(spec)) | {"limit": seconds})
            return next(answers)(spec, hear)

        status = main(
            ["--out", str(tmp_path), "--case", "smoke", *arguments],
            origin=origin,
            tests=gate if callable(gate) else lambda seconds: gate,
            spawn=spawn,
            now=clock,
            say=said,
        )
        return status, said.text, specs

    return run


def measures_all(spec, hear):
    for group in spec["groups"]:
        hear({"begin": "gemm", "group": group})
        hear(
            {
                "rows": [measured_row(group, name) for name in ("gemm", "ours-forward")],
                "group": group,
            }
        )
    hear({"end": True})


def test_after_a_red_test_nothing_is_timed(command, tmp_path):
    red = Gate("the tests failed: pytest ended with 1", "E assert 1 == 2")
    status, text, specs = command("--tokens", "256", gate=red)
    assert status == 1 and specs == [] and list(tmp_path.iterdir()) == []
    assert "E assert 1 == 2" in text
    assert text.endswith("nothing is timed: the tests failed: pytest ended with 1")


def test_the_tests_get_half_of_the_time(command):
    seen = []
    command("--minutes", "4", gate=lambda seconds: seen.append(seconds) or Gate("red"))
    assert seen == [120.0]


def test_without_a_gpu_nothing_is_measured(command):
    def origin():
        raise RuntimeError("no CUDA device: torch.cuda.is_available() is False")

    status, text, specs = command(origin=origin)
    assert (status, specs) == (1, [])
    assert text == "nothing is measured: no CUDA device: torch.cuda.is_available() is False"


def test_rows_and_tables_are_written(command, tmp_path):
    arguments = ["--tokens", "256", "--tokens", "512", "--logits", "random"]
    status, text, specs = command(*arguments, answers=[measures_all])
    assert status == 0 and len(specs) == 1
    assert specs[0]["groups"] == [["smoke", 256, "random"], ["smoke", 512, "random"]]
    rows = newest(tmp_path)["some-gpu"]
    assert set(rows) == {("smoke", T, "bf16", v) for T in (256, 512) for v in ("gemm", "ours-forward")}
    for row in rows.values():
        assert GPU_ROW.items() <= row.items() and row["tests"] == {"passed": 7, "skipped": 1}
    tables = (tmp_path / "some-gpu" / "2026-11-20.md").read_text(encoding="utf-8")
    assert "| smoke | 512 | 1.50 ms, 700 TFLOP/s | forward |" in tables and tables in text
    assert "op tests: 7 passed, 1 skipped" in text
    assert "Not measured" not in text


def test_absent_peers_are_said_and_not_asked_for(command, monkeypatch):
    from benchmarks import gpu_variants

    monkeypatch.setitem(gpu_variants.PEERS, "cce", "no_such_package")
    status, text, specs = command("--peers", "torch", "cce", answers=[measures_all])
    assert specs[0]["peers"] == ["torch"]
    assert "absent: cce (no-such-package is not installed)" in text
    assert "Absent: cce, no-such-package is not installed." in text
    assert command("--peers", answers=[measures_all])[2][0]["peers"] == []


def test_a_variant_that_ends_the_process_is_left_out_of_the_next(command, tmp_path):
    def crashes(spec, hear):
        hear({"rows": [measured_row(spec["groups"][0], "ours-forward")], "group": spec["groups"][0]})
        hear({"begin": "liger-frozen", "group": spec["groups"][1]})
        return "the process ended with -11"

    def loses_the_device(spec, hear):
        group = spec["groups"][0]
        hear({"begin": "ours-frozen", "group": group})
        hear({"failed": "ours-frozen", "group": group, "reason": "AcceleratorError: misaligned"})
        return "the process ended with 1"

    tokens = ["--tokens", "256", "--tokens", "512", "--logits", "random"]
    status, text, specs = command(*tokens, answers=[crashes, loses_the_device, measures_all])
    assert status == 0
    second = ["smoke", 512, "random"]
    assert [spec["groups"] for spec in specs] == [[GROUP, second], [second], [second]]
    assert specs[1]["avoid"] == [[second, "liger-frozen", "the process ended with -11"]]
    assert specs[2]["avoid"][1:] == [[second, "ours-frozen", "AcceleratorError: misaligned"]]
    assert "liger-frozen ended the measuring process, the process ended with -11" in text
    assert len(newest(tmp_path)["some-gpu"]) == 3


def test_faults_end_after_a_while(command):
    def crashes(spec, hear):
        hear({"begin": "ours-frozen", "group": spec["groups"][0]})
        return "the process ended with -11"

    status, text, specs = command(answers=[crashes] * 100)
    assert status == 1 and len(specs) == 6
    assert "no further one is started" in text and "no row was measured" in text


def test_a_process_that_never_begins_is_not_started_again(command):
    status, text, specs = command(answers=[lambda spec, hear: "the process ended with 1"])
    assert status == 1 and len(specs) == 1
    assert "the measuring process ended outside any call: the process ended with 1" in text


def test_what_was_not_measured_is_listed(command, tmp_path):
    clock = Clock()

    def takes_its_time(spec, hear):
        group = spec["groups"][0]
        hear({"rows": [measured_row(group, "ours-forward")], "group": group})
        clock.pass_by(spec["seconds"])
        hear({"end": True})

    status, text, specs = command("--minutes", "2", answers=[takes_its_time], clock=clock)
    assert status == 0
    assert specs[0]["seconds"] == 120 - 15 and specs[0]["limit"] < 120  # what is left is for the tables
    assert "Not measured in this run: smoke T 4,096 planted; smoke T 8,192 random;" in text
    assert "smoke T 1,024 planted." in (tmp_path / "some-gpu" / "2026-11-20.md").read_text("utf-8")


def test_no_process_starts_when_the_tests_took_the_time(command):
    clock = Clock()
    command(gate=lambda seconds: clock.pass_by(400) or GREEN, answers=[measures_all], clock=clock)
    slow = {"gate": lambda seconds: clock.pass_by(50) or GREEN, "clock": clock}
    status, text, specs = command("--minutes", "1", **slow)
    assert (status, specs) == (1, []) and "Not measured in this run: smoke" in text


def test_ours_unmeasured_is_a_failure(command):
    def fails(spec, hear):
        for group in spec["groups"]:
            rows = [
                measured_row(group, "gemm"),
                measured_row(group, "ours-forward", "OddError: no"),
            ]
            hear({"rows": rows, "group": group})
        hear({"end": True})

    assert command(answers=[fails])[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes is 0.0; expected a number above 0"),
        (["--minutes", "nan"], "--minutes is nan; expected a number above 0"),
        (["--tokens", "0"], "--tokens is 0; expected 1 or more"),
        (["--tokens", "1000"], "--tokens: T is 1000; expected a multiple of 3"),
        (["--case", "gpt"], "invalid choice: 'gpt'"),
        (["--peers", "cse"], "invalid choice: 'cse'"),
        (["--skip-tests"], "unrecognized arguments: --skip-tests"),
        (["--case", "smoke", "--out", str(RESULTS)], "name a folder for its rows with --out"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        options(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_plan_begins_with_what_matters_most():
    groups = plan(options([]))
    assert groups[:3] == [
        ("qwen3-0.6b", 4096, "random"),
        ("qwen3-0.6b", 4096, "planted"),
        ("llama-3.1-8b", 4096, "random"),
    ]
    assert len(groups) == len(set(groups)) == 6 * 4 * 2
    asked = ["--case", "gemma-2-2b", "--tokens", "2048", "--tokens", "512", "--logits", "planted"]
    assert plan(options(asked)) == [("gemma-2-2b", T, "planted") for T in (2048, 512)]


def test_a_commit_is_taken_where_git_knows_none(command, tmp_path):
    unknown = GPU_ROW | {"commit": None, "dirty": None}
    command("--commit", "fedcba9", answers=[measures_all], origin=lambda: dict(unknown))
    assert {row["commit"] for row in newest(tmp_path)["some-gpu"].values()} == {"fedcba9"}
    assert command("--commit", "0123456", answers=[measures_all])[0] == 0
    status, text, specs = command("--commit", "fedcba9")
    assert (status, specs) == (1, [])
    assert text == "nothing is measured: --commit is fedcba9; git says 0123456789abcdef"


# The tests, in a process of their own


def checkout(folder, **tests):
    """A folder with test files of these names and texts."""
    (folder / "tests" / "ops").mkdir(parents=True)
    (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\n", encoding="utf-8")
    for name, text in tests.items():
        (folder / "tests" / "ops" / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


OK = "def test_ok():\n    assert True\n"
TRITON = "test_linear_logprob_triton"


def test_green_tests_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    text = (
        "import os, pytest\n"
        f"{OK}"
        "def test_on_the_device():\n    assert 'TRITON_INTERPRET' not in os.environ\n"
        "def test_no_compiler():\n    assert os.environ['PREFOPT_BUILD'] == 'none'\n"
        "@pytest.mark.skip(reason='other architecture')\ndef test_skipped():\n    pass\n"
    )
    files = {f"{TRITON}_values": text, "test_sequence_loss_triton": OK}
    bad = {"test_linear_logprob_properties": "import no_such_package"}  # not among those chosen
    gate = run_tests(60, checkout(tmp_path, **files, **bad))
    assert (gate.reason, gate.passed, gate.skipped) == (None, 4, 1)


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (
            {TRITON: "def test_bad():\n    assert 1 == 2\n"},
            "the tests failed: pytest ended with [12]",
        ),
        ({TRITON: "import no_such_package"}, "the tests failed: pytest ended with [12]"),
        (
            {TRITON: OK, "test_sequence_loss_triton": "def test_bad():\n    assert 1 == 2\n"},
            "the tests failed: pytest ended with [12]",
        ),
        ({TRITON: "x = 1\n"}, "the tests failed: pytest ended with 5"),
        (
            {TRITON: "import pytest\npytestmark = pytest.mark.skip(reason='no')\n" + OK},
            "no test ran, 1 were skipped",
        ),
        ({"test_linear_logprob_values": OK}, rf"there are no tests at tests/ops/{TRITON}\*\.py"),
    ],
)
def test_red_tests_have_a_reason(tmp_path, tests, reason):
    gate = run_tests(60, checkout(tmp_path, **tests))
    # with pytest-xdist, stopping at the first failure is an interruption: 2
    assert re.fullmatch(reason, gate.reason)
    if "failed" in reason and "5" not in reason:
        assert "1 == 2" in gate.text or "no_such_package" in gate.text


def test_tests_that_do_not_end_are_red(tmp_path):
    slow = {TRITON: "import time\ndef test_slow():\n    time.sleep(60)\n"}
    assert run_tests(1, checkout(tmp_path, **slow)).reason == "the tests did not end within 1 s"


def test_every_part_of_the_gate_is_there():
    assert all(any(ROOT.glob(pattern)) for pattern in GATE)


def test_nothing_but_torch_triton_and_pytest_is_needed():
    """The suite is imported, and the tests it runs are collected, without anything else that is ours to install."""
    code = (
        "import sys\n"
        "for name in sys.argv[1].split(): sys.modules[name] = None\n"
        "import benchmarks.gpu_suite as suite, benchmarks.gpu_worker, benchmarks.table, pytest\n"
        "files = [str(path) for pattern in suite.GATE for path in suite.ROOT.glob(pattern)]\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *files]))\n"
    )
    others = "hypothesis pytest_benchmark transformers trl peft datasets accelerate liger_kernel"
    done = subprocess.run(
        [sys.executable, "-c", code, f"{others} matplotlib cut_cross_entropy quack xdist"],
        cwd=ROOT,
        env=environment() | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_linear_logprob_triton.py::" in done.stdout


# The measuring process


def script(text: str) -> tuple[str, ...]:
    """A process that gets the descriptor and the spec as its arguments, and can ``tell``."""
    start = "import json, os, sys, time\nfd = int(sys.argv[1])\nspec = json.loads(sys.argv[2])\n"
    tell = "def tell(**event): os.write(fd, (json.dumps(event) + '\\n').encode())\n"
    return (sys.executable, "-c", start + tell + text)


def run(text, seconds=30.0, silence=30.0):
    heard = []
    began = time.monotonic()
    why = spawn({"n": 3}, seconds, heard.append, command=script(text), silence=silence)
    return why, heard, time.monotonic() - began


def test_a_process_is_heard_to_its_end():
    text = "print('noise')\nfor i in range(spec['n']): tell(say=str(i))\ntell(end=True)"
    assert run(text)[:2] == (None, [{"say": "0"}, {"say": "1"}, {"say": "2"}, {"end": True}])


@pytest.mark.parametrize(("text", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 11)", -11), ("1 / 0", 1)])
def test_a_process_that_dies_is_told_of(text, status):
    why, heard, _ = run(f"tell(begin='x')\n{text}")
    assert (why, heard) == (f"the process ended with {status}", [{"begin": "x"}])


@pytest.mark.parametrize(("seconds", "silence"), [(30.0, 4.0), (4.0, 30.0)])
def test_a_process_that_hangs_is_ended(seconds, silence):
    why, heard, took = run("tell(begin='x')\ntime.sleep(600)", seconds, silence)
    assert why == "it took longer than 4 s" and heard == [{"begin": "x"}] and took < 20


def test_a_process_left_behind_ends_too(tmp_path):
    sign = tmp_path / "sign"
    child = f"    while True:\n        open({str(sign)!r}, 'w').close()\n        time.sleep(0.01)\n"
    wait = f"while not os.path.exists({str(sign)!r}):\n    time.sleep(0.01)\n"
    why, heard, took = run(f"if not os.fork():\n{child}{wait}tell(end=True)")
    assert (why, heard) == (None, [{"end": True}]) and took < 20
    sign.unlink()
    time.sleep(0.5)
    assert not sign.exists()


# All of it but the device


def test_the_whole_command_on_the_cpu(tmp_path):
    root = checkout(tmp_path / "checkout", **{TRITON: OK})
    said, out = Said(), tmp_path / "out"

    def in_this_process(spec, seconds, hear):
        as_from_a_pipe = json.loads(json.dumps(spec))
        device = WallClock(Clock())
        work(as_from_a_pipe, lambda event: hear(json.loads(json.dumps(event))), device,
             backend="reference", rho=lambda x: 0.2)  # fmt: skip

    status = main(
        ["--out", str(out), "--case", "smoke", "--tokens", "256", "--peers", "torch", "torch-lce"],
        origin=lambda: dict(GPU_ROW),
        tests=partial(run_tests, root=root),
        spawn=in_this_process,
        say=said,
    )
    assert status == 0, said.text
    rows = newest(out)["some-gpu"]
    assert {row["skipped"] for row in rows.values()} == {None}
    assert {
        "gemm",
        "ours-forward",
        "torch-trainable",
        "ours-kto-frozen",
        "ours-skip-frozen/planted",
    } <= {key[3] for key in rows}
    # bf16 logits of size 1 carry an error near 1e-3; ours are fp32
    for passed in ("forward", "frozen", "trainable"):
        ours, torchs = (rows["smoke", 256, "bf16", f"{w}-{passed}"] for w in ("ours", "torch"))
        assert ours["logp_error"] < 1e-5 < torchs["logp_error"]
        assert ours["ratio_p20"] <= ours["ratio"] <= ours["ratio_p80"]
    tables = (out / "some-gpu" / "2026-11-20.md").read_text(encoding="utf-8")
    for title in ("forward", "KTO step, frozen head", "Peak memory", "live tiles"):
        assert title in tables
    assert tables in said.text and "nothing is timed" not in said.text


class WallClock(Device):
    """The stand-in with true times, which the dry run only needs to be above 0."""

    def time(self, run) -> tuple[float, float]:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        return seconds, seconds
