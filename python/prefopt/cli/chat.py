"""`prefopt chat` on the command line; nothing heavy is imported before it runs."""

import argparse
from typing import Any

from prefopt.cli.arguments import (
    add_device_argument,
    add_quantization_argument,
    add_run_arguments,
    new_command,
    reject_unknown,
    utf8_argument,
)


def add_chat_command(commands: Any) -> None:
    """Add the command."""

    def run(given: argparse.Namespace, rest: list[str]) -> int:
        reject_unknown(rest, "--base --quantization --system --max-new-tokens --temperature --seed --device".split())
        from prefopt.use.chat import chat

        chat(
            given.run,
            base=given.base,
            quantization=given.quantization,
            system=given.system,
            max_new_tokens=given.max_new_tokens,
            temperature=given.temperature,
            seed=given.seed,
            device=given.device,
        )
        return 0

    parser = new_command(
        commands,
        "chat",
        run,
        "chat with a run, in the format that it was trained with",
        epilog="Each line is a turn; /reset discards the conversation, /quit leaves. Also reads from a pipe: only the "
        "answers go to stdout.",
    )
    add_run_arguments(parser)
    add = parser.add_argument
    add("--system", type=utf8_argument, help="system prompt")
    add("--max-new-tokens", type=int, default=512, help="most tokens of an answer (default: 512)")
    add("--temperature", type=float, help="0 is greedy (default: as in the model's generation config)")
    add("--seed", type=int, help="random seed of sampling")
    add_quantization_argument(parser)
    add_device_argument(parser)
