"""report.html, one file without references to others, and README.md, the model card."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.report import components, evaluation, facts
from prefopt.report.figures import Picture
from prefopt.report.metadata import base_model, metadata, title
from prefopt.report.read import Run
from prefopt.report.render import TEMPLATES, render
from prefopt.report.summary import Summary, describe_finding
from prefopt.report.verdict import judgement

REASONS = {"language": "other language", "topic": "off topic"}
Pictures = Mapping[str, Sequence[Picture]]


def page(run: Run, summary: Summary, plots: Sequence[Picture] = (), suite_pictures: Pictures | None = None) -> str:
    """The page.

    Args:
        run: from ``read_run``.
        summary: of the run.
        plots: of training.
        suite_pictures: of each evaluation, by the name of its suite.
    """
    return render(TEMPLATES / "report.html.j2", **_context(run, summary, plots, suite_pictures))


def card(run: Run, summary: Summary, plots: Sequence[Picture] = (), suite_pictures: Pictures | None = None) -> str:
    """The model card, with the metadata that the hub reads; arguments as for ``page``."""
    body = render(TEMPLATES / "card.md.j2", **_context(run, summary, plots, suite_pictures))
    body = re.sub(r"\n{3,}", "\n\n", body)  # the blank lines of parts that are absent
    return f"---\n{metadata(run).to_yaml()}\n---\n\n{body}\n"


def _context(run: Run, summary: Summary, plots: Sequence[Picture], suite_pictures: Pictures | None) -> dict[str, Any]:
    findings = run.record.get("diagnostics")
    return {
        "run": run,
        "title": title(run),
        "base_model": base_model(run),
        "summary": summary,
        "plots": plots,
        "suite_pictures": suite_pictures or {},
        "judged": judgement(run),
        "reasons": _reasons(run),
        "reasons_text": REASONS,
        "warnings": list(map(describe_finding, findings)) if isinstance(findings, list) else None,
        "components": components,
        "evaluation": evaluation,
        "facts": facts,
    }


def _reasons(run: Run) -> list[list[Any]]:
    """How often each reason for an undesirable answer occurs before and after, the most frequent before first."""
    counts: dict[str, list[int]] = {}
    for sample in run.samples:
        for side, key in enumerate(("before_reason", "after_reason")):
            if isinstance(sample.get(key), str) and sample[key]:
                counts.setdefault(sample[key], [0, 0])[side] += 1
    ordered = sorted(counts.items(), key=lambda item: -item[1][0])
    return [[REASONS.get(reason, reason), *both] for reason, both in ordered]
