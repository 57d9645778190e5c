"""The evaluations of a run as tables of page and card."""

from typing import Any

from prefopt.report.score import BASE, NAMES, RUN, Line, Suite, number, with_error

TITLES = {
    "benchmarks": "Benchmarks",
    "thesis": "Benchmarks",  # its name in eval.json of earlier versions
    "preference": "Held-out preferences",
    "classify": "Classification",
}
VALUES = "Values with their standard errors, or in brackets the 95 % interval if all outcomes are equal"
HEAD = ["", *NAMES.values(), "chance", "n", "in words"]


def title(suite: Suite) -> str:
    """The suite's name for a reader."""
    return TITLES.get(suite.name, suite.name)


def table(suite: Suite) -> list[list[str]]:
    """A line for each metric, as in ``HEAD``: values with their standard errors, the chance line, the verdict."""
    return [
        [
            _label(line),
            with_error(line.base),
            with_error(line.run),
            with_error(line.change, sign=True),
            "" if line.chance is None else number(line.chance),
            f"{line.any.n:,}",
            line.verdict,
        ]
        for line in suite.lines()
    ]


def by_category(suite: Suite) -> tuple[list[str], list[list[Any]]]:
    """Head and body of the table by category; no body where the suite has none."""
    rows = suite.details.get("categories")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not rows:
        return [], []
    head = [", ".join(NAMES.get(part, part) for part in key.split(", ")) for key in rows[0]]
    return head, [[number(value) if isinstance(value, float) else value for value in row.values()] for row in rows]


def samples(suite: Suite) -> list[tuple[str, list[tuple[str, str]]]]:
    """Samples of generated answers: what was asked or is right, and (who, answer) of each model."""
    rows = suite.details.get("samples")
    found = []
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict):
            continue
        if "right" in row:
            answers = [(NAMES[who], row.get(who)) for who in (BASE, RUN)]
            question = f"right: {row['right']}"
        else:
            answers = [(NAMES[BASE], row.get("before")), (NAMES[RUN], row.get("after"))]
            question = str(row.get("prompt", ""))
        found.append((question, [(who, text) for who, text in answers if isinstance(text, str)]))
    return found


def origin(suite: Suite) -> str:
    """The data of the evaluation and its date, as far as they are known."""
    names = ", ".join(dict.fromkeys(str(one.get("name")) for one in suite.data.values()))
    sentences = [f"On {names}."] if names else []
    return " ".join([*sentences, f"Measured on {suite.made[:10]}."] if suite.made else sentences)


def _label(line: Line) -> str:
    """HellaSwag, 10-shot: acc_norm; the unit where it is no share."""
    unit = "" if line.any.unit == "share" else f" ({line.any.unit})"
    return f"{line.any.asked}: {line.metric}{unit}"
