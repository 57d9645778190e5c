"""The prompts of a file, for ``prefopt classify``."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from prefopt.data.rows import RowError
from prefopt.data.sources import open_rows
from prefopt.errors import DataError

Prompt = str | list[dict[str, str]]
_Row = tuple[int, Prompt, str | None]  # line, prompt, label
PLACE = "{text}"  # placeholder in --ask


@dataclass(frozen=True)
class Question:
    """A prompt (text or chat messages), its line in the file, and its label if the file has one."""

    line: int
    prompt: Prompt
    expected: str | None = None


def read_questions(
    file: str | Path, split: str | None = None, ask: str | None = None, chat: bool = True
) -> list[Question]:
    """Read the prompts of a file.

    Args:
        file, split, ask: as for ``classify``.
        chat: turn text into a user's message.

    Raises:
        DataError: it cannot be read, has no prompts, or has a row without one.
    """
    path = Path(file).expanduser()
    is_text = path.suffix.lower() == ".txt"
    rows: Iterator[_Row] = _text_lines(path) if is_text else _rows(str(file), split)
    questions = []
    for line, prompt, expected in rows:
        if isinstance(prompt, str):
            text = prompt if ask is None else ask.replace(PLACE, prompt)
            questions.append(Question(line, [{"role": "user", "content": text}] if chat else text, expected))
            continue
        if ask is not None:
            raise DataError(f"{file}:{line}: prompt is chat messages, and --ask needs text")
        questions.append(Question(line, prompt, expected))
    if not questions:
        raise DataError(f"{file} has no prompts")
    return questions


def _text_lines(path: Path) -> Iterator[_Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start + 1}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip(), None


def _rows(name: str, split: str | None) -> Iterator[_Row]:
    reported, raws = open_rows(name, split, None, needs=("prompt",))
    for line, raw in raws:
        if raw is None:
            continue
        if isinstance(raw, RowError):
            raise DataError(f"{reported}:{line}: {raw}")
        prompt = raw.get("prompt")
        if not _is_prompt(prompt):
            raise DataError(
                f"{reported}:{line}: prompt is {prompt!r:.60}; expected text, or chat messages of role and content"
            )
        yield line, prompt, answer_text(raw.get("completion"))


def _is_prompt(prompt: object) -> TypeGuard[Prompt]:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in prompt
        )
    )


def answer_text(completion: object) -> str | None:
    """The text of an answer, which is text or one chat message."""
    if isinstance(completion, str):
        return completion.strip()
    if _is_prompt(completion) and not isinstance(completion, str) and len(completion) == 1:
        return completion[0]["content"].strip()
    return None
