"""The study's report.html and answers.md: answers in words, tables and plots."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from prefopt.files import write_whole
from prefopt.report.figures import Picture, for_page
from prefopt.report.markdown import plain, table
from studies.bco_stability.findings import Table, numbers, sections, verdict
from studies.bco_stability.grid import label
from studies.bco_stability.plots import draw_all
from studies.bco_stability.pool import RESULTS, TRACES, read_lines
from studies.bco_stability.table import as_csv, by_config, cell_of

TITLE = "BCO's shift: when it is unstable, and what cures it"
SCALE = (
    "A toy: a transformer of 20,000 parameters with LoRA of rank 8, a made-up language, a few hundred steps. It shows "
    "which forms of a loss break and why; how often, and at which learning rate, is another matter in a larger model."
)
DEFINITIONS = (
    "Unstable: a coefficient or a gradient that is not finite; or a gradient norm above 20 times the median of the 50 "
    "norms before it, from step 20 on; or a margin, averaged over 30 steps, that ends at or below 0 or below a fifth "
    "of its highest value.",
    "Naive: 1 - w(sigmoid(v(u))) with Tversky and Kahneman's v (power .88, loss aversion 2.25 inside the sigmoid) and "
    "w (.61), ORPO's log-odds, and a running mean of all rewards as the shift, all in the dtype of the "
    "log-probabilities. Ours: enhanced_kto_loss as the trainer calls it; decision weighting in place of w; the shift "
    "an average over windows, class by class, within .5, from 30 % of the steps on, and with it bounds on both terms' "
    "coefficients.",
    "bf16: the log-probabilities of a sequence are rounded to bf16 before the loss; the naive form computes in bf16, "
    "ours converts to fp32 first.",
    "Accuracy and margin: on 200 held-out pairs; the margin in reward units (0.1 x nats). Intervals are Wilson's for "
    "shares, Student's t for paired differences, all 95 %.",
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }}
.verdict {{ border-left: .3rem solid #8a949f; padding-left: 1rem; font-size: 1.1rem; }}
.good {{ border-color: #2f8f5b; }} .bad {{ border-color: #d0653a; }}
.scroll {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ border-bottom: 1px solid #8a949f66; padding: .2rem .7rem .2rem 0; text-align: left; }}
figure {{ margin: 1.5rem 0; }} figcaption {{ font-size: .9rem; opacity: .8; }} svg {{ max-width: 100%; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(out: Path) -> Path:
    """Write table.csv, answers.md, plots/ and report.html from a study folder's rows, and return report.html.

    Raises:
        FileNotFoundError: there are no rows.
    """
    rows, traces = read_lines(out / RESULTS), read_lines(out / TRACES)
    if not rows:
        raise FileNotFoundError(f"{out / RESULTS} has no rows")
    write_whole(out / "table.csv", as_csv(rows))
    write_whole(out / "answers.md", markdown(rows))
    report = out / "report.html"
    write_whole(report, page(rows, draw_all(rows, traces, out / "plots")))
    return report


def markdown(rows: list[dict]) -> str:
    """The answers without plots."""
    lines = ["# " + TITLE, plain(verdict(rows)[1])]
    for part in sections(rows):
        lines += ["## " + part.title, *map(plain, part.sentences)]
        for one in part.tables:
            lines += [plain(one.caption), table(one.head, one.body)]
    lines += ["## Definitions", "\n".join(f"- {one}" for one in DEFINITIONS), SCALE]
    lines += ["## Runs and versions", "\n".join(f"- {plain(one)}" for one in _origin(rows))]
    return "\n\n".join(lines) + "\n"


def page(rows: list[dict], drawings: Iterable[Picture]) -> str:
    """The page, with all cells."""
    tone, text = verdict(rows)
    parts = [f"<h1>{escape(TITLE)}</h1>", f'<p class="verdict {tone}">{escape(text)}</p>']
    for one in sections(rows):
        parts += [_heading(one.title), *(f"<p>{escape(sentence)}</p>" for sentence in one.sentences)]
        parts += map(_table, one.tables)
    parts.append(_heading("Plots"))
    for drawing in drawings:
        svg = for_page(drawing.svg, drawing.title)
        parts.append(f"<figure>{svg}<figcaption>{escape(drawing.explanation)}</figcaption></figure>")
    parts += [_heading("Definitions"), _list(DEFINITIONS), f"<p>{escape(SCALE)}</p>", _heading("All cells")]
    cells = _cells(rows)
    parts.append(f"<details><summary>{len(cells.body)} cells</summary>{_table(cells)}</details>")
    parts += [_heading("Runs and versions"), _list(_origin(rows))]
    return PAGE.format(title=escape(TITLE), body="\n".join(parts))


def _cells(rows: list[dict]) -> Table:
    body = [
        [
            *(config.form, label(config.components), config.precision, f"{config.learning_rate:g}"),
            ", ".join(config.changes) if len(config.changes) < 3 else "all together",
            *numbers(cell_of(some)),
        ]
        for config, some in sorted(by_config(rows).items(), key=lambda item: str(item[0].fields()))
    ]
    return Table("", "form,components,loss in,learning rate,changes,unstable,accuracy,margin".split(","), body)


def _origin(rows: list[dict]) -> list[str]:
    steps = sorted({row["steps"] for row in rows})
    made = sorted({f"{row['versions']}, commit {row['commit']}" for row in rows})
    return [f"{len(rows):,} runs of {', '.join(map(str, steps))} optimizer steps.", *made]


def _heading(title: str) -> str:
    return f"<h2>{escape(title)}</h2>"


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _table(table: Table) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in table.body)
    top = "".join(f"<th>{escape(text)}</th>" for text in table.head)
    caption = f"<p>{escape(table.caption)}</p>" if table.caption else ""
    return f'{caption}<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
