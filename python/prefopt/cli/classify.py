"""`prefopt classify` on the command line; nothing heavy is imported before it runs."""

import argparse
import sys
from typing import Any

from prefopt.cli.arguments import (
    add_device_argument,
    add_quantization_argument,
    add_run_arguments,
    new_command,
    path_argument,
    reject_unknown,
    text_argument,
    utf8_argument,
)


def add_classify_command(commands: Any) -> None:
    """Add the command."""

    def run(given: argparse.Namespace, rest: list[str]) -> int:
        flags = "--base --quantization --labels --out --ask --plain --split --batch-size --device"
        reject_unknown(rest, flags.split())
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
        if found.path is None:
            print(found.table, end="")
        else:
            print(found.path)
        if found.known:
            share = found.right / found.known
            print(f"right: {found.right} of {found.known} ({share:.1%})", file=sys.stderr)
        return 0

    parser = new_command(commands, "classify", run, "the likeliest of a few answers to each prompt of a file, as CSV")
    add_run_arguments(parser)
    add = parser.add_argument
    add(
        "file",
        type=text_argument,
        metavar="FILE",
        help=".txt with a prompt per line; or .jsonl, .parquet, a built folder or a hub id with the column prompt",
    )
    add(
        "--labels",
        type=utf8_argument,
        metavar="A,B,...",
        help="the answers (default: the different desirable ones of the run's training rows)",
    )
    add("--out", type=path_argument, help=".csv file (default: stdout)")
    add("--ask", type=utf8_argument, metavar="TEXT", help="template of each prompt, with {text} as placeholder")
    add("--plain", action="store_true", help="use texts unchanged, without the chat template")
    add("--split", type=text_argument, help="of a folder or hub dataset (default: train)")
    add("--batch-size", type=int, default=16, help="sequences in a forward pass (default: 16)")
    add_quantization_argument(parser)
    add_device_argument(parser)
