"""A conversation with a trained run in the terminal, in the format that it was trained with."""

import difflib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from prefopt.data.rows import TEXT
from prefopt.errors import UserError
from prefopt.generation import prompt_ids, sampling_options, stop_ids
from prefopt.models import check_length, choose_device
from prefopt.runs import find_run, load_model, load_tokenizer

COMMANDS = {
    "/reset": "discard the conversation, but not the system prompt",
    "/help": "show this list",
    "/quit": "leave (so does the end of the input)",
}


class Stream(TextStreamer):
    """Writes an answer as it is generated, by whole words, so that a character of several tokens is never split."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.output, self.text = output, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by ``generate`` for each piece of finished text."""
        self.text += text
        self.output.write(text + ("\n" if stream_end else ""))
        self.output.flush()


class Conversation:
    """A model and the turns so far.

    Args:
        model, tokenizer: of one run. Without a chat template, a turn is text that the model continues, without the
            turns before it.
        system: system prompt.
        template_kwargs: arguments of the chat template, as in training.
        generation: arguments of ``generate``, which take precedence over the model's generation config.
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
        """Discard every turn."""
        self.turns = []

    def answer(self, text: str, output: TextIO) -> str:
        """Answer one more turn, and write the answer to ``output`` as it is generated.

        Raises:
            UserError: the conversation is longer than the model's context, or the template refuses it. The turn is
                discarded, as it is after an interrupt.
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        prompt = [*self.system, *asked] if self.tokenizer.chat_template else text
        ids = torch.tensor([prompt_ids(self.tokenizer, prompt, self.template_kwargs)], device=self.model.device)
        check_length(self.model, ids.shape[1] + 1, "the conversation has")
        stream = Stream(self.tokenizer, output)
        with torch.no_grad():
            cast(Any, self.model).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), streamer=stream, **self.generation
            )
        self.turns = [*asked, {"role": "assistant", "content": stream.text}]
        return stream.text


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
    """Answer the turns of ``source``, one per line.

    Args:
        run: run folder.
        base: base model (default: the one that the adapter names).
        quantization: of the base's weights, "nf4" or "none" (default: as in training).
        system: system prompt.
        max_new_tokens: limit of each answer.
        temperature: 0 is greedy (default: as in the model's generation config).
        seed: random seed of sampling.
        device: "auto", "cpu" or "cuda".
        source, output: streams (default: stdin and stdout).

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
    trained_on_text = found.trained_format == TEXT
    if trained_on_text:
        tokenizer.chat_template = None  # it was not used in training
    if not tokenizer.chat_template:
        reason = "trained on plain text" if trained_on_text else "no chat template"
        print(f"{reason}: each line is text that the model continues", file=sys.stderr)
    conversation = Conversation(
        model,
        tokenizer,
        system=system,
        template_kwargs=found.template_kwargs,
        generation={"max_new_tokens": max_new_tokens} | sampling_options(temperature),
    )
    if seed is not None:
        torch.manual_seed(seed)
    output = sys.stdout if output is None else output
    talk(conversation, _lines(source), output)


def talk(conversation: Conversation, lines: Iterator[str], output: TextIO) -> None:
    """Process turns and commands until ``/quit`` or the end of ``lines``; an error discards only its turn."""
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
            print("\nstopped; this turn is discarded", file=sys.stderr)
        except UserError as error:
            print(f"{error}; this turn is discarded, /reset discards all", file=sys.stderr)


def _command(conversation: Conversation, text: str) -> str:
    if text == "/reset":
        conversation.reset()
        return "the conversation is discarded"
    if text == "/help":
        return "\n".join(f"{name:<8} {meaning}" for name, meaning in COMMANDS.items())
    near = difflib.get_close_matches(text, COMMANDS, n=1)
    return f"{text} is not a command; " + (f"did you mean {near[0]}?" if near else "see /help")


def _lines(source: TextIO) -> Iterator[str]:
    """Lines typed at a prompt, or read from a file or pipe."""
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
    """Enable arrow keys and history for ``input``, if Python was built with readline."""
    try:
        import readline  # noqa: F401  (its import is what changes ``input``)
    except ImportError:
        return
