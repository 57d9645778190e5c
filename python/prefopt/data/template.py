"""Chat templates rendered within limits: a template is code from a model's folder, and may fail or loop."""

import inspect
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError

SECONDS = 10.0  # for one conversation; a usual template takes less than a millisecond
MOST_CHARACTERS = 1_000_000  # more than ten times the characters of the messages


class TemplateTimeout(UserError):
    """The template exceeded the time limit."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation with the tokenizer's chat template.

    The time limit holds in the main thread, on systems with interval timers. It does not interrupt a single operation
    of the interpreter, such as a product of huge numbers.

    Raises:
        UserError: the template fails, takes longer than ``SECONDS``, or writes too much.
    """
    arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        with _time_limit(SECONDS):
            text = cast(str, tokenizer.apply_chat_template(cast(Any, messages), **arguments, **(template_kwargs or {})))
    except TemplateTimeout:
        raise
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses it: {str(error):.200}") from None
    except Exception as error:  # noqa: BLE001  a template can raise any exception
        raise UserError(f"the chat template fails: {type(error).__name__}: {str(error):.200}") from None
    room = MOST_CHARACTERS + 10 * sum(len(message["content"]) for message in messages)
    if len(text) > room:
        raise UserError(
            f"the chat template writes {len(text):,} characters; expected at most {room:,} for this conversation"
        )
    return text


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TemplateTimeout`` if the block takes longer."""
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TemplateTimeout(f"the chat template took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, previous)


def template_problems(kwargs: Mapping[Any, Any], key: str) -> list[str]:
    """One sentence for each argument that ``apply_chat_template`` reserves or cannot pass on.

    Args:
        kwargs: for the template, by name.
        key: the option's name, for the sentences.

    Example:
        >>> template_problems({"enable_thinking": False, "tokenize": True}, "--template")
        ['--template has tokenize, which is set for every row; leave it out']
    """
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    reserved = set(parameters) - {"tools", "documents"} | {"messages"}
    found = []
    for name, value in kwargs.items():
        if not isinstance(name, str):
            found.append(f"{key} has the key {name!r}; expected names")
        elif name in reserved:
            found.append(f"{key} has {name}, which is set for every row; leave it out")
        elif name in ("tools", "documents") and not isinstance(value, list):
            found.append(f"{key} has {name} {value!r:.60}; expected a list")
    return found
