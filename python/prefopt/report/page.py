"""report.html: one file that needs nothing else. Every text that comes from data is escaped and finds its own direction."""

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from prefopt.report.plots import Plot
from prefopt.report.read import Run, is_number
from prefopt.report.style import STYLE
from prefopt.report.words import Story, judgement, percent

SHOWN_SAMPLES, MOST_SAMPLES = 10, 200
MAIN_SETTINGS = (
    "method beta desirable_weight undesirable_weight kl_estimator sampler max_length learning_rate lr_scheduler_type "
    "warmup_steps num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps optim "
    "weight_decay max_grad_norm bf16 fp16 precompute_ref_logps seed"
).split()
COUNT_NAMES = {
    "rows": "rows used",
    "bad": "bad rows skipped",
    "truncated": "answers cut at max_length",
    "groups": "different prompts",
}
REASONS = {"language": "other language", "topic": "off topic"}


def page(run: Run, story: Story, plots: list[tuple[Plot, str]]) -> str:
    """The whole page, from a run, its story, and its plots as SVG elements."""
    title = run.summary.get("title")
    title = title if isinstance(title, str) else run.path.resolve().name
    sections = (
        _section("What happened", _story(run, story)),
        _section("Before and after", _judgement(run)),
        _section("Sample answers", _samples(run)),
        _section("Plots", _plots(plots)),
        _section("Warnings", _warnings(run)),
        _section("Data", _data(run)),
        _section("Settings", _settings(run)),
        _section("Versions", _table(run.record.get("versions"))),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<header>\n"
        f'<h1 dir="auto">{escape(title)}</h1>\n'
        f'<p class="verdict {story.tone}">{escape(story.verdict)}</p>\n</header>\n'
        + "".join(sections)
        + "</main>\n</body>\n</html>\n"
    )


def text(value: Any, tag: str = "span", css: str = "") -> str:
    """A text from data: escaped, in its own direction."""
    attribute = f' class="{css}"' if css else ""
    return f'<{tag}{attribute} dir="auto">{escape(str(value))}</{tag}>'


def _section(title: str, body: str) -> str:
    if not body:
        return ""
    anchor = title.lower().replace(" ", "-")
    return f'<section id="{anchor}">\n<h2>{title}</h2>\n{body}\n</section>\n'


def _story(run: Run, story: Story) -> str:
    parts = [text(sentence, "p") for sentence in story.sentences]
    if isinstance(run.summary.get("note"), str):
        parts.append(text(run.summary["note"], "p", "note"))
    if run.notes:
        parts.append("<p>About the files of this run:</p>" + _list(run.notes))
    return "\n".join(parts)


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(text(sentence, "li") for sentence in sentences) + "</ul>"


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
    body = "".join(
        f"<tr>{text(REASONS.get(reason, reason), 'td')}"
        f'<td class="number">{before}</td><td class="number">{after}</td></tr>'
        for reason, (before, after) in sorted(counts.items(), key=lambda item: -item[1][0])
    )
    head = "<tr><th>why undesirable</th><th>before</th><th>after</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    shown, rest = run.samples[:SHOWN_SAMPLES], run.samples[SHOWN_SAMPLES:MOST_SAMPLES]
    parts = [f'<p class="soft">The first {len(shown)} of {len(run.samples)}, not picked.</p>']
    parts += [_sample(sample) for sample in shown]
    if rest:
        inner = "".join(_sample(sample) for sample in rest)
        parts.append(f"<details><summary>{len(rest)} more</summary>{inner}</details>")
    if len(run.samples) > MOST_SAMPLES:
        parts.append(f'<p class="soft">All {len(run.samples)} are in samples.json.</p>')
    return "\n".join(parts)


def _sample(sample: Mapping[str, Any]) -> str:
    answers = "".join(
        _answer(label, sample[label], sample.get(f"{label}_ok"), sample.get(f"{label}_reason"))
        for label in ("before", "after")
    )
    return (
        f'<div class="sample">{text(sample["prompt"], "div", "question")}'
        f'<div class="answers">{answers}</div></div>'
    )


def _answer(label: str, answer: str, ok: Any, reason: Any) -> str:
    mark, tone = "", ""
    if isinstance(ok, bool):
        tone = " good" if ok else " bad"
        why = (
            f": {escape(REASONS.get(reason, reason))}"
            if not ok and isinstance(reason, str) and reason
            else ""
        )
        mark = f' <span class="mark">{"desirable" if ok else "undesirable"}{why}</span>'
    body = text(answer, "div") if answer else '<div class="soft">(nothing)</div>'
    return f'<div class="answer{tone}"><span class="label">{label}{mark}</span>{body}</div>'


def _plots(plots: list[tuple[Plot, str]]) -> str:
    if not plots:
        return "<p>Nothing was logged that could be drawn.</p>"
    figures = (
        f"<figure>{svg}<figcaption>{escape(plot.explanation)}</figcaption></figure>"
        for plot, svg in plots
    )
    return f'<div class="plots">{"".join(figures)}</div>'


def _warnings(run: Run) -> str:
    findings = run.record.get("diagnostics")
    if not isinstance(findings, list):
        return ""
    if not findings:
        return "<p>None: the trainer saw nothing that goes wrong quietly.</p>"
    return _list(_finding(finding) for finding in findings)


def _finding(finding: Any) -> str:
    if not isinstance(finding, dict):
        return str(finding)
    step = f"Step {finding['step']}: " if finding.get("step") else ""
    sentences = [str(finding[key]).rstrip(".") for key in ("reason", "remedy") if finding.get(key)]
    return step + ". ".join(sentences or [str(finding.get("name", finding))]) + "."


def _data(run: Run) -> str:
    data = run.record.get("data")
    sets = (
        {key: value for key, value in data.items() if isinstance(value, dict)}
        if isinstance(data, dict)
        else {}
    )
    parts = []
    if sets:
        names = list(dict.fromkeys(name for counts in sets.values() for name in counts))
        head = "<th></th>" + "".join(text(name, "th") for name in sets)
        body = "".join(
            f"<tr>{text(COUNT_NAMES.get(name, name.replace('_', ' ')), 'th')}"
            + "".join(_cell(_short(name, counts.get(name, ""))) for counts in sets.values())
            + "</tr>"
            for name in names
        )
        parts.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
    if run.bad_rows:
        rows = "".join(
            f"<tr>{text(row.get('file', ''), 'td')}{_cell(row.get('line', ''))}{text(row.get('reason', ''), 'td', 'text')}</tr>"
            for row in run.bad_rows
        )
        parts.append(
            f"<details><summary>Skipped rows (the first {len(run.bad_rows)}; all are in bad_rows.jsonl)</summary>"
            '<div class="scroll"><table><thead><tr><th>file</th><th>line</th><th>reason</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div></details>"
        )
    return "\n".join(parts)


def _short(name: str, value: Any) -> Any:
    """A fingerprint by its beginning; run.json has all of it."""
    return value[:12] if name == "fingerprint" and isinstance(value, str) else value


def _settings(run: Run) -> str:
    config = run.record.get("config")
    config = config if isinstance(config, dict) else {}
    parts = [_table({key: config[key] for key in MAIN_SETTINGS if config.get(key) is not None})]
    model = run.record.get("model")
    if isinstance(model, dict):
        parts.append(
            _table({f"model: {key}": value for key, value in model.items() if value is not None})
        )
    if run.adapter:
        lora = {"LoRA rank": "r", "LoRA alpha": "lora_alpha", "LoRA layers": "target_modules"}
        parts.append(_table({label: run.adapter.get(key) for label, key in lora.items()}))
    rest = {
        key: value
        for key, value in config.items()
        if key not in MAIN_SETTINGS and value is not None
    }
    if rest:
        parts.append(f"<details><summary>All other settings</summary>{_table(rest)}</details>")
    if run.recipe:
        parts.append(
            f'<details><summary>The recipe, to run again</summary><pre dir="ltr">{escape(run.recipe)}</pre></details>'
        )
    return "\n".join(part for part in parts if part)


def _table(values: Any) -> str:
    if not isinstance(values, dict) or not values:
        return ""
    rows = "".join(f"<tr>{text(key, 'th')}{_cell(value)}</tr>" for key, value in values.items())
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def _cell(value: Any) -> str:
    if is_number(value):
        if not math.isfinite(value):
            return '<td class="number">not a finite number</td>'
        shown = (
            f"{value:,}"
            if isinstance(value, int) and abs(value) >= 10_000
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )
        return f'<td class="number">{shown}</td>'
    if isinstance(value, list):
        value = ", ".join(map(str, sorted(value, key=str)))
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return text(value, "td", "text")
