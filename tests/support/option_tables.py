"""The tables of options in docs/recipes.md, generated from prefopt/options.py; run as a script, it rewrites them."""

import json
import re
from dataclasses import MISSING
from pathlib import Path
from typing import get_type_hints

from prefopt.options import SECTIONS, options_of, required

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
BEGIN, END = "<!-- options:begin -->", "<!-- options:end -->"


def tables() -> str:
    """One Markdown table for each section of a recipe."""
    return "\n".join(_table(section, kind) for section, kind in SECTIONS.items())


def with_tables(page: str) -> str:
    """The page with the tables between the two markers."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}{END}{rest.partition(END)[2]}"


def _table(section: str, kind: type) -> str:
    lines = [f"### {section}", "", str(kind.__doc__), "", "| option | what it does | default |", "|---|---|---|"]
    if section == "loss":
        lines[4:] = ["| option | what it does | methods and defaults |", "|---|---|---|"]
    hints = get_type_hints(kind)
    for name, one in options_of(section).items():
        default = one.metadata["shown"]
        if methods := one.metadata["methods"]:
            groups: dict[str, list[str]] = {}
            for method, value in methods.items():
                groups.setdefault(default if callable(value) else _text(value), []).append(method)
            default = "; ".join(f"{', '.join(names)}: {value}" for value, names in groups.items())
        elif default is None:
            value = one.default if one.default is not MISSING or required(one) else one.default_factory()
            default = "required" if required(one) else _text(value)
        choices = re.findall(r"Literal\[(.+?)\]", str(hints[name]))
        words = f" ({', '.join(word.strip(chr(39)) for word in choices[0].split(', '))})" if choices else ""
        lines.append(f"| `{name}` | {one.metadata['help']}{words} | {default} |")
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
