"""`prefopt export` on the command line; nothing heavy is imported before it runs."""

import argparse
from typing import Any

from prefopt.cli.arguments import add_run_arguments, new_command, path_argument, reject_unknown


def add_export_command(commands: Any) -> None:
    """Add the command."""

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

    parser = new_command(commands, "export", run, "write a run's model as an adapter, merged, in 4 bits, or as GGUF")
    add_run_arguments(parser)
    add = parser.add_argument
    formats = ("adapter", "merged", "merged-4bit", "gguf")
    add("--format", choices=formats, required=True, help="what to write (required)")
    add("--quant", choices=("q8_0", "f16", "f32"), default="q8_0", help="type of gguf's matrices (default: q8_0)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="dtype of merged weights (default: auto, that of the base)")
    add("--out", type=path_argument, help="folder (default: RUN/export/FORMAT)")
    add("--force", action="store_true", help="replace an earlier export")
