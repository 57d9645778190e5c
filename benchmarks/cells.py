"""What the tables are made of, for processors and GPUs alike: cells, lines, and where the rows come from."""

PASS_TITLES = {
    "forward": "forward",
    "frozen": "forward + backward, frozen head",
    "trainable": "forward + backward, trainable head",
    "kto-frozen": "KTO step, frozen head",
    "kto-trainable": "KTO step, trainable head",
}


def table(header: list[str], lines: list[list[str]]) -> str:
    """Markdown; columns of words to the left, numbers to the right."""
    words = {"head", "dtype", "pass", "model", "layout", "trainer"}
    rule = ["---" if title in words else "--:" for title in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def every(rows: list[dict], write) -> str:
    """What ``write`` makes of each row, each text once."""
    return ", ".join(dict.fromkeys(filter(None, map(write, rows))))


def versions(row: dict) -> str:
    return ", ".join(
        f"{package.replace('_', '-')} {version}" for package, version in row["versions"].items() if version is not None
    )


def commits(rows: list[dict]) -> str:
    """Days and commits."""

    def commit(row: dict) -> str:
        changed = " with uncommitted changes" if row["dirty"] else ""
        return f"{(row['commit'] or 'unknown')[:7]}{changed}"

    return f"{every(rows, lambda row: row['time'][:10])}, commit {every(rows, commit)}"


def heading(rows: list[dict]) -> str:
    """A processor's: machine, threads, backend, versions, days and commits, each of them that a row names."""
    rows = sorted(rows, key=lambda row: row["time"])
    last, backends = rows[-1], every(rows, lambda row: row.get("backend"))
    machine = f"{last['cpu']} ({', '.join(last['instruction_set'])})"
    threads = every(rows, lambda row: str(row["threads"]))
    backend = f", backend {backends}" if backends else ""
    return f"{machine}, {threads} threads{backend}; {versions(last)}; {commits(rows)}."


def against(target: float | None, reached: float | None, write, met: str = "") -> str:
    """What was reached; ", missed" behind it where it is above the target, ``met`` where it is not."""
    if reached is None:
        return ""
    if target is None:
        return write(reached)
    return f"{write(reached)}, missed" if reached > target else f"{write(reached)}{met}"


def cell(row: dict | None, field: str, write) -> str:
    if row is None:
        return ""
    if row["skipped"] is not None:
        return "not run"
    return "" if row[field] is None else write(row[field])


def ratio(value: float) -> str:
    return f"{value:.2f}"


def mib(value: float) -> str:
    return f"{value / 2**20:,.0f}"


def error(value: float) -> str:
    return f"{value:.0e}"


def skipped(rows: dict[tuple, dict]) -> list[str]:
    """One line for each variant that did not run, with the reason in its row."""
    lines = [
        f"- {case}, T {T:,}, {dtype}, {variant}: not run, {row['skipped']}."
        for (case, T, dtype, variant), row in sorted(rows.items())
        if row["skipped"] is not None
    ]
    return [*lines, ""] if lines else []
