"""The sections of the page that say what a run was made of."""

from html import escape
from typing import Any

from prefopt.report import facts
from prefopt.report.html import cell, fold, grid, mapping, text
from prefopt.report.read import Run


def data(run: Run) -> str:
    """Counts of each set, what it was built from, and the rows that were left out."""
    sets = facts.data_sets(run)
    parts = []
    if sets:
        names = list(dict.fromkeys(name for counts in sets.values() for name in counts))
        body = [
            [facts.COUNT_NAMES.get(name, name.replace("_", " "))]
            + [_short(name, counts.get(name, "")) for counts in sets.values()]
            for name in names
        ]
        parts.append(grid(["", *sets], body))
    sources = facts.built_from(run)
    if sources:
        body = [["" if value is None else value for value in row.values()] for row in sources]
        parts.append("<p>Built by <code>prefopt data build</code> from:</p>")
        parts.append(grid(list(sources[0]), body))
        parts.append(fold("Counts of every stage", f'<pre dir="ltr">{escape(run.counts)}</pre>'))
    if run.bad_rows:
        rows = "".join(
            f"<tr>{text(row.get('file', ''), 'td')}{cell(row.get('line', ''))}"
            f"{text(row.get('reason', ''), 'td', 'text')}</tr>"
            for row in run.bad_rows
        )
        table = (
            '<div class="scroll"><table><thead><tr><th>file</th><th>line</th><th>reason</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
        title = f"Skipped rows (the first {len(run.bad_rows)}; all are in bad_rows.jsonl)"
        parts.append(fold(title, table))
    return "\n".join(parts)


def settings(run: Run) -> str:
    """The method and its options, the optimisation, model and adapter; and how to run it again."""
    parts = [mapping(facts.main_settings(run)), mapping(facts.model_settings(run))]
    rest = facts.other_settings(run)
    if rest:
        parts.append(fold("All other settings", mapping(rest)))
    resumes = facts.resumes(run)
    if resumes:
        parts.append("<p>Training was resumed:</p>")
        parts.append(grid(["when (UTC)", "from step", "options changed"], resumes))
    commands = facts.commands(run)
    if commands:
        parts.append("<p>To do it again, with this folder as RUN:</p>")
        parts.append(f'<pre dir="ltr">{escape(chr(10).join(commands))}</pre>')
    if run.recipe:
        recipe = f'<pre dir="ltr">{escape(run.recipe)}</pre>'
        parts.append(fold("The recipe, with every option spelled out", recipe))
    return "\n".join(part for part in parts if part)


def memory(run: Run) -> str:
    """Before, at the peak and after."""
    return mapping(facts.memory(run))


def versions(run: Run) -> str:
    """Of Python and of the packages that decide the numbers."""
    return mapping(run.record.get("versions"))


def _short(name: str, value: Any) -> Any:
    """A fingerprint by its beginning; run.json has all of it."""
    return value[:12] if name == "fingerprint" and isinstance(value, str) else value
