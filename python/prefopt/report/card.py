"""README.md: a model card with the metadata that the hub reads."""

import html
import re
from pathlib import Path

import yaml

from prefopt.report.plots import Plot
from prefopt.report.read import Run
from prefopt.report.words import Story

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CARD_SAMPLES = 4


def hub_id(name: object) -> str | None:
    """``name`` if it is a hub id, "owner/model"; None for a folder or anything else.

    Example:
        >>> hub_id("Qwen/Qwen3-0.6B"), hub_id("/models/qwen"), hub_id("./qwen")
        ('Qwen/Qwen3-0.6B', None, None)
    """
    if not isinstance(name, str) or not HUB_ID.fullmatch(name) or Path(name).is_dir():
        return None
    return name


def metadata(run: Run) -> dict:
    """The card's YAML block: only what is known, and never a local path. No license is guessed."""
    recipe = _recipe(run)
    base = hub_id(run.adapter.get("base_model_name_or_path")) or hub_id(
        _get(recipe, "model", "path")
    )
    dataset = hub_id(_get(recipe, "data", "path"))
    if dataset is not None and dataset.endswith((".jsonl", ".parquet")):
        dataset = None
    method = run.record.get("method")
    found: dict = {}
    if base:
        found["base_model"] = base
        found["base_model_relation"] = "adapter" if run.adapter else "finetune"
    if dataset:
        found["datasets"] = [dataset]
    found["library_name"] = "peft" if run.adapter else "transformers"
    found["pipeline_tag"] = "text-generation"
    tags = ["preference-optimization", "prefopt"]
    if isinstance(method, str):
        tags.insert(0, method.replace("_", "-"))
    if run.adapter:
        tags.append("lora")
    return found | {"tags": tags}


def card(run: Run, story: Story, plots: list[Plot]) -> str:
    """The whole card."""
    title = run.summary.get("title")
    title = title if isinstance(title, str) else run.path.resolve().name
    block = yaml.safe_dump(metadata(run), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{block}---", f"# {_plain(title)}", f"**{_plain(story.verdict)}**"]
    parts.append("\n".join(f"- {_plain(sentence)}" for sentence in story.sentences))
    parts += [
        _plain(run.summary[key]) for key in ("how", "note") if isinstance(run.summary.get(key), str)
    ]
    if run.samples:
        parts.append("## Sample answers")
        parts += [_sample(sample) for sample in run.samples[:CARD_SAMPLES]]
    if plots:
        parts.append("## Training")
        parts.append("\n".join(f"![{plot.title}](plots/{plot.name}.png)" for plot in plots))
    parts.append("## Use\n\n" + _use(run))
    versions = run.record.get("versions")
    if isinstance(versions, dict):
        listed = "\n".join(
            f"- {_plain(str(key))} {_plain(str(value))}" for key, value in versions.items()
        )
        parts.append(f"## Versions\n\n{listed}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _use(run: Run) -> str:
    base = hub_id(run.adapter.get("base_model_name_or_path")) or "PATH_OF_THE_BASE_MODEL"
    if run.adapter:
        lines = (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER")',
            f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        )
    else:
        lines = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
        )
    return "```python\n" + "\n".join(lines) + "\n```"


def _sample(sample: dict) -> str:
    """HTML, because Markdown knows no direction of writing; on one line, because an empty one would end it."""
    rows = "".join(
        f'<p dir="auto"><b>{label}:</b> {html.escape(" ".join(sample[key].split()))}</p>\n'
        for label, key in (("Question", "prompt"), ("Before", "before"), ("After", "after"))
    )
    return f"<div>\n{rows}</div>"


def _plain(text: str) -> str:
    """A text on one line in which Markdown and HTML find nothing to interpret."""
    return re.sub(r"([\\`*_\[\]#|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _recipe(run: Run) -> dict:
    try:
        recipe = yaml.safe_load(run.recipe)
    except yaml.YAMLError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _get(content: dict, section: str, key: str) -> object:
    options = content.get(section)
    return options.get(key) if isinstance(options, dict) else None
