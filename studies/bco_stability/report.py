"""The study's report.html: answers in words, tables and plots, in the style of a run's report."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from prefopt.files import write_whole
from prefopt.report.figures import Picture, for_page
from prefopt.report.html import document, section, text
from prefopt.report.markdown import plain, table
from studies.bco_stability.findings import find
from studies.bco_stability.grid import Config
from studies.bco_stability.plots import draw_all, label
from studies.bco_stability.pool import RESULTS, TRACES, read_lines
from studies.bco_stability.sections import Table, numbers, sections
from studies.bco_stability.table import as_csv, by_config, cell_of

TITLE = "BCO's shift: when it is unstable, and what cures it"
SCALE = (
    "A toy: a transformer of 20,000 parameters with LoRA of rank 8, a made-up language, a few hundred steps. It shows "
    "which forms of a loss break and why; how often, and at which learning rate, is another matter in a larger model."
)
DEFINITIONS = (
    "Unstable: a coefficient or a gradient that is not finite; or a gradient norm above 20 times the median of the 50 "
    "norms before it, from step 20 on; or a margin, averaged over 30 steps, that ends at or below 0 or below a fifth of "
    "its highest value.",
    "Naive: 1 - w(sigmoid(v(u))) with Tversky and Kahneman's v (power .88, loss aversion 2.25 inside the sigmoid) and w "
    "(.61), ORPO's log-odds, and a running mean of all rewards as the shift, all in the dtype that the log-probabilities "
    "come in. Ours: enhanced_kto_loss as the trainer calls it; decision weighting in place of w; the shift an average "
    "over windows, class by class, within .5, from 30 % of the steps on, and with it bounds on both terms' coefficients.",
    "bf16: the log-probabilities of a sequence reach the loss in bf16; the naive form computes in it, ours widens first.",
    "Accuracy and margin: on 200 held-out pairs; the margin in reward units (0.1 x nats). Intervals are Wilson's for "
    "shares, Student's t for paired differences, all 95 %.",
)


def write_report(out: Path) -> Path:
    """Write table.csv, answers.md, plots/ and report.html from a study folder's rows.

    Raises:
        FileNotFoundError: there are no rows.
    """
    rows, traces = read_lines(out / RESULTS), read_lines(out / TRACES)
    if not rows:
        raise FileNotFoundError(f"{out / RESULTS} has no rows")
    write_whole(out / "table.csv", as_csv(rows))
    write_whole(out / "answers.md", markdown(rows))
    drawings = draw_all(rows, traces, out / "plots")
    report = out / "report.html"
    write_whole(report, page(rows, drawings))
    return report


def markdown(rows: list[dict]) -> str:
    """The answers alone, to be read where Markdown is shown."""
    lines = ["# " + TITLE, plain(find(rows).verdict)]
    for part in sections(rows):
        lines += ["## " + part.title, *map(plain, part.sentences)]
        for one in part.tables:
            lines += [plain(one.caption), table(one.head, one.body)]
    lines += ["## Definitions", "\n".join(f"- {one}" for one in DEFINITIONS), SCALE]
    lines += ["## Runs and versions", "\n".join(f"- {plain(one)}" for one in _origin(rows))]
    return "\n\n".join(lines) + "\n"


def page(rows: list[dict], drawings: list[Picture]) -> str:
    """The whole page."""
    findings = find(rows)
    parts = [(one.title, _paragraphs(one.sentences) + "".join(map(_table, one.tables))) for one in sections(rows)]
    parts += [
        ("Plots", _plots(drawings)),
        ("Definitions", _list(DEFINITIONS) + f'<p class="note">{escape(SCALE)}</p>'),
        ("All cells", _all(rows)),
        ("Runs and versions", _list(_origin(rows))),
    ]
    verdict = f'<p class="verdict {findings.tone}">{escape(findings.verdict)}</p>'
    return document(
        TITLE,
        f"{text(TITLE, 'h1')}\n{verdict}",
        (section(name, body) for name, body in parts),
        ".plots { grid-template-columns: 1fr; }",
    )


def _paragraphs(sentences: Iterable[str]) -> str:
    return "\n".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _plots(drawings: list[Picture]) -> str:
    figures = []
    for one in drawings:
        svg = for_page(one.svg, one.title)
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
            *numbers(cell_of(some)),
        ]
        for config, some in sorted(by_config(rows).items(), key=order)
    ]
    head = "form,components,loss in,learning rate,changes,unstable,accuracy,margin".split(",")
    table = _table(Table("", head, body))
    return f"<details><summary>{len(body)} cells</summary>{table}</details>"


def _origin(rows: list[dict]) -> list[str]:
    steps = sorted({row["steps"] for row in rows})
    made = sorted({f"{row['versions']}, commit {row['commit']}" for row in rows})
    return [f"{len(rows):,} runs of {', '.join(map(str, steps))} optimizer steps.", *made]


def _table(table: Table) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in table.body)
    top = "".join(f"<th>{escape(text)}</th>" for text in table.head)
    caption = f"<p>{escape(table.caption)}</p>" if table.caption else ""
    return f'{caption}<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
