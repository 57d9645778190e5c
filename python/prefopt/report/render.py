"""Jinja2 templates for pages and model cards."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prefopt.report.facts import format_value
from prefopt.report.markdown import code, plain, table
from prefopt.report.score import is_number
from prefopt.report.statistics import percent

TEMPLATES = Path(__file__).parent / "templates"


def render(template: Path, **context: Any) -> str:
    """Render a template file, which may extend or import those of ``TEMPLATES``.

    In ``*.html.j2`` every value is escaped. In Markdown nothing is: texts from data need the filter ``plain``.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": format_value, "plain": plain, "percent": percent}
    environment.tests["number"] = is_number  # Jinja's own takes true and false for numbers
    environment.globals |= {
        "code": code,
        "table": lambda head, body: table(head, [[*map(format_value, row)] for row in body]),
    }
    return environment.get_template(template.name).render(context)
