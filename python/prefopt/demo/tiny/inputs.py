"""The folder that a tiny run reads: model and tokenizer, sources in their published schemas, and the plan over them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prefopt.data.build.plan import Plan, Source, make_plan
from prefopt.data.write import whole_folder
from prefopt.demo.tiny.families import family_of, save_tiny
from prefopt.demo.tiny.sources import raw_rows
from prefopt.recipe.schema import Recipe


def write_inputs(recipe: Recipe, folder: Path, files: Mapping[str, str]) -> None:
    """Write all of it, and further files by their text; the folder is complete or not there.

    Args:
        recipe: the real one; its model names the family, its plan the sources.
        folder: new.
        files: text by name.

    Raises:
        UserError: no stand-in for the model.
        DataError: the plan, or ``folder`` in use.
    """
    family = family_of(recipe.model.path)
    with whole_folder(folder) as partial:
        if recipe.data.plan is None:
            sources = {"rows.jsonl": raw_rows("rows")}
        else:
            plan = make_plan([recipe.data.plan])
            sources = {
                f"sources/{source.name}.jsonl": raw_rows(source.kind, place, len(plan.sources))
                for place, source in enumerate(plan.sources)
            }
            text = yaml.safe_dump(_local(plan, folder), sort_keys=False, allow_unicode=True)
            (partial / "plan.yaml").write_text(text, encoding="utf-8")
        for name, rows in sources.items():
            path = partial / name
            path.parent.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        texts = [text for rows in sources.values() for row in rows for text in _texts(row)]
        save_tiny(family, texts, partial / "model", recipe.training.seed)
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")


def _local(plan: Plan, folder: Path) -> dict[str, Any]:
    """The plan as YAML would have it, with files in place of hub ids, and all else as it is."""
    content = plan.described()
    content["sources"] = [_source(source, folder) for source in plan.sources]
    return {name: value for name, value in content.items() if value is not None}


def _source(source: Source, folder: Path) -> dict[str, Any]:
    caps = {
        name: value for name in ("groups", "per_group", "per_category") if (value := getattr(source, name)) is not None
    }
    path = folder / "sources" / f"{source.name}.jsonl"
    named = {"kind": source.kind, "path": str(path), "name": source.name}
    return named | caps | dict(source.options)


def _texts(value: Any) -> list[str]:
    """Every text in a row."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for one in value for text in _texts(one)] if isinstance(value, list) else []
