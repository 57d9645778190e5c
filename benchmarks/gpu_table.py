"""The tables of a GPU, generated from its rows: targets beside what was reached."""

from benchmarks import cells
from benchmarks.cases import (
    CASES,
    GPU_SKIP_KEEP_RATE,
    GPU_SKIP_TARGET,
    GPU_TIME_TARGETS,
    GPU_TRL_TARGET,
    LOGP_ERROR_TARGET,
    gpu_memory_target,
)

TITLES = {
    "torch": "plain torch",
    "compile": "torch.compile",
    "torch-lce": "torch linear_cross_entropy",
    "trl": "TRL",
    "liger": "Liger",
    "liger-sm90": "Liger SM90",
    "cce": "CCE",
    "cce-exact": "CCE exact",
    "quack": "quack (sum only)",
}
PASSES = ("forward", "frozen", "trainable")
KTO_PASSES = ("kto-frozen", "kto-trainable")

TIMES = """\
Time on the device in units of the bare `hidden @ weight.T` of the same round, whose own time stands in the
third column; then the fewest bare products that the pass can be made of. Random logits."""
PLANTED = """\
The same at planted logits, where a `grad_filter` leaves tiles out of the gradients: "live tiles" is the
share that it keeps."""
KTO = "KTO step, with the reference model's forward, in the same unit."
REST = """\
Peak memory above the inputs in MiB, and the largest error of a token's log-probability in nats against
fp64 of the same inputs. Random logits."""


def gpu_section(rows: dict[tuple, dict]) -> str:
    """Markdown for one GPU's rows, as benchmarks.rows.newest returns them."""
    groups = sorted({key[:3] for key in rows}, key=_group_order)
    parts = [
        (TIMES, _times(rows, groups)),
        (PLANTED, _planted(rows, groups)),
        (KTO, _kto(rows, groups)),
        (REST, _rest(rows, groups)),
    ]
    tables = [line for text, made in parts if made for line in (text, "", made, "")]
    return "\n".join([_heading(list(rows.values())), "", *tables, *cells.skipped(rows)])


def _heading(rows: list[dict]) -> str:
    rows = sorted(rows, key=lambda row: row["time"])
    gpu = rows[-1]["gpu"]
    passed = cells.every(rows, lambda row: f"{row['tests']['passed']:,}")
    return (
        f"{gpu['name']} ({gpu['architecture']}, {gpu['multiprocessors']} multiprocessors), driver "
        f"{gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}, backend "
        f"{cells.every(rows, lambda row: row.get('backend'))}; {cells.versions(rows[-1])}; "
        f"{cells.commits(rows)}; op tests passed before it: {passed}. {_clocks(rows)}"
    )


def _clocks(rows: list[dict]) -> str:
    states = [state for row in rows for state in row.get("state", {}).values() if state is not None]

    def span(name: str) -> str:
        values = [state[name] for state in states if name in state]
        return f"{min(values):,.0f} to {max(values):,.0f}" if values else "unknown"

    if not states:
        return "Clocks unknown (no nvidia-smi)."
    return (
        f"SM clock around the rounds {span('clocks.sm')} MHz, at most {span('clocks.max.sm')}; "
        f"{span('temperature.gpu')} degrees Celsius; {span('power.draw')} W."
    )


def _times(rows: dict, groups: list[tuple]) -> str:
    others = _present(rows, PASSES, TITLES)
    ratio_to_trl = ["TRL / ours: target", "TRL / ours"] if "trl" in others else []
    lines = []
    for group, passed, ours in _each(rows, groups, PASSES):
        target = GPU_TIME_TARGETS[passed]
        theirs = [rows.get((*group, f"{who}-{passed}")) for who in others]
        bare = rows.get((*group, "gemm" if passed == "forward" else f"gemm-{passed}"))
        lines.append(
            [
                *_start(rows, group, passed),
                cells.cell(bare, "ratio", cells.ratio),
                cells.ratio(target),
                _reached(target, ours, "ratio", cells.ratio),
                *(cells.cell(row, "ratio", cells.ratio) for row in theirs),
                *(_against_trl(rows, group, passed, ours) if ratio_to_trl else []),
            ]
        )
    header = ["head", "T", "GEMM", "pass", "bare GEMMs", "H100 target", "ours"]
    titles = [TITLES[who] for who in others]
    return cells.table([*header, *titles, *ratio_to_trl], lines) if lines else ""


def _against_trl(rows: dict, group: tuple, passed: str, ours: dict) -> list[str]:
    trl = rows.get((*group, f"trl-{passed}"))
    if trl is None or trl.get("ratio") is None or ours.get("ratio") is None:
        return ["", ""]
    times = trl["ratio"] / ours["ratio"]
    if passed != "frozen":
        return ["", cells.ratio(times)]
    verdict = "met" if times >= GPU_TRL_TARGET else "missed"
    return [f"at least {GPU_TRL_TARGET:.1f}", f"{cells.ratio(times)}, {verdict}"]


def _planted(rows: dict, groups: list[tuple]) -> str:
    others = _present(rows, [f"{passed}/planted" for passed in PASSES], TITLES)
    lines = []
    for group, passed, ours in _each(rows, groups, PASSES, "/planted"):
        skip = rows.get((*group, f"ours-skip-{passed}/planted"))
        rate = None if skip is None else skip.get("keep_rate")
        at_most = GPU_SKIP_TARGET if passed == "frozen" else None
        few = rate is not None and round(rate, 6) <= GPU_SKIP_KEEP_RATE  # a mean in fp32
        theirs = [rows.get((*group, f"{who}-{passed}/planted")) for who in others]
        lines.append(
            [
                *_start(rows, group, passed, "/planted"),
                cells.ratio(GPU_TIME_TARGETS[passed]),
                _reached(GPU_TIME_TARGETS[passed], ours, "ratio", cells.ratio),
                "" if rate is None else f"{rate:.3f}",
                "" if at_most is None else f"{at_most:.2f} up to {GPU_SKIP_KEEP_RATE} live",
                _reached(at_most if few else None, skip, "ratio", cells.ratio),
                *(cells.cell(row, "ratio", cells.ratio) for row in theirs),
            ]
        )
    header = ["head", "T", "GEMM", "pass", "H100 target", "ours, exact", "live tiles"]
    header += ["H100 target", "ours, grad_filter"]
    return cells.table([*header, *(TITLES[who] for who in others)], lines) if lines else ""


def _kto(rows: dict, groups: list[tuple]) -> str:
    others = _present(rows, KTO_PASSES, TITLES)
    lines = [
        [
            *_start(rows, group, passed),
            cells.cell(ours, "ratio", cells.ratio),
            *(cells.cell(rows.get((*group, f"{who}-{passed}")), "ratio", cells.ratio) for who in others),
        ]
        for group, passed, ours in _each(rows, groups, KTO_PASSES)
    ]
    header = ["head", "T", "GEMM", "pass", "ours", *(TITLES[who] for who in others)]
    return cells.table(header, lines) if lines else ""


def _rest(rows: dict, groups: list[tuple]) -> str:
    others = _present(rows, PASSES, TITLES)
    lines = []
    for group, passed, ours in _each(rows, groups, PASSES):
        memory = gpu_memory_target(CASES[group[0]], group[2], passed)
        theirs = [rows.get((*group, f"{who}-{passed}")) for who in others]
        lines.append(
            [
                *(group[0], f"{group[1]:,}", cells.PASS_TITLES[passed], cells.mib(memory)),
                _reached(memory, ours, "peak_extra_bytes", cells.mib),
                *(cells.cell(row, "peak_extra_bytes", cells.mib) for row in theirs),
                cells.error(LOGP_ERROR_TARGET),
                _reached(LOGP_ERROR_TARGET, ours, "logp_error", cells.error),
                *(cells.cell(row, "logp_error", cells.error) for row in theirs),
            ]
        )
    titles = [TITLES[who] for who in others]
    header = ["head", "T", "pass", "MiB: H100 target", "ours", *titles]
    return cells.table([*header, "error: target", "ours", *titles], lines) if lines else ""


def _each(rows: dict, groups: list[tuple], passes: tuple, suffix: str = ""):
    """(group, pass, ours) wherever ours has a row."""
    for group in groups:
        for passed in passes:
            if (*group, f"ours-{passed}{suffix}") in rows:
                yield group, passed, rows[(*group, f"ours-{passed}{suffix}")]


def _present(rows: dict, passes, who: dict[str, str]) -> list[str]:
    """The peers that have a row in one of these passes, in the order of ``who``."""
    variants = {key[3] for key in rows}
    return [name for name in who if any(f"{name}-{passed}" in variants for passed in passes)]


def _start(rows: dict, group: tuple, passed: str, suffix: str = "") -> list[str]:
    gemm = rows.get((*group, f"gemm{suffix}"))
    if gemm is None or gemm["skipped"] is not None:
        unit = "not run"
    else:
        unit = f"{gemm['median_ms']:.2f} ms, {gemm['tflops']:,.0f} TFLOP/s"
    return [group[0], f"{group[1]:,}", unit, cells.PASS_TITLES[passed]]


def _reached(target: float | None, row: dict | None, field: str, write) -> str:
    if row is None:
        return ""
    if row["skipped"] is not None:
        return "not run"
    return cells.against(target, row[field], write, met=", met")


def _group_order(group: tuple[str, int, str]) -> tuple[int, int]:
    return list(CASES).index(group[0]), group[1]
