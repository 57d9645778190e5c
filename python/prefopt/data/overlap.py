"""Repeated rows, contradictory rows, and rows that contain an evaluation question."""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from prefopt.data.read import LoadedRows
from prefopt.data.rows import Text, folded, folded_turns
from prefopt.data.sources import FILES
from prefopt.errors import DataError

QUESTION_FIELDS = ("question", "prompt", "ctx", "text")


class Twins(NamedTuple):
    """Positions in ``LoadedRows.rows``: each later copy of a row with the first, and each row whose answer has both
    labels with the first row that contradicts it."""

    repeated: dict[int, int]
    contradictory: dict[int, int]


def twins(loaded: LoadedRows) -> Twins:
    """Rows with the same prompt and answer, up to case, spacing and Unicode form.

    Example:
        >>> from prefopt.data import load_rows
        >>> row = {"prompt": "2 + 2?", "completion": "4", "label": True}
        >>> twins(load_rows([row, row, {**row, "prompt": "Hi"}, {**row, "prompt": " hi", "label": False}]))
        Twins(repeated={1: 0}, contradictory={2: 3, 3: 2})
    """
    rows = defaultdict(list)
    for number, row in enumerate(loaded.rows.select_columns(["prompt", "completion", "label"])):
        key = f"{folded_turns(row['prompt'])}\x1d{folded_turns(row['completion'])}"
        rows[key].append((number, row["label"]))
    repeated: dict[int, int] = {}
    contradictory: dict[int, int] = {}
    for same in rows.values():
        first = {label: number for number, label in reversed(same)}
        if len(first) > 1:
            contradictory |= {number: first[not label] for number, label in same}
        else:
            repeated |= {number: same[0][0] for number, _ in same[1:]}
    return Twins(dict(sorted(repeated.items())), dict(sorted(contradictory.items())))


class Leaks(NamedTuple):
    """``rows``: {position in ``LoadedRows.rows``: the first question found in it}; ``questions``: the number found."""

    rows: dict[int, str]
    questions: int


def leaks(loaded: LoadedRows, questions: Sequence[str], size: int = 8) -> Leaks:
    """Rows whose prompt or answer shares ``size`` consecutive words with an evaluation question.

    Words are runs of letters and digits after folding, without accents and vowel signs. A question of fewer words must
    equal a whole message (or text), because short questions occur inside others.

    Example:
        >>> from prefopt.data import load_rows
        >>> prompt = "Is it true: what happens if you crack your knuckles a lot?"
        >>> loaded = load_rows([{"prompt": prompt, "chosen": "Yes", "rejected": "No"}])
        >>> leaks(loaded, ["What happens if you crack your knuckles a lot?"]).questions
        1
    """
    if size < 1:
        raise DataError(f"ngram is {size}; expected at least 1")
    long: dict[tuple[str, ...], int] = {}
    short: dict[tuple[str, ...], int] = {}
    for number, question in enumerate(questions):
        found = words(question)
        if len(found) < size:
            short.setdefault(found, number)
        for gram in _grams(found, size):
            long.setdefault(gram, number)
    hits: dict[int, str] = {}
    seen: set[int] = set()
    for position, row in enumerate(tqdm(loaded.rows, desc="comparing with questions", delay=1)):
        numbers = set()
        for text in (*_texts(row["prompt"]), *_texts(row["completion"])):
            found = words(text)
            if found in short:
                numbers.add(short[found])
            numbers.update(long[gram] for gram in _grams(found, size) if gram in long)
        if numbers:
            hits[position] = questions[min(numbers)]
            seen |= numbers
    return Leaks(hits, len(seen))


def read_questions(path: str | Path) -> list[str]:
    """Evaluation questions from a text file, one a line, or a JSONL file with a field question, prompt, ctx or text.

    Raises:
        DataError: the file cannot be read, or has no questions.
    """
    path = Path(path)
    if path.suffix.lower() in set(FILES) - {".jsonl"}:
        raise DataError(f"{path} ends in {path.suffix}; expected questions as .txt or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"there is no file of questions {path}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start + 1})") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix.lower() == ".jsonl":
        questions = [_question(line, f"{path}:{number}") for number, line in numbered]
    else:
        questions = [line for _, line in numbered]
    questions = [question for question in questions if words(question)]
    if not questions:
        raise DataError(f"{path} has no questions in it")
    return questions


def words(text: str) -> tuple[str, ...]:
    """The words of a text for comparing: folded, without accents and vowel signs.

    Example:
        >>> words("Don't  Café!")
        ('don', 't', 'cafe')
    """
    plain = unicodedata.normalize("NFKD", folded(text))
    return tuple(re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c))))


def _question(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not JSON: {error.msg}") from None
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: is {line!r:.60}; expected an object")
    text = next((row[name] for name in QUESTION_FIELDS if isinstance(row.get(name), str)), None)
    if text is None:
        raise DataError(f"{where}: has no text in {', '.join(QUESTION_FIELDS)}")
    return text


def _grams(found: tuple[str, ...], size: int) -> Iterable[tuple[str, ...]]:
    return (found[start : start + size] for start in range(len(found) - size + 1))


def _texts(text: Text) -> list[str]:
    return [text] if isinstance(text, str) else [message["content"] for message in text]
