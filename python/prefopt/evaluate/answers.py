"""Find which of several names an answer gives: the longest one that it begins with, not its first word."""

import re
from collections.abc import Sequence

from prefopt.data.rows import folded

# What may precede the name in an answer.
LEAD = re.compile(
    r"^(?:<think>.*?</think>|(?:the\s+)?(?:answer|category|field|subject)(?:\s+is)?\b|[\s:\-*_`\"'#.،؛«(\[]+|is\b)+",
    re.DOTALL,
)


def name_in(answer: str, names: Sequence[str]) -> str | None:
    """The longest name that ``answer`` begins with, up to a word boundary, or None.

    Case, spacing and Unicode forms are ignored, as are punctuation, a closed think block and "The answer is" before it.

    Args:
        answer: generated text.
        names: to choose from.

    Example:
        >>> name_in("**Computer  Science**.", ["computer", "computer science", "law"])
        'computer science'
        >>> name_in("lawn", ["law"]) is None
        True
    """
    text = LEAD.sub("", folded(answer))
    for name in sorted(names, key=len, reverse=True):
        rest = text.removeprefix(folded(name))
        if len(rest) < len(text) and not rest[:1].isalnum():
            return name
    return None
