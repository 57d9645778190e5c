"""report.html: one file that needs nothing else."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from prefopt.report import components
from prefopt.report.figures import Picture
from prefopt.report.html import bullets, document, fold, gallery, grid, section, text
from prefopt.report.metadata import title
from prefopt.report.page_evaluation import evaluations
from prefopt.report.page_facts import data, memory, settings, versions
from prefopt.report.read import Run
from prefopt.report.words import Story, judgement, percent, said_of

SHOWN_SAMPLES, MOST_SAMPLES = 10, 200
REASONS = {"language": "other language", "topic": "off topic"}


def page(
    run: Run,
    story: Story,
    plots: Sequence[Picture],
    evaluated: Mapping[str, Sequence[Picture]] | None = None,
) -> str:
    """The whole page, from a run, its story, the plots of its training, and those of each evaluation by its suite."""
    name = title(run)
    sections = (
        section("What happened", _story(run, story)),
        section("Before and after", _judgement(run)),
        section("Evaluation", evaluations(run, evaluated or {})),
        section("Sample answers", _samples(run)),
        section("Plots", gallery(plots) if plots else "<p>Nothing was logged that could be drawn.</p>"),
        section("Components", _components(run)),
        section("Warnings", _warnings(run)),
        section("Data", data(run)),
        section("Settings", settings(run)),
        section("Memory", memory(run)),
        section("Versions", versions(run)),
    )
    verdict = f'<p class="verdict {story.tone}">{escape(story.verdict)}</p>'
    return document(f"{name}: report", f"{text(name, 'h1')}\n{verdict}", sections)


def _story(run: Run, story: Story) -> str:
    parts = [text(sentence, "p") for sentence in story.sentences]
    if isinstance(run.summary.get("note"), str):
        parts.append(text(run.summary["note"], "p", "note"))
    if run.notes:
        parts.append("<p>About the files of this run:</p>" + bullets(run.notes))
    return "\n".join(parts)


def _judgement(run: Run) -> str:
    judged = judgement(run)
    if judged is None:
        return ""
    rows = []
    for label, (share, low, high) in (("before", judged.before), ("after", judged.after)):
        rows.append(
            f"<span>{label}</span>"
            f'<span class="bar"><i style="width:{100 * share:.1f}%"></i>'
            f'<b style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></b></span>'
            f"<span>{percent(share)}</span>"
        )
    how = run.summary.get("how")
    return (
        f'<div class="bars">{"".join(rows)}</div>\n'
        f'<p class="soft">Share of desirable answers, n = {judged.n}; the line in each bar is its 95 % interval.</p>\n'
        + (text(how, "p") if isinstance(how, str) else "")
        + _reasons(run)
    )


def _reasons(run: Run) -> str:
    """Why answers were judged undesirable, where the judge gave reasons."""
    counts: dict[str, list[int]] = {}
    for sample in run.samples:
        for side, key in enumerate(("before_reason", "after_reason")):
            if isinstance(sample.get(key), str) and sample[key]:
                counts.setdefault(sample[key], [0, 0])[side] += 1
    if not counts:
        return ""
    body = [
        [REASONS.get(reason, reason), before, after]
        for reason, (before, after) in sorted(counts.items(), key=lambda item: -item[1][0])
    ]
    return grid(["why undesirable", "before", "after"], body)


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    shown, rest = run.samples[:SHOWN_SAMPLES], run.samples[SHOWN_SAMPLES:MOST_SAMPLES]
    parts = [f'<p class="soft">The first {len(shown)} of {len(run.samples)}, not picked.</p>']
    parts += [_sample(sample) for sample in shown]
    if rest:
        inner = "".join(_sample(sample) for sample in rest)
        parts.append(fold(f"{len(rest)} more", inner))
    if len(run.samples) > MOST_SAMPLES:
        parts.append(f'<p class="soft">All {len(run.samples)} are in samples.json.</p>')
    return "\n".join(parts)


def _sample(sample: Mapping[str, Any]) -> str:
    answers = "".join(
        _answer(label, sample[label], sample.get(f"{label}_ok"), sample.get(f"{label}_reason"))
        for label in ("before", "after")
    )
    return f'<div class="sample">{text(sample["prompt"], "div", "question")}<div class="answers">{answers}</div></div>'


def _answer(label: str, answer: str, ok: Any, reason: Any) -> str:
    mark, tone = "", ""
    if isinstance(ok, bool):
        tone = " good" if ok else " bad"
        why = f": {escape(REASONS.get(reason, reason))}" if not ok and isinstance(reason, str) and reason else ""
        mark = f' <span class="mark">{"desirable" if ok else "undesirable"}{why}</span>'
    body = text(answer, "div") if answer else '<div class="soft">(nothing)</div>'
    return f'<div class="answer{tone}"><span class="label">{label}{mark}</span>{body}</div>'


def _components(run: Run) -> str:
    head, body = components.table(run)
    notes = (text(sentence, "p", "soft") for sentence in components.notes(run))
    return grid(head, body, "components stacked") + "".join(notes) if body else ""


def _warnings(run: Run) -> str:
    findings = run.record.get("diagnostics")
    if not isinstance(findings, list):
        return ""
    if not findings:
        return "<p>None: the trainer saw nothing that goes wrong quietly.</p>"
    return bullets(map(said_of, findings))
