"""``prefopt export``, ``chat`` and ``classify`` on the command line; nothing heavy is imported here."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from prefopt.cli.arguments import (
    new_command,
    path_argument,
    reject_unknown,
    text_argument,
    utf8_argument,
)
from prefopt.options import QUANTIZATIONS

DEVICES = ("auto", "cpu", "cuda")


def add_use_commands(commands: Any) -> None:
    """Add the three commands."""
    for add in (_export_command, _chat_command, _classify_command):
        add(commands)


def _export_command(commands: Any) -> None:
    def run(given: argparse.Namespace, rest: list[str]) -> int:
        reject_unknown(rest, "--format --quant --dtype --out --base --force".split())
        from prefopt.export.run import export_run

        folder = export_run(
            given.run,
            given.format,
            quant=given.quant,
            dtype=given.dtype,
            out=given.out,
            base=given.base,
            force=given.force,
        )
        print(folder)
        return 0

    export = new_command(commands, "export", run, "write a run's model as an adapter, merged, in 4 bits, or as GGUF")
    _run_argument(export)
    export.add_argument(
        "--format",
        choices=("adapter", "merged", "merged-4bit", "gguf"),
        required=True,
        help="what to write (required)",
    )
    export.add_argument("--quant", choices=("q8_0", "f16", "f32"), default="q8_0", help="of gguf (default: q8_0)")
    export.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of merged weights (default: auto, that of the base)",
    )
    export.add_argument("--out", type=path_argument, help="folder (default: RUN/export/FORMAT)")
    export.add_argument("--force", action="store_true", help="replace an earlier export")


def _chat_command(commands: Any) -> None:
    def run(given: argparse.Namespace, rest: list[str]) -> int:
        reject_unknown(
            rest,
            "--base --quantization --system --max-new-tokens --temperature --seed --device".split(),
        )
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

    chat = new_command(
        commands,
        "chat",
        run,
        "talk to a run, in the format that it was trained with",
        epilog="A line is a turn; /reset forgets the conversation, /quit leaves. Works on a pipe too: the answers "
        "alone go to stdout.",
    )
    _run_argument(chat)
    chat.add_argument("--system", type=utf8_argument, help="system prompt")
    chat.add_argument("--max-new-tokens", type=int, default=512, help="of an answer, at most (default: 512)")
    chat.add_argument(
        "--temperature",
        type=float,
        help="0 for the likeliest token each time (default: as in the model's generation config)",
    )
    chat.add_argument("--seed", type=int, help="of the sampling")
    _quantization_argument(chat)
    _device_argument(chat)


def _classify_command(commands: Any) -> None:
    def run(given: argparse.Namespace, rest: list[str]) -> int:
        reject_unknown(
            rest,
            "--base --quantization --labels --out --ask --plain --split --batch-size --device".split(),
        )
        from prefopt.use.classify import classify

        found = classify(
            given.run,
            given.file,
            labels=None if given.labels is None else given.labels.split(","),
            out=given.out,
            ask=given.ask,
            plain=given.plain,
            split=given.split,
            base=given.base,
            quantization=given.quantization,
            batch_size=given.batch_size,
            device=given.device,
        )
        print(
            found.table if found.path is None else found.path,
            end="" if found.path is None else "\n",
        )
        if found.known:
            share = found.right / found.known
            print(f"right: {found.right} of {found.known} ({share:.1%})", file=sys.stderr)
        return 0

    classify = new_command(commands, "classify", run, "the likeliest of a few answers to each prompt of a file, as CSV")
    _run_argument(classify)
    classify.add_argument(
        "file",
        type=text_argument,
        metavar="FILE",
        help=".txt with a prompt on each line; or .jsonl, .parquet, a built folder or a hub id with a column prompt",
    )
    classify.add_argument(
        "--labels",
        type=utf8_argument,
        metavar="A,B,...",
        help="the answers (default: the different desirable ones in the run's training rows)",
    )
    classify.add_argument("--out", type=path_argument, help=".csv file (default: stdout)")
    classify.add_argument(
        "--ask",
        type=utf8_argument,
        metavar="TEXT",
        help="put around each text, where {text} stands for it",
    )
    classify.add_argument("--plain", action="store_true", help="texts as they are, without the chat template")
    classify.add_argument("--split", type=text_argument, help="of a folder or hub dataset (default: train)")
    classify.add_argument("--batch-size", type=int, default=16, help="sequences at once (default: 16)")
    _quantization_argument(classify)
    _device_argument(classify)


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder")
    parser.add_argument(
        "--base",
        type=text_argument,
        metavar="MODEL",
        help="the base model, instead of the one that the adapter names",
    )


def _quantization_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="of the base's weights under an adapter (default: as in training)",
    )


def _device_argument(parser: argparse.ArgumentParser, choices: Sequence[str] = DEVICES) -> None:
    parser.add_argument("--device", choices=choices, default="auto", help="where it runs (default: auto)")
