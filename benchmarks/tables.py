"""The tables in README.md, docs/integrations.md and the page of linear_kl, generated from the newest result rows.

python -m benchmarks.tables             rewrites them
python -m benchmarks.tables --check     exits with 1 if they would change
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.cases import (
    CASES,
    DTYPES,
    GPU_SKIP_KEEP_RATE,
    GPU_SKIP_TARGET,
    GPU_TIME_TARGETS,
    GPU_TRL_TARGET,
    KL_PASSES,
    KTO_PASSES,
    LOGP_ERROR_TARGET,
    PASSES,
    TIME_TARGETS,
    memory_target,
)
from benchmarks.rows import RESULTS, ROOT, newest

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
Rows = dict[tuple, dict]  # by (case, T, dtype, variant)

PASS_TITLES = {
    "forward": "forward",
    "frozen": "forward + backward, frozen head",
    "trainable": "forward + backward, trainable head",
    "kto-frozen": "KTO step, frozen head",
    "kto-trainable": "KTO step, trainable head",
}
CPU_PEERS = {"torch": "plain torch", "trl": "TRL", "liger": "Liger"}
GPU_PEERS = CPU_PEERS | {
    "compile": "torch.compile",
    "torch-lce": "torch linear_cross_entropy",
    "liger-sm90": "Liger SM90",
    "cce": "CCE",
    "cce-exact": "CCE exact",
    "quack": "quack (sum only)",
}
SHAPE = ["head", "T", "dtype"]
LEFT_ALIGNED = {"head", "dtype", "pass", "model", "layout", "trainer", "method", "lengths", "step"}


# Pages


def write_page(page: Path, text: str, command: str, source: str, check: bool) -> int:
    """Put ``text`` between the markers of a page.

    Args:
        page: file with the two markers.
        text: Markdown.
        command: module that generates it.
        source: what it is generated from.
        check: change nothing.

    Returns:
        1 if ``check`` and the page would change, else 0.
    """
    old = page.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{page.name} must have {BEGIN} and, after it, {END}, each exactly once")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    new = f"{before}{BEGIN}\n{text}{END}{after}"
    if new != old and check:
        print(f"{page.name}: its tables are not those of the {source}; run python -m {command}")
    elif new != old:
        page.write_text(new, encoding="utf-8")
    return int(check and new != old)


def check_option(command: str, description: str | None, arguments: Sequence[str] | None) -> bool:
    """Parse the command line of a program whose only option is ``--check``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page would change")
    return parser.parse_args(arguments).check


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; columns of words are aligned left, numbers right."""
    rule = ["---" if title in LEFT_ALIGNED else "--:" for title in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


# Cells


def ratio(value: float) -> str:
    return f"{value:.2f}"


def mib(value: float) -> str:
    return f"{value / 2**20:,.0f}"


def error(value: float) -> str:
    return f"{value:.0e}"


def cell(row: dict | None, field: str, write: Callable[[float], str], target: float | None = None) -> str:
    """A measured value, with ", missed" if it is above its target; empty if there is no value."""
    if row is None:
        return ""
    if row["skipped"] is not None:
        return "not run"
    if row[field] is None:
        return ""
    return write(row[field]) + (", missed" if target is not None and row[field] > target else "")


def optional(value: float | None, write: Callable[[float], str]) -> str:
    return "" if value is None else write(value)


# Headings


def distinct(rows: Iterable[dict], write: Callable[[dict], str | None]) -> str:
    return ", ".join(dict.fromkeys(filter(None, map(write, rows))))


def heading(rows: Iterable[dict]) -> str:
    """Machine, threads or clocks, backend, versions, days and commits."""

    def commit(row: dict) -> str:
        return (row["commit"] or "unknown")[:7] + (" with uncommitted changes" if row["dirty"] else "")

    rows = sorted(rows, key=lambda row: row["time"])
    last = rows[-1]
    if "gpu" in last:
        gpu = last["gpu"]
        machine = (
            f"{gpu['name']} ({gpu['architecture']}, {gpu['multiprocessors']} multiprocessors), "
            f"driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}"
        )
    else:
        machine = f"{last['cpu']} ({', '.join(last['instruction_set'])}), "
        machine += f"{distinct(rows, lambda row: str(row['threads']))} threads"
    backends = distinct(rows, lambda row: row.get("backend"))
    backend = f", backend {backends}" if backends else ""
    versions = ", ".join(f"{name.replace('_', '-')} {v}" for name, v in last["versions"].items() if v is not None)
    days = distinct(rows, lambda row: row["time"][:10])
    tests = clocks = ""
    if "gpu" in last:
        tests = "; op tests: " + distinct(rows, _test_counts)
        clocks = f" {_clocks(rows)}"
    return f"{machine}{backend}; {versions}; {days}, commit {distinct(rows, commit)}{tests}.{clocks}"


def _test_counts(row: dict) -> str:
    tests = row["tests"]
    red = tests["failed"] + tests["error"]
    return f"{tests['passed']:,} passed, {red} failed" + ("" if tests["finished"] else ", not finished in time")


def _clocks(rows: list[dict]) -> str:
    states = [state for row in rows for state in row.get("state", {}).values() if state]
    if not states:
        return "Clocks unknown (no nvidia-smi)."

    def span(name: str) -> str:
        values = [state[name] for state in states if name in state]
        return f"{min(values):,.0f} to {max(values):,.0f}" if values else "unknown"

    return (
        f"SM clock {span('clocks.sm')} MHz, maximum {span('clocks.max.sm')} MHz; "
        f"{span('temperature.gpu')} degrees Celsius; {span('power.draw')} W."
    )


# linear_logprob


def render(devices: dict[str, Rows]) -> str:
    """Markdown for all devices; empty if there are no rows."""
    return "\n".join(section(rows) for _, rows in sorted(devices.items()))


def section(rows: Rows) -> str:
    """Markdown for the rows of one device: the tables of times, then memory and errors."""
    gpu = any("gpu" in row for row in rows.values())
    groups = sorted({key[:3] for key in rows}, key=lambda g: (list(CASES).index(g[0]), list(DTYPES).index(g[2]), g[1]))
    parts = [heading(rows.values()), ""]
    times, rest = _times(rows, groups, gpu), _rest(rows, groups, gpu)
    if times:
        parts += [
            "Time in units of the bare `hidden @ weight.T` of the same rounds, whose own time stands in the",
            "fourth column.",
            "",
            times,
            "",
        ]
    if gpu and (planted := _planted(rows, groups)):
        parts += [
            'The same for planted logits, where a `grad_filter` skips tiles; "live tiles" is the share that is kept.',
            "",
            planted,
            "",
        ]
    if rest:
        parts += [
            "Peak memory above the inputs in MiB, and the largest error of a token's log-probability in nats",
            "against fp64 of the same inputs.",
            "",
            rest,
            "",
        ]
    skipped = [
        f"- {case}, T {T:,}, {dtype}, {variant}: not run, {row['skipped']}."
        for (case, T, dtype, variant), row in sorted(rows.items())
        if row["skipped"] is not None
    ]
    return "\n".join([*parts, *skipped, *([""] if skipped else [])])


def _peers(rows: Rows, gpu: bool, passes: Sequence[str]) -> dict[str, str]:
    """The peers that have a column: on a GPU those with a row in one of the passes."""
    if not gpu:
        return CPU_PEERS
    variants = {key[3] for key in rows}
    return {who: title for who, title in GPU_PEERS.items() if any(f"{who}-{one}" in variants for one in passes)}


def _measured(rows: Rows, groups: list[tuple], suffix: str = ""):
    """(group, pass, row of ours) for every pass in which ours has a row."""
    for group in groups:
        for passed in (*PASSES, *KTO_PASSES):
            ours = rows.get((*group, f"ours-{passed}{suffix}"))
            if ours is not None:
                yield group, passed, ours


def _shape(group: tuple) -> list[str]:
    return [group[0], f"{group[1]:,}", group[2]]


def _unit(row: dict | None) -> str:
    """The time of the bare GEMM, with its rate if the row has it."""
    if row is None or row["skipped"] is not None:
        return "" if row is None else "not run"
    if row.get("tflops") is None:
        return f"{row['median_ms']:,.0f} ms"
    return f"{row['median_ms']:.2f} ms, {row['tflops']:,.0f} TFLOP/s"


def _times(rows: Rows, groups: list[tuple], gpu: bool) -> str:
    peers = _peers(rows, gpu, (*PASSES, *KTO_PASSES))
    if gpu:  # the bare products of the whole pass beside ours
        peers = {"gemm": "bare GEMMs"} | peers
    with_trl = gpu and "trl" in peers
    lines = []
    for group, passed, ours in _measured(rows, groups):
        target = (GPU_TIME_TARGETS if gpu else TIME_TARGETS).get((passed, group[2]))
        line = [*_shape(group), _unit(rows.get((*group, "gemm"))), PASS_TITLES[passed]]
        line += [
            "" if target is None else f"{target:.2f}" if gpu else f"{target:.1f}",
            cell(ours, "ratio", ratio, target),
        ]
        line += [cell(rows.get((*group, f"{who}-{passed}")), "ratio", ratio) for who in peers]
        lines.append(line + ([_against_trl(rows.get((*group, f"trl-{passed}")), ours, passed)] if with_trl else []))
    header = [*SHAPE, "GEMM", "pass", "target", "ours", *peers.values()]
    return table(header + ([f"TRL / ours, target {GPU_TRL_TARGET}"] if with_trl else []), lines) if lines else ""


def _against_trl(trl: dict | None, ours: dict, passed: str) -> str:
    if trl is None or trl.get("ratio") is None or ours.get("ratio") is None:
        return ""
    times = trl["ratio"] / ours["ratio"]
    return ratio(times) + (", missed" if passed == "frozen" and times < GPU_TRL_TARGET else "")


def _planted(rows: Rows, groups: list[tuple]) -> str:
    lines = []
    for group, passed, ours in _measured(rows, groups, "/planted"):
        skip = rows.get((*group, f"ours-skip-{passed}/planted"))
        rate = None if skip is None else skip.get("keep_rate")
        few = rate is not None and round(rate, 6) <= GPU_SKIP_KEEP_RATE  # the rate is a mean in fp32
        lines.append(
            [
                *_shape(group),
                _unit(rows.get((*group, "gemm/planted"))),
                PASS_TITLES[passed],
                cell(ours, "ratio", ratio, GPU_TIME_TARGETS.get((passed, group[2]))),
                "" if rate is None else f"{rate:.3f}",
                cell(skip, "ratio", ratio, GPU_SKIP_TARGET if few and passed == "frozen" else None),
                cell(rows.get((*group, f"cce-{passed}/planted")), "ratio", ratio),
            ]
        )
    return table([*SHAPE, "GEMM", "pass", "ours", "live tiles", "ours, grad_filter", "CCE"], lines) if lines else ""


def _rest(rows: Rows, groups: list[tuple], gpu: bool) -> str:
    peers = _peers(rows, gpu, PASSES)
    with_error = {who: title for who, title in peers.items() if gpu or who != "liger"}  # on a CPU it has KTO steps only
    lines = []
    for group, passed, ours in _measured(rows, groups):
        memory = memory_target(CASES[group[0]], group[1], group[2], passed, gpu)
        worst = None if passed in KTO_PASSES else LOGP_ERROR_TARGET
        others = {who: rows.get((*group, f"{who}-{passed}")) for who in peers}
        lines.append(
            [
                *(*_shape(group), PASS_TITLES[passed], optional(memory, mib)),
                cell(ours, "peak_extra_bytes", mib, memory),
                *(cell(row, "peak_extra_bytes", mib) for row in others.values()),
                optional(worst, error),
                cell(ours, "logp_error", error, worst),
                *(cell(others[who], "logp_error", error) for who in with_error),
            ]
        )
    header = [*SHAPE, "pass", "MiB: target", "ours", *peers.values(), "error: target", "ours", *with_error.values()]
    return table(header, lines) if lines else ""


# linear_kl


KL_TITLES = {
    "kl-forward": "forward",
    "kl-logp": "forward + backward through logp, frozen head",
    "kl-frozen": "forward + backward through kl, frozen head",
    "kl-trainable": "forward + backward through kl, trainable head",
}


def linear_kl(results: Path) -> str:
    """Markdown for the rows of `measure_cpu --op linear_kl`."""
    return "\n".join(_kl_section(rows) for _, rows in sorted(newest(results).items()))


def _kl_section(rows: Rows) -> str:
    header = [*SHAPE, "GEMM", "pass", "linear_kl", "two calls of linear_logprob", "plain torch", "Liger"]
    header += ["MiB: linear_kl", "plain torch", "Liger", "error of kl"]
    lines = []
    for group in sorted(
        {key[:3] for key in rows}, key=lambda g: (list(CASES).index(g[0]), list(DTYPES).index(g[2]), g[1])
    ):
        for passed in KL_PASSES:
            ours, two, torch, liger = (
                rows.get((*group, f"{who}-{passed}")) for who in ("ours", "two-calls", "torch", "liger")
            )
            if ours is None:
                continue
            line = [*_shape(group), _unit(rows.get((*group, "gemm"))), KL_TITLES[passed]]
            line += [cell(row, "ratio", ratio) for row in (ours, two, torch, liger)]
            line += [cell(row, "peak_extra_bytes", mib) for row in (ours, torch, liger)]
            lines.append([*line, cell(ours, "kl_error", error)])
    text = [
        heading(rows.values()),
        "",
        "Time in units of the bare `hidden @ weight.T` of the same rounds; memory above the",
    ]
    text += [
        "inputs; the largest error of a token's KL against fp64 of the same inputs, in nats.",
        "",
        table(header, lines),
    ]
    return "\n".join([*text, ""])


# Trainers


def trainers(results: Path) -> str:
    """Markdown for the rows of benchmarks/trainers.py."""
    devices = newest(results, ("op", "case", "T", "dtype", "layers", "rows", "variant"))
    return "\n".join(_trainers_section(rows) for _, rows in sorted(devices.items()))


def _trainers_section(rows: Rows) -> str:
    header = ["head", "trainer", "layers", "sequences", "tokens", "dtype", "TRL, tokens/s", "patched"]
    header += ["PreferenceTrainer", "patched, times as fast", "PreferenceTrainer"]
    lines = []
    for step in sorted({key[:-1] for key in rows}):
        for head in ("trainable", "frozen"):
            trl, *ours = (rows.get((*step, f"{who}-{head}")) for who in ("trl", "ours", "prefopt"))
            if trl is not None:
                name = trl["op"].split("_")[1].upper() + ("" if head == "trainable" else ", head frozen")
                line = [trl["case"], name, *(f"{trl[field]:,}" for field in ("layers", "rows", "T")), trl["dtype"]]
                line += [cell(row, "tokens_per_second", lambda value: f"{value:,.0f}") for row in (trl, *ours)]
                lines.append(line + [cell(row, "ratio", lambda value: f"{1 / value:.1f}") for row in ours])
    return "\n".join([heading(rows.values()), "", table(header, lines), ""])


# Steps


WAYS = {
    "trl": "TRL",
    "trl-patched": "TRL patched",
    "ours-padded": "micro-batches of the data loader, padded",
    "ours-cut": "cut by length",
    "ours-shared": "shared prompts",
    "ours-cut-shared": "cut by length, shared prompts",
    "ours-kl_rows-4": "cut by length, `kl_rows: 4`",
    "ours-previous": "cut by length, `window_values: previous`",
    "ours-exact": "cut by length, `kl_estimator: exact`",
    "ours-exact-previous": "cut by length, `kl_estimator: exact`, `window_values: previous`",
}


def steps(results: Path) -> str:
    """Markdown for the rows of benchmarks/steps.py."""
    devices = newest(results, ("op", "model", "lengths", "variant"))
    return "\n".join(_steps_section(rows) for _, rows in sorted(devices.items()))


def _steps_section(rows: Rows) -> str:
    lines = []
    for step in sorted({key[:-1] for key in rows}):
        found = {who: rows[(*step, who)] for who in WAYS if (*step, who) in rows}
        first, *_ = found.values()
        unit = first["tokens_per_second"]
        for who, row in found.items():
            speed = row["tokens_per_second"]
            lines.append(
                [
                    row["op"].removesuffix("_step"),
                    row["model"],
                    row["lengths"],
                    WAYS[who],
                    f"{speed:,.0f}",
                    f"{speed / unit:.2f}",
                    f"{1 / row['ratio']:.2f}" if "trl-patched" in found else "",
                    mib(row["peak_extra_bytes"]),
                ]
            )
    header = ["method", "model", "lengths", "step", "tokens/s", "times the first row", "times TRL patched", "MiB"]
    return "\n".join([heading(rows.values()), "", table(header, lines), ""])


def losses(results: Path) -> str:
    """Markdown for the rows of benchmarks/losses.py."""
    devices = newest(results, ("method", "sequences", "tokens", "variant"))
    return "\n".join(_losses_section(rows) for _, rows in sorted(devices.items()))


def _losses_section(rows: Rows) -> str:
    lines = []
    for shape in sorted({key[:-1] for key in rows}):
        plain, fused = (rows[(*shape, who)] for who in ("plain", "sequence_loss"))
        each = (f"{1e3 * row['median_ms'] / row['calls']:,.0f}" for row in (plain, fused))
        lines.append([shape[0], f"{shape[1]:,}", f"{shape[2]:,}", *each, ratio(fused["ratio"])])
    header = ["method", "sequences", "tokens of each", "plain functions, us", "sequence_loss, us", "ratio"]
    return "\n".join([heading(rows.values()), "", table(header, lines), ""])


def main(arguments: Sequence[str] | None = None, *, results: Path = RESULTS, root: Path = ROOT) -> int:
    check = check_option("benchmarks.tables", __doc__, arguments)
    pages = {root / "README.md": render(newest(results))}
    pages[root / "docs" / "integrations.md"] = trainers(results / "trainers")
    pages[root / "prefopt_kernels" / "ops" / "sequence_loss" / "README.md"] = losses(results / "sequence_loss")
    pages[root / "docs" / "recipes.md"] = steps(results / "steps")
    pages[root / "prefopt_kernels" / "ops" / "linear_kl" / "README.md"] = linear_kl(results / "linear_kl")
    return max([write_page(page, text, "benchmarks.tables", "rows", check) for page, text in pages.items()])


if __name__ == "__main__":
    sys.exit(main())
