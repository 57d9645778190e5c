"""README.md: a model card with the metadata that the hub reads."""

import html
from collections.abc import Iterable, Sequence

from prefopt.report import components, evaluation, facts
from prefopt.report.figures import Picture
from prefopt.report.markdown import code, plain, table
from prefopt.report.metadata import base_model, metadata, title
from prefopt.report.read import Run
from prefopt.report.words import Story

CARD_SAMPLES = 4


def card(run: Run, story: Story, plots: Sequence[Picture], evaluated: Sequence[Picture] = ()) -> str:
    """The whole card.

    Args:
        run: as read.
        story: of the run.
        plots: of training.
        evaluated: pictures of the evaluations.
    """
    parts = [f"---\n{metadata(run).to_yaml()}\n---", f"# {plain(title(run))}"]
    parts.append(f"**{plain(story.verdict)}**")
    parts.append("\n".join(f"- {plain(sentence)}" for sentence in story.sentences))
    parts += [plain(run.summary[key]) for key in ("how", "note") if isinstance(run.summary.get(key), str)]
    parts += _evaluations(run, evaluated)
    if run.samples:
        parts.append("## Sample answers")
        parts += [_sample(sample) for sample in run.samples[:CARD_SAMPLES]]
    if plots:
        parts += ["## Training", _pictures(plots)]
    head, body = components.table(run)
    if body:
        parts += ["## Components", table(head, body)]
        parts += [plain(sentence) for sentence in components.notes(run)]
    parts += _settings(run)
    parts.append("## Use\n\n" + _use(run))
    return "\n\n".join(part for part in parts if part) + "\n"


def _evaluations(run: Run, pictures: Sequence[Picture]) -> list[str]:
    parts = ["## Evaluation"] if run.suites else []
    for suite in run.suites:
        parts.append(f"### {plain(evaluation.title(suite))}")
        parts.append(table(evaluation.HEAD, evaluation.table(suite)))
        parts.append(
            "Values with their standard errors, or in brackets the 95 % interval where all outcomes are equal."
        )
        parts.append("\n".join(f"- {plain(sentence)}" for sentence in suite.warnings))
        head, body = evaluation.by_category(suite)
        if body:
            parts.append(table(head, body))
        parts += [plain(sentence) for sentence in suite.how]
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
        parts.append(table(["data", *sets], counts))
    sources = facts.built_from(run)
    if sources:
        rows = [["" if one is None else facts.shown(one) for one in row.values()] for row in sources]
        parts.append(table(list(sources[0]), rows))
    settings = facts.main_settings(run) | facts.model_settings(run)
    if settings:
        parts.append(table(["setting", "value"], [[k, facts.shown(v)] for k, v in settings.items()]))
    memory = facts.memory(run)
    if memory:
        parts.append(table(["memory", ""], list(memory.items())))
    versions = run.record.get("versions")
    if isinstance(versions, dict):
        parts.append(table(["version", ""], [[str(k), str(v)] for k, v in versions.items()]))
    if len(parts) == 1:
        return []
    commands = facts.commands(run)
    if commands:
        parts.append("To do it again, with this folder as RUN (recipe.yaml has every option):")
        parts.append(code("\n".join(commands), "sh"))
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
    return code("\n".join(lines), "python")


def _pictures(pictures: Iterable[Picture]) -> str:
    return "\n".join(f"![{plain(one.title)}](plots/{one.name}.png)" for one in pictures)


def _sample(sample: dict) -> str:
    """HTML, because Markdown knows no direction of writing; on one line, because an empty one would end it."""
    rows = "".join(
        f'<p dir="auto"><b>{label}:</b> {html.escape(" ".join(sample[key].split()))}</p>\n'
        for label, key in (("Question", "prompt"), ("Before", "before"), ("After", "after"))
    )
    return f"<div>\n{rows}</div>"
