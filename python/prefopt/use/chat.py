"""A conversation with a trained run in the terminal, in the format that it was trained with."""

import difflib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from prefopt.data.template import render
from prefopt.errors import UserError
from prefopt.use.load import (
    check_length,
    choose_device,
    find_run,
    load_model,
    load_tokenizer,
    stop_ids,
)

COMMANDS = {
    "/reset": "forget the conversation, but not the system prompt",
    "/help": "this list",
    "/quit": "leave (so does the end of the input)",
}


class Stream(TextStreamer):
    """Writes an answer as it grows, by whole words: a letter that is spread over tokens is never shown in halves."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.output, self.text = output, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by ``generate`` for each piece of finished text."""
        self.text += text
        self.output.write(text + ("\n" if stream_end else ""))
        self.output.flush()


class Conversation:
    """The turns so far, and the model that answers them.

    Args:
        model, tokenizer: of one run. Without a chat template, a turn is text that the model goes on with, and the turns
            before it are not shown to it.
        system: the system prompt, or None.
        template_kwargs: arguments of the chat template, as in training.
        generation: arguments of ``generate``, over what the model's generation config says.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        template_kwargs: dict | None = None,
        generation: dict[str, Any] | None = None,
    ):
        if system is not None and not tokenizer.chat_template:
            raise UserError(
                "--system is given, but the run has no chat template, or was trained on plain text without it"
            )
        self.model, self.tokenizer = model, tokenizer
        self.template_kwargs = template_kwargs or {}
        self.generation = {
            "eos_token_id": stop_ids(model, tokenizer, template_kwargs),
            "pad_token_id": tokenizer.pad_token_id,
            **(generation or {}),
        }
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget every turn."""
        self.turns = []

    def answer(self, text: str, output: TextIO) -> str:
        """The answer to one more turn, written to ``output`` as it grows.

        Raises:
            UserError: the conversation is longer than the model takes, or the template refuses it; the turn is then
                forgotten, as it is when the answer is interrupted.
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        ids = self._ids(asked, text).to(self.model.device)
        check_length(self.model, ids.shape[1] + 1, "the conversation has")
        stream = Stream(self.tokenizer, output)
        with torch.no_grad():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=stream,
                **self.generation,
            )
        self.turns = [*asked, {"role": "assistant", "content": stream.text}]
        return stream.text

    def _ids(self, turns: list[dict[str, str]], text: str) -> torch.Tensor:
        """(1, L) int64"""
        if not self.tokenizer.chat_template:
            return self.tokenizer(text, return_tensors="pt")["input_ids"]
        messages = [*self.system, *turns]
        try:
            rendered = render(self.tokenizer, messages, self.template_kwargs, add_generation_prompt=True)
        except UserError as error:
            raise UserError(str(error)) from None
        return self.tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]


def chat(
    run: str | Path,
    *,
    base: str | None = None,
    quantization: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    source: TextIO | None = None,
    output: TextIO | None = None,
) -> None:
    """Answer turns from ``source`` (stdin), one a line, until it ends.

    Args:
        run: run folder.
        base: base model, instead of the one that the adapter names.
        quantization: of the base's weights, "nf4" or "none"; as in training if not given.
        system: system prompt.
        max_new_tokens: of each answer, at most.
        temperature: 0 takes the likeliest token each time; as in the model's generation config if not given.
        seed: of the sampling.
        device: "auto", "cpu" or "cuda".
        source, output: instead of stdin and stdout.

    Raises:
        UserError: the run cannot be loaded, or an argument is out of range.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}; expected at least 1")
    if temperature is not None and not 0 <= temperature < math.inf:
        raise UserError(f"--temperature is {temperature}; expected 0 or more")
    if seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"--seed is {seed}; expected a number from 0 to {2**32 - 1}")
    source = sys.stdin if source is None else source
    if source is None:
        raise UserError("standard input is closed; expected a terminal, a file or a pipe")
    device = choose_device(device)
    found = find_run(run, base)
    tokenizer = load_tokenizer(found)
    model = load_model(found, quantization=quantization, device=device)
    if found.trained_on_text:
        tokenizer.chat_template = None  # it was not used in training
        print("trained on plain text: each line is text that the model continues", file=sys.stderr)
    elif not tokenizer.chat_template:
        print("no chat template: each line is text that the model goes on with", file=sys.stderr)
    conversation = Conversation(
        model,
        tokenizer,
        system=system,
        template_kwargs=found.template_kwargs,
        generation={"max_new_tokens": max_new_tokens} | sampling(temperature),
    )
    if seed is not None:
        torch.manual_seed(seed)
    output = sys.stdout if output is None else output
    talk(conversation, _lines(source), output)


def sampling(temperature: float | None) -> dict[str, Any]:
    """Arguments of ``generate`` for a temperature; None leaves it to the model's generation config.

    Example:
        >>> sampling(0.7)
        {'do_sample': True, 'temperature': 0.7}
    """
    if temperature is None:
        return {}
    if temperature == 0:  # the rest would be refused as of no use
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


def talk(conversation: Conversation, lines: Iterator[str], output: TextIO) -> None:
    """Take turns and commands until ``/quit`` or the end of ``lines``; what is wrong with one turn does not end it."""
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if text == "/quit":
            return
        if re.fullmatch(r"/\w+", text):
            print(_command(conversation, text), file=sys.stderr)
            continue
        try:
            conversation.answer(text, output)
        except KeyboardInterrupt:
            print("\nstopped; this turn is forgotten", file=sys.stderr)
        except UserError as error:
            print(f"{error}; this turn is forgotten, /reset forgets all", file=sys.stderr)


def _command(conversation: Conversation, text: str) -> str:
    if text == "/reset":
        conversation.reset()
        return "the conversation is forgotten"
    if text == "/help":
        return "\n".join(f"{name:<8} {meaning}" for name, meaning in COMMANDS.items())
    near = difflib.get_close_matches(text, COMMANDS, n=1)
    return f"{text} is no command; " + (f"did you mean {near[0]}?" if near else "see /help")


def _lines(source: TextIO) -> Iterator[str]:
    """Lines as they are typed, with a prompt in front, or those of a file or pipe."""
    if not source.isatty():
        try:
            yield from source
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8: {error}") from None
        return
    _edit_lines()
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return


def _edit_lines() -> None:
    """Arrow keys and history for ``input``, where Python was built with them."""
    try:
        import readline  # noqa: F401  (its import is what changes ``input``)
    except ImportError:
        return
