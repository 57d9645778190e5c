"""README.md: a model card with the metadata that the hub reads."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from prefopt.report import components, evaluation, facts
from prefopt.report.figures import Picture
from prefopt.report.metadata import base_model, metadata, title
from prefopt.report.read import Run
from prefopt.report.words import Story

CARD_SAMPLES = 4


def card(
    run: Run, story: Story, plots: Sequence[Picture], evaluated: Sequence[Picture] = ()
) -> str:
    """The whole card.

    Args:
        run: as read.
        story: of the run.
        plots: of training.
        evaluated: pictures of the evaluations.
    """
    parts = [f"---\n{metadata(run).to_yaml()}\n---", f"# {_plain(title(run))}"]
    parts.append(f"**{_plain(story.verdict)}**")
    parts.append("\n".join(f"- {_plain(sentence)}" for sentence in story.sentences))
    parts += [
        _plain(run.summary[key]) for key in ("how", "note") if isinstance(run.summary.get(key), str)
    ]
    parts += _evaluations(run, evaluated)
    if run.samples:
        parts.append("## Sample answers")
        parts += [_sample(sample) for sample in run.samples[:CARD_SAMPLES]]
    if plots:
        parts += ["## Training", _pictures(plots)]
    head, body = components.table(run)
    if body:
        parts += ["## Components", _table(head, body)]
        parts += [_plain(sentence) for sentence in components.notes(run)]
    parts += _settings(run)
    parts.append("## Use\n\n" + _use(run))
    return "\n\n".join(part for part in parts if part) + "\n"


def _evaluations(run: Run, pictures: Sequence[Picture]) -> list[str]:
    parts = ["## Evaluation"] if run.suites else []
    for suite in run.suites:
        parts.append(f"### {_plain(evaluation.title(suite))}")
        parts.append(_table(evaluation.HEAD, evaluation.table(suite)))
        parts.append(
            "Values with their standard errors, or in brackets the 95 % interval where all outcomes are equal."
        )
        parts.append("\n".join(f"- {_plain(sentence)}" for sentence in suite.warnings))
        head, body = evaluation.by_category(suite)
        if body:
            parts.append(_table(head, body))
        parts += [_plain(sentence) for sentence in suite.how]
    return parts + ([_pictures(pictures)] if pictures else [])


def _settings(run: Run) -> list[str]:
    """What is needed to repeat the run."""
    parts = ["## Settings"]
    sets = facts.data_sets(run)
    if sets:
        names = list(dict.fromkeys(name for counts in sets.values() for name in counts))
        counts = [
            [facts.COUNT_NAMES.get(name, name.replace("_", " "))]
            + [facts.shown(one.get(name, "")) for one in sets.values()]
            for name in names
            if name != "fingerprint"
        ]
        parts.append(_table(["data", *sets], counts))
    sources = facts.built_from(run)
    if sources:
        rows = [
            ["" if one is None else facts.shown(one) for one in row.values()] for row in sources
        ]
        parts.append(_table(list(sources[0]), rows))
    settings = facts.main_settings(run) | facts.model_settings(run)
    if settings:
        parts.append(
            _table(["setting", "value"], [[k, facts.shown(v)] for k, v in settings.items()])
        )
    memory = facts.memory(run)
    if memory:
        parts.append(_table(["memory", ""], list(memory.items())))
    versions = run.record.get("versions")
    if isinstance(versions, dict):
        parts.append(_table(["version", ""], [[str(k), str(v)] for k, v in versions.items()]))
    if len(parts) == 1:
        return []
    commands = facts.commands(run)
    if commands:
        parts.append("To do it again, with this folder as RUN (recipe.yaml has every option):")
        parts.append("```sh\n" + "\n".join(commands) + "\n```")
    return parts


def _use(run: Run) -> str:
    base = base_model(run) or "PATH_OF_THE_BASE_MODEL"
    if run.adapter:
        lines = (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
        )
    else:
        lines = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
        )
    return "```python\n" + "\n".join(lines) + "\n```"


def _pictures(pictures: Iterable[Picture]) -> str:
    return "\n".join(f"![{_plain(one.title)}](plots/{one.name}.png)" for one in pictures)


def _sample(sample: dict) -> str:
    """HTML, because Markdown knows no direction of writing; on one line, because an empty one would end it."""
    rows = "".join(
        f'<p dir="auto"><b>{label}:</b> {html.escape(" ".join(sample[key].split()))}</p>\n'
        for label, key in (("Question", "prompt"), ("Before", "before"), ("After", "after"))
    )
    return f"<div>\n{rows}</div>"


def _table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    plain = [line if line[0] == "---" else [_plain(str(one)) for one in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in plain)


def _plain(text: str) -> str:
    """A text on one line in which Markdown and HTML find nothing to interpret."""
    return re.sub(r"([\\`*_\[\]#|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
