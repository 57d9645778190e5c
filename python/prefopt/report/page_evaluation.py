"""The evaluations of a run on the page."""

from collections.abc import Mapping, Sequence

from prefopt.report import evaluation
from prefopt.report.figures import Picture
from prefopt.report.html import bullets, fold, gallery, grid, text
from prefopt.report.read import Run
from prefopt.report.score import Suite

SHOWN_SAMPLES = 20


def evaluations(run: Run, pictures: Mapping[str, Sequence[Picture]]) -> str:
    """Every suite, or nothing where none was run."""
    return "\n".join(_suite(suite, pictures.get(suite.name, ())) for suite in run.suites)


def _suite(suite: Suite, pictures: Sequence[Picture]) -> str:
    parts = [text(evaluation.title(suite), "h3")]
    parts.append(grid(evaluation.HEAD, evaluation.table(suite), "scores stacked"))
    parts.append(f'<p class="soft">{_about(suite)}</p>')
    if suite.warnings:
        parts.append(f'<div class="note">{bullets(suite.warnings)}</div>')
    if pictures:
        parts.append(gallery(pictures[:1], "wide") + (gallery(pictures[1:]) if pictures[1:] else ""))
    head, body = evaluation.by_category(suite)
    if body:
        parts.append(fold("Share of right answers by category", grid(head, body)))
    samples = evaluation.said(suite)
    if samples:
        parts.append(fold(f"Answers to the first {len(samples[:SHOWN_SAMPLES])}", _samples(samples)))
    parts.append(fold("How it was measured", bullets(suite.how)))
    return "\n".join(parts)


def _about(suite: Suite) -> str:
    names = list(dict.fromkeys(str(one.get("name")) for one in suite.data.values()))
    on = f" On {', '.join(names)}." if names else ""
    made = f" Measured on {suite.made[:10]}." if suite.made else ""
    return (
        "Values with their standard errors, or in brackets the 95 % interval where all outcomes are equal; n counts "
        f"questions, rows or answers.{text(on + made)}"
    )


def _samples(samples: Sequence[tuple[str, list[tuple[str, str]]]]) -> str:
    parts = []
    for question, answers in samples[:SHOWN_SAMPLES]:
        body = "".join(
            f'<div class="answer"><span class="label">{who}</span>{text(answer or "(nothing)", "div")}</div>'
            for who, answer in answers
        )
        parts.append(f'<div class="sample">{text(question, "div", "question")}<div class="answers">{body}</div></div>')
    return "".join(parts)
