"""`prefopt eval` on the command line; nothing heavy is imported before it runs."""

import argparse
from typing import Any

from prefopt.cli.arguments import new_command, path_argument, reject_unknown, text_argument
from prefopt.evaluate import evaluate_run
from prefopt.evaluate.request import SUITES, EvalRequest


def add_eval_command(commands: Any) -> None:
    """Add the command."""

    def evaluate(given: argparse.Namespace, rest: list[str]) -> int:
        arguments = {name: value for name, value in vars(given).items() if name not in ("command", "traceback")}
        reject_unknown(rest, [f"--{name.replace('_', '-')}" for name in arguments if name != "run"])
        said = {name: value for name, value in arguments.items() if value is not None}
        print(f"\n{evaluate_run(EvalRequest(**said))}")
        return 0

    parser = new_command(
        commands,
        "eval",
        evaluate,
        "evaluate a run against its base model",
        epilog="Writes eval.json, eval_summary.csv and plots into the run folder, complete or not at all, and the "
        "run's report.html and model card again. " + " ".join(f"{name}: {text}." for name, text in SUITES.items()),
    )
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder, or a saved model or adapter")
    parser.add_argument("--suite", required=True, metavar=f"{{{','.join(SUITES)}}}", help="what to measure (required)")
    for flag, kind, text in (
        (
            "--data",
            text_argument,
            "rows for preference and classify: a file, a built folder or a hub id",
        ),
        ("--split", text_argument, "of a built folder or hub dataset"),
        ("--tasks-dir", path_argument, "folder with the questions of benchmarks, instead of the hub"),
        ("--limit", int, "use the first N questions of each task, or rows"),
        ("--out", path_argument, "folder for the results (default: RUN)"),
        ("--base", text_argument, "the base model, if it is not the one that the run names"),
        ("--quantization", str, "of the base's weights, nf4 or none (default: as in training)"),
        (
            "--rule",
            str,
            "for answers of preference: demo, language, contains:TEXT or regex:PATTERN",
        ),
        ("--temperature", float, "of the answers that the rule judges (default: 1)"),
        ("--max-new-tokens", int, "of a generated answer"),
        ("--batch-size", int, "rows at a time (default: 8)"),
        ("--seed", int, "of bootstrap and sampling (default: 0)"),
    ):
        parser.add_argument(flag, type=kind, help=text)
