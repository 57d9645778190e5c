"""TIGER-Lab/MMLU-Pro: multiple-choice questions in 14 fields, as instructions with the right answer.

``target="category"`` asks for the field, ``target="letter"`` for the right option. Every row is desirable: the data is
for supervised training.

- ``src`` reveals the field, so the prompt has only the question (and, for a letter, its options).
- Repeated questions are used once for the field.
- Options "N/A", padding in some revisions, are omitted.
- A row whose ``answer`` and ``answer_index`` disagree is omitted.
- The smallest field has 381 questions; ``per_category`` in the plan balances the fields.
"""

from collections.abc import Mapping
from typing import Any

from prefopt.data.build.convert.answer import Answer, Dropped, Outcomes, Raws, answer, each, text_of, user
from prefopt.data.rows import RowError, folded

NEEDS = ("question_id", "question", "options", "answer", "answer_index", "category")
TARGETS = ("category", "letter")
CATEGORIES = (
    "biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history", "law",
    "math", "other", "philosophy", "physics", "psychology",
)  # fmt: skip
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASK_CATEGORY = (
    "To which of these fields does the question belong? Answer with the name of the field alone.\n"
    f"Fields: {', '.join(CATEGORIES)}\n\nQuestion: {{question}}"
)
ASK_LETTER = "{question}\n\n{options}\n\nAnswer with the letter of the right option alone."


def convert(raws: Raws, *, target: str = "category") -> Outcomes:
    """One answer a row; the group is the question's id."""
    seen: set[str] = set()

    def one(raw: Mapping[str, Any]) -> list[Answer]:
        question = text_of(raw, "question").strip()
        category = text_of(raw, "category").strip()
        if category not in CATEGORIES:
            raise RowError(f"category is {category!r}; expected one of {', '.join(CATEGORIES)}")
        if not question:
            raise Dropped("the question is empty")
        if target == "letter":
            asked, right = _letter(raw, question)
        else:
            if folded(question) in seen:
                raise Dropped("the question was asked before")
            seen.add(folded(question))
            asked, right = ASK_CATEGORY.format(question=question), category
        return [answer([user(asked)], right, True, str(raw.get("question_id")), category)]

    return each(raws, one)


def _letter(raw: Mapping[str, Any], question: str) -> tuple[str, str]:
    options, index = raw.get("options"), raw.get("answer_index")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise RowError(f"options is {options!r:.60}; expected a list of texts")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(options):
        raise RowError(f"answer_index is {index!r}; expected 0 to {len(options) - 1}")
    if LETTERS[index] != text_of(raw, "answer"):
        raise Dropped("answer and answer_index disagree")
    if options[index].strip() == "N/A":
        raise Dropped("the right option is N/A")
    shown = [(place, text) for place, text in enumerate(options) if text.strip() != "N/A"]
    lines = [f"{LETTERS[number]}. {text.strip()}" for number, (_, text) in enumerate(shown)]
    right = next(number for number, (place, _) in enumerate(shown) if place == index)
    return ASK_LETTER.format(question=question, options="\n".join(lines)), LETTERS[right]
