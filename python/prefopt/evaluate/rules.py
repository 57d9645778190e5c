"""Deterministic rules that accept or reject a generated answer."""

import difflib
import re
from collections.abc import Callable

from prefopt.data.toy.rule import judge, language
from prefopt.errors import UserError

Rule = Callable[[str, str], bool]  # (question, answer) -> accepted

NAMED = {
    "demo": "the demo's rule: courteous, on its topics, in the question's language (questions of the demo only)",
    "language": "an answer in the script of the question, Arabic or Latin",
}
PREFIXES = {
    "contains": "the answer contains TEXT, ignoring case",
    "regex": "PATTERN is found in the answer",
}


def make_rule(text: str) -> Rule:
    """A rule by name, or ``contains:TEXT``, or ``regex:PATTERN``.

    Raises:
        UserError: an unknown rule, or an invalid pattern.

    Example:
        >>> make_rule("contains:yes")("Is it?", "Yes, it is."), make_rule("regex:^No")("Is it?", "Yes.")
        (True, False)
    """
    if text in NAMED:
        return {"demo": _demo, "language": _language}[text]
    kind, colon, rest = text.partition(":")
    if colon and rest and kind == "contains":
        return lambda question, answer: rest.casefold() in answer.casefold()
    if colon and rest and kind == "regex":
        try:
            pattern = re.compile(rest)
        except re.error as error:
            raise UserError(f"--rule {text!r} is not a regular expression: {error}") from None
        return lambda question, answer: pattern.search(answer) is not None
    near = difflib.get_close_matches(text, NAMED, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--rule is {text!r}; expected {', '.join(NAMED)}, contains:TEXT or regex:PATTERN{hint}")


def _demo(question: str, answer: str) -> bool:
    try:
        return judge(question, answer).ok
    except ValueError as error:
        raise UserError(f"the rule demo applies to the demo's questions only: {error}") from None


def _language(question: str, answer: str) -> bool:
    return bool(answer.strip()) and language(question) == language(answer)
