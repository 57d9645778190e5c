"""The parts that the page is made of. Every text that comes from data is escaped and finds its own direction."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from prefopt.report.facts import shown
from prefopt.report.figures import Picture
from prefopt.report.read import is_number
from prefopt.report.style import STYLE


def text(value: Any, tag: str = "span", css: str = "") -> str:
    """A text from data: escaped, in its own direction."""
    attribute = f' class="{css}"' if css else ""
    return f'<{tag}{attribute} dir="auto">{escape(str(value))}</{tag}>'


def document(title: str, header: str, sections: Iterable[str], style: str = "") -> str:
    """A page that needs no other file.

    Args:
        title: of the browser's tab, as it is.
        header: the elements on top.
        sections: of ``section``.
        style: further CSS, behind the house's.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n<header>\n"
        f"{header}\n</header>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A part of the page; nothing where its body is empty."""
    if not body:
        return ""
    anchor = title.lower().replace(" ", "-")
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{body}\n</section>\n'


def bullets(sentences: Iterable[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(text(sentence, "li") for sentence in sentences) + "</ul>"


def fold(summary: str, body: str) -> str:
    """What is shown on demand."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def mapping(values: Mapping[str, Any] | None) -> str:
    """A table of names and values; nothing where there are none."""
    if not isinstance(values, Mapping) or not values:
        return ""
    return grid([], [[name, value] for name, value in values.items()])


def grid(head: Sequence[str], body: Iterable[Sequence[Any]], css: str = "") -> str:
    """A table whose first column names the line; it scrolls by itself where it is wider than the page.

    Each cell knows its heading, so that with the class "stacked" a phone can set the cells of a line under each other.
    """
    top = "".join(text(one, "th") for one in head)
    lines = ""
    for first, *rest in body:
        heads = head[1:] or [""] * len(rest)
        cells = "".join(cell(one, title) for one, title in zip(rest, heads, strict=True))
        lines += f"<tr>{text(first, 'th')}{cells}</tr>"
    attribute = f' class="{css}"' if css else ""
    start = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table{attribute}>{start}<tbody>{lines}</tbody></table></div>'


def cell(value: Any, head: str = "") -> str:
    """A cell of a table; numbers line up."""
    named = f' data-head="{escape(head)}"' if head else ""
    kind = "number" if is_number(value) else "text"
    return f'<td class="{kind}" dir="auto"{named}>{escape(shown(value))}</td>'


def gallery(pictures: Sequence[Picture], css: str = "plots") -> str:
    """Pictures with what they show."""
    figures = (f"<figure>{one.svg}<figcaption>{escape(one.explanation)}</figcaption></figure>" for one in pictures)
    return f'<div class="{css}">{"".join(figures)}</div>'
