"""The study's report.html: answers in words, tables and plots, in the style of a run's report."""

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

from prefopt.report.plots import Plot, _for_page
from prefopt.report.style import STYLE
from prefopt.study.findings import Findings, effects, find, remedy_cells, variants
from prefopt.study.grid import Config
from prefopt.study.plots import Drawing, draw_all, label, remedy_label
from prefopt.study.pool import RESULTS, TRACES, read_lines
from prefopt.study.table import Cell, as_csv, by_config, cell_of

TITLE = "BCO's shift: when it is unstable, and what cures it"
SCALE = (
    "A toy: a transformer of 25,000 parameters with LoRA of rank 8, a made-up language, a few hundred steps. It shows "
    "which forms of a loss break and why; how often, and at which learning rate, is another matter in a larger model."
)
DEFINITIONS = (
    "Unstable: a coefficient or a gradient that is not finite; or a gradient norm above 20 times the median of the 50 "
    "norms before it, from step 20 on; or a margin, averaged over 30 steps, that ends at or below 0 or below a fifth of "
    "its highest value.",
    "Naive: 1 - w(sigmoid(v(u))) with Tversky and Kahneman's v (power .88, loss aversion 2.25 inside the sigmoid) and w "
    "(.61), ORPO's log-odds, and a running mean of all rewards as the shift, all in the dtype that the log-probabilities "
    "come in. Ours: enhanced_kto_loss; decision weighting in place of w; the shift an average over windows, class by "
    "class, within .5, from 30 % of the steps on.",
    "bf16: the log-probabilities of a sequence reach the loss in bf16; the naive form computes in it, ours widens first.",
    "Accuracy and margin: on 200 held-out pairs; the margin in reward units (0.1 x nats). Intervals are Wilson's for "
    "shares, the normal approximation for paired differences, all 95 %.",
)


def write_report(out: Path) -> Path:
    """Write table.csv, plots/ and report.html from a study folder's rows.

    Raises:
        FileNotFoundError: there are no rows.
    """
    rows, traces = read_lines(out / RESULTS), read_lines(out / TRACES)
    if not rows:
        raise FileNotFoundError(f"{out / RESULTS} has no rows")
    _replace(out / "table.csv", as_csv(rows))
    drawings = draw_all(rows, traces, out / "plots")
    report = out / "report.html"
    _replace(report, page(rows, find(rows), drawings))
    return report


def page(rows: list[dict], findings: Findings, drawings: list[Drawing]) -> str:
    """The whole page."""
    sections = (
        ("What causes it", _paragraphs(findings.cause) + _effects(rows)),
        ("What cures it", _paragraphs(findings.cure) + _remedies(rows)),
        ("What it costs", _paragraphs(findings.price)),
        ("Plots", _plots(drawings)),
        ("Definitions", _list(DEFINITIONS) + f'<p class="note">{escape(SCALE)}</p>'),
        ("All cells", _all(rows)),
        ("Runs and versions", _versions(rows)),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(TITLE)}</title>\n<style>{STYLE}.plots {{ grid-template-columns: 1fr; }}</style>\n</head>\n"
        f"<body>\n<main>\n<header>\n<h1>{escape(TITLE)}</h1>\n"
        f'<p class="verdict {findings.tone}">{escape(findings.verdict)}</p>\n</header>\n'
        + "".join(f"<section>\n<h2>{name}</h2>\n{body}\n</section>\n" for name, body in sections)
        + "</main>\n</body>\n</html>\n"
    )


def _paragraphs(sentences: Iterable[str]) -> str:
    return "\n".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _effects(rows: list[dict]) -> str:
    body = []
    for precision in ("fp32", "bf16"):
        for effect in effects([row for row in rows if row["precision"] == precision]):
            mean, low, high = (100 * value for value in effect.difference)
            body.append(
                [
                    f"{effect.component}, {precision}",
                    effect.without.words(),
                    effect.with_it.words(),
                    f"{mean:+.0f} points ({low:+.0f} to {high:+.0f})",
                    effect.word,
                ]
            )
    return _table(["component", "unstable without", "unstable with", "difference", ""], body)


def _remedies(rows: list[dict]) -> str:
    tables = []
    for (precision, components), cells in remedy_cells(rows).items():
        name = label(tuple(components.split("+")))
        tables.append(f"<p>Naive form, {escape(name)}, {precision}:</p>")
        body = [[remedy_label(changes), *_numbers(cell)] for changes, cell in cells.items()]
        tables.append(_table(["remedy", "unstable", "accuracy", "margin"], body))
    body = [
        [
            " + ".join(one.changes) or "as it is",
            one.cell.unstable.words(),
            f"{one.cell.accuracy:.3f}",
            f"{one.cell.margin:.2f}",
            f"{one.margin[0]:+.3f} ({one.margin[1]:+.3f} to {one.margin[2]:+.3f})",
        ]
        for one in variants(rows)
    ]
    if body:
        tables.append("<p>Our form, all components, fp32, with some parts changed:</p>")
        head = ["change", "unstable", "accuracy", "margin", "margin less KTO's"]
        tables.append(_table(head, body))
    return "\n".join(tables)


def _numbers(cell: Cell) -> list[str]:
    return [cell.unstable.words(), f"{cell.accuracy:.3f}", f"{cell.margin:.2f}"]


def _plots(drawings: list[Drawing]) -> str:
    figures = []
    for one in drawings:
        svg = _for_page(one.svg, Plot(one.name, one.title, "", (), one.explanation))
        figures.append(f"<figure>{svg}<figcaption>{escape(one.explanation)}</figcaption></figure>")
    return f'<div class="plots">{"".join(figures)}</div>'


def _all(rows: list[dict]) -> str:
    def order(item: tuple[Config, list[dict]]) -> str:
        return str(item[0].fields())

    body = [
        [
            config.form,
            label(config.components),
            config.precision,
            f"{config.learning_rate:g}",
            ", ".join(config.changes) if len(config.changes) < 3 else "all together",
            *_numbers(cell_of(some)),
        ]
        for config, some in sorted(by_config(rows).items(), key=order)
    ]
    head = "form,components,loss in,learning rate,changes,unstable,accuracy,margin".split(",")
    return f"<details><summary>{len(body)} cells</summary>{_table(head, body)}</details>"


def _versions(rows: list[dict]) -> str:
    steps = sorted({row["steps"] for row in rows})
    made = sorted({f"{row['versions']}, commit {row['commit']}" for row in rows})
    return _list([f"{len(rows):,} runs of {', '.join(map(str, steps))} optimizer steps.", *made])


def _table(head: list[str], body: list[list[str]]) -> str:
    if not body:
        return ""
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in body
    )
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _replace(path: Path, text: str) -> None:
    """Write to a new file in the same folder, then put it in place in one step."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(text.encode("utf-8"))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
