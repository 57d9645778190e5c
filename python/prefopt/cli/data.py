"""`prefopt data build`, `inspect` and `check`."""

import argparse
from typing import Any

from prefopt.cli.arguments import at_least, command_group, new_command, path_argument, reject_unknown, text_argument
from prefopt.cli.exit import printable
from prefopt.errors import UserError
from prefopt.read_yaml import parse_yaml

FOUND_BAD_ROWS = 1


def add_data_commands(commands: Any) -> None:
    """Add `data` with its three commands."""
    data = commands.add_parser(
        "data",
        help="build and inspect data before training",
        description="Build and inspect data before training.",
        allow_abbrev=False,
    )
    actions = command_group(data)
    for add in (_add_build, _add_inspect, _add_check):
        add(actions)


def _add_inspect(actions: Any) -> None:
    def run(given: argparse.Namespace, rest: list[str]) -> int:
        reject_unknown(rest, ["--split", "--revision", "--rows"])
        from prefopt.data.describe import describe

        print(printable(describe(given.source, split=given.split, revision=given.revision, rows=given.rows)))
        return 0

    inspect = new_command(actions, "inspect", run, "show counts, lengths and a few rows")
    inspect.add_argument(
        "source", type=text_argument, metavar="DIR|FILE", help="a built folder, a .jsonl or .parquet file, or a hub id"
    )
    inspect.add_argument("--split", help="of a folder (default: all) or a hub dataset")
    inspect.add_argument("--revision", help="of a hub dataset")
    inspect.add_argument(
        "--rows", type=at_least(0), default=2, help="number of rows to show of each split (default: 2)"
    )


def _add_check(actions: Any) -> None:
    def run(given: argparse.Namespace, rest: list[str]) -> int:
        names = "split revision tokenizer model max-length template label-map as-chat row questions ngram"
        reject_unknown(rest, [f"--{name}" for name in names.split()])
        template = _mapping("--template", given.template)
        from prefopt.data.check import check
        from prefopt.data.template import template_problems

        for problem in template_problems(template, "--template"):
            raise UserError(f"command line: {problem}")
        checked = check(
            given.source,
            split=given.split,
            revision=given.revision,
            tokenizer=given.tokenizer,
            model=given.model,
            max_length=given.max_length,
            chat_template_kwargs=template,
            label_map=None if given.label_map is None else _mapping("--label-map", given.label_map),
            as_chat=given.as_chat,
            questions=given.questions,
            ngram=given.ngram,
            row=given.row,
        )
        print(printable(checked.text))
        return 0 if checked.clean else FOUND_BAD_ROWS

    check = new_command(actions, "check", run, "count rows, list every bad row, show the scored tokens")
    check.add_argument(
        "source", type=text_argument, metavar="FILE", help="a .jsonl or .parquet file, a built folder, or a hub id"
    )
    check.add_argument("--split", default="train", help="of a folder or hub dataset (default: train)")
    check.add_argument("--revision", help="of a hub dataset")
    check.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="folder or hub id of a tokenizer, to count tokens and show the scored ones (default: that of --model)",
    )
    check.add_argument(
        "--model",
        type=text_argument,
        metavar="PATH",
        help="folder or hub id of a model, to find tokens without an embedding; its weights are not read",
    )
    check.add_argument(
        "--max-length", type=at_least(2), default=1024, help="tokens of prompt and answer (default: 1024)"
    )
    check.add_argument(
        "--template",
        metavar="YAML",
        help="arguments of the chat template, as in training: '{enable_thinking: false}'",
    )
    check.add_argument(
        "--label-map",
        metavar="YAML",
        help="meaning of labels other than true and false, as data.label_map: '{1: true, 0: false}'",
    )
    check.add_argument("--as-chat", action="store_true", help="convert text to chat messages, as data.as_chat")
    check.add_argument("--row", type=int, help="number of the row whose tokens to show, from 0 (default: the first)")
    check.add_argument(
        "--questions",
        type=text_argument,
        metavar="FILE",
        help="evaluation questions that must not be in the data, .txt or .jsonl",
    )
    check.add_argument(
        "--ngram", type=int, default=8, help="consecutive words that a row must share with a question (default: 8)"
    )


def _add_build(actions: Any) -> None:
    def run(given: argparse.Namespace, rest: list[str]) -> int:
        others = ("command", "sources", "out", "traceback")
        arguments = {name: value for name, value in vars(given).items() if name not in others}
        reject_unknown(rest, ["--out", *(f"--{name.replace('_', '-')}" for name in arguments)])
        from prefopt.data.build.plan import make_plan
        from prefopt.data.build.run import build

        built = build(make_plan(given.sources, **arguments), given.out)
        print(f"{built.table}\n\n{built.folder}")
        return 0

    build = new_command(
        actions,
        "build",
        run,
        "convert, combine, deduplicate and split sources of preferences",
        epilog="SOURCE is a plan (a .yaml file or a packaged plan), or sources, each "
        "[NAME=][KIND:]PATH[@REVISION]: a .jsonl or .parquet file or a hub id. KIND is the schema "
        "(ultrafeedback_binarized, hh-rlhf, shp, oasst1, kto-mix-14k, mmlu-pro, or rows: unpaired rows "
        "and pairs); a KIND without a PATH is the published set. Options override the plan's.",
    )
    build.add_argument("sources", type=text_argument, nargs="+", metavar="SOURCE", help="a plan, or sources")
    build.add_argument("--out", type=path_argument, required=True, help="the new folder (required)")
    kind: Any
    for flag, kind, text in (
        ("--seed", int, "random seed (default: 0)"),
        ("--validation", float, "share of the groups in the validation split (default: 0.05)"),
        ("--test", float, "share of the groups in the test split (default: 0)"),
        ("--groups-per-source", int, "maximum number of groups from each source"),
        ("--max-rows", int, "maximum number of rows, taken a group of each source in turn"),
        ("--language-share", float, "minimum share of Arabic letters in prompt and answer (default: 0.5)"),
    ):
        build.add_argument(flag, type=kind, help=text)
    for flag, choices, text in (
        ("--until", ("all", "first"), "stop when all sources, or the first one, run out (default: all)"),
        ("--language", ("ar",), "keep only rows in Arabic letters"),
        ("--on-bad-row", ("stop", "skip"), "stop at bad rows, or skip and list them (default: stop)"),
        ("--format", ("parquet", "jsonl"), "of the files (default: parquet)"),
    ):
        build.add_argument(flag, choices=choices, help=text)
    for flag, text in (
        ("--exact-split", "split in the exact shares, also within each category, instead of by hash"),
        ("--messages", "convert text to chat messages"),
        ("--one-label", "allow rows of one label only, for supervised training"),
    ):
        build.add_argument(flag, action="store_true", default=None, help=text)


def _mapping(option: str, text: str | None) -> dict[Any, Any]:
    try:
        found = {} if text is None else parse_yaml(text)
    except UserError:
        found = text
    if not isinstance(found, dict):
        raise UserError(f"command line: {option} is {text!r}; expected {{NAME: VALUE}}")
    return found
