"""The command line: `prefopt demo`, `train`, `eval`, `data`, `report` and `study`.

Nothing heavy is imported before a command runs, so that help is there at once.
"""

import argparse
import difflib
import json
import logging
import re
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from prefopt import __version__
from prefopt.compare.commands import add_compare_command
from prefopt.evaluate.commands import add_eval_command
from prefopt.recipe.load import RecipeError, load_recipe
from prefopt.recipe.schema import SECTIONS, Loss, options_of, required
from prefopt.use.commands import add_use_commands

USAGE_ERROR = 2  # as argparse exits on a wrong argument
INTERRUPTED = 130  # as a shell reports Ctrl-C
FOUND_BAD_ROWS = 1
OVERRIDE = "override "  # before the dotted keys among the parsed arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code.

    0 if it went well; 1 if `data check` found something to mend; 2, with one message on stderr, if something given to it was
    wrong; 130 if it was interrupted.
    """
    parser = build_parser()
    given, rest = parser.parse_known_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return given.command(given, rest) or 0
    except KeyboardInterrupt:
        hint = "; `--resume` goes on from the last checkpoint" if given.command is _train else ""
        print(f"prefopt: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except _user_errors() as error:
        if given.traceback:
            traceback.print_exc()
        print(f"prefopt: {error}", file=sys.stderr)
        return USAGE_ERROR


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="prefopt",
        description="Train language models on thumbs up and thumbs down.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"prefopt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _demo_command(commands)
    _train_command(commands)
    add_eval_command(commands, _command, _no_more)
    add_compare_command(commands, _command, _no_more)
    _data_command(commands)
    _report_command(commands)
    _study_command(commands)
    add_use_commands(commands, _command, _no_more)
    return parser


def _demo_command(commands: Any) -> None:
    demo = _command(
        commands,
        "demo",
        _demo,
        "train a tiny model on embedded data, in minutes, without network",
    )
    demo.add_argument(
        "--method",
        choices=get_args(get_type_hints(Loss)["method"]),
        default="kto",
        help="instead of KTO (default: kto)",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-run"), help="run folder (default: demo-run)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")


def _demo(given: argparse.Namespace, rest: list[str]) -> int:
    _no_more(rest, ["--out", "--seed", "--method"])
    from prefopt.demo import run_demo

    print(run_demo(given.out, given.seed, given.method))
    return 0


def _train_command(commands: Any) -> None:
    train = _command(
        commands,
        "train",
        _train,
        "train as a recipe says",
        usage="prefopt train RECIPE.yaml [--resume] [--SECTION.OPTION VALUE ...]",
        epilog="Any option of the recipe can be set here, over what the file says: --loss.beta 0.2. "
        "`--lora null` trains all weights instead of an adapter.",
    )
    train.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the recipe")
    train.add_argument(
        "--resume", action="store_true", help="go on from the run folder's last checkpoint"
    )
    for section, kind in SECTIONS.items():
        group = train.add_argument_group(section, kind.__doc__)
        if section == "lora":
            group.add_argument("--lora", dest=f"{OVERRIDE}lora", metavar="null", help="no adapter")
        hints = get_type_hints(kind)
        for name, one in options_of(section).items():
            group.add_argument(
                f"--{section}.{name}",
                dest=f"{OVERRIDE}{section}.{name}",
                metavar=_metavar(hints[name]),
                help=_help(one),
            )


def _train(given: argparse.Namespace, rest: list[str]) -> int:
    overrides = {
        key.removeprefix(OVERRIDE): _value(key.removeprefix(OVERRIDE), text)
        for key, text in vars(given).items()
        if key.startswith(OVERRIDE) and text is not None
    }
    # A dotted name that is no option goes on to the recipe's check, which reports it with everything else.
    unknown = [text for text in rest if re.match(r"--\w+\.\w", text)]
    _no_more(
        [text for text in rest if text.startswith("-") and text not in unknown],
        ["--resume", "--lora"],
    )
    overrides |= {text[2:].partition("=")[0]: None for text in unknown}
    recipe = load_recipe(given.recipe, overrides)
    from prefopt.recipe import run_recipe

    folder = run_recipe(recipe, resume=given.resume)
    print(folder / "report.html")
    return 0


def _data_command(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="build data, and look at it before training",
        description="Build data, and look at it before training.",
    )
    actions = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _data_build_command(actions)
    inspect = _command(actions, "inspect", _data_inspect, "counts, lengths and a few rows")
    inspect.add_argument(
        "source", metavar="DIR|FILE", help="a built folder, a .jsonl or .parquet file, or a hub id"
    )
    inspect.add_argument("--split", help="of a folder (default: all) or a hub dataset")
    inspect.add_argument("--revision", help="of a hub dataset")
    inspect.add_argument("--rows", type=int, default=2, help="to show of each split (default: 2)")
    check = _command(
        actions, "check", _data_check, "count rows, list every bad one, show what is scored"
    )
    check.add_argument(
        "source", metavar="FILE", help="a .jsonl or .parquet file, a built folder, or a hub id"
    )
    check.add_argument(
        "--split", default="train", help="of a folder or hub dataset (default: train)"
    )
    check.add_argument("--revision", help="of a hub dataset")
    check.add_argument(
        "--tokenizer",
        "--model",
        metavar="PATH",
        help="folder or hub id of a tokenizer or model, to count its tokens and show which are scored",
    )
    check.add_argument(
        "--max-length", type=int, default=1024, help="tokens of prompt and answer (default: 1024)"
    )
    check.add_argument(
        "--template",
        metavar="YAML",
        help="arguments of the chat template, as in training: '{enable_thinking: false}'",
    )
    check.add_argument("--row", type=int, default=0, help="whose tokens to show (default: 0)")
    check.add_argument(
        "--questions", metavar="FILE", help="evaluation questions, .txt or .jsonl, to look for"
    )
    check.add_argument(
        "--ngram",
        type=int,
        default=8,
        help="words that a row must share with a question (default: 8)",
    )


def _data_build_command(actions: Any) -> None:
    build = _command(
        actions,
        "build",
        _data_build,
        "convert, combine, deduplicate and split sources of preferences",
        epilog="SOURCE is a plan (a .yaml file, or one that comes with prefopt), or sources, each "
        "[NAME=][KIND:]PATH[@REVISION]: a .jsonl or .parquet file or a hub id. KIND is the schema "
        "(ultrafeedback_binarized, hh-rlhf, shp, oasst1, kto-mix-14k, mmlu-pro, or rows: rated rows "
        "and pairs) and, alone, the published set. Options given here win over the plan's.",
    )
    build.add_argument("sources", nargs="+", metavar="SOURCE", help="a plan, or sources")
    build.add_argument("--out", type=Path, required=True, help="the new folder (required)")
    for flag, kind, text in (
        ("--seed", int, "of everything random (default: 0)"),
        ("--validation", float, "share of the groups (default: 0.05)"),
        ("--test", float, "share of the groups (default: 0)"),
        ("--groups-per-source", int, "take so many groups of each source at most"),
        ("--max-rows", int, "take so many rows in all at most, a group of each source in turn"),
        ("--language-share", float, "of Arabic letters in prompt and answer (default: 0.5)"),
    ):
        build.add_argument(flag, type=kind, help=text)
    for flag, choices, text in (
        ("--until", ("all", "first"), "sources have run out (default: all)"),
        ("--language", ("ar",), "keep rows in Arabic letters alone"),
        ("--on-bad-row", ("stop", "skip"), "stop, or skip and list them (default: stop)"),
        ("--format", ("parquet", "jsonl"), "of the files (default: parquet)"),
    ):
        build.add_argument(flag, choices=choices, help=text)
    for flag, text in (
        ("--exact-split", "cut the shares exactly, and evenly in each category, not by threshold"),
        ("--messages", "make chat messages of text"),
        ("--one-label", "allow rows of one label alone, for supervised training"),
    ):
        build.add_argument(flag, action="store_true", default=None, help=text)


def _data_build(given: argparse.Namespace, rest: list[str]) -> int:
    arguments = {
        name: value
        for name, value in vars(given).items()
        if name not in ("command", "sources", "out", "traceback")
    }
    _no_more(rest, ["--out", *(f"--{name.replace('_', '-')}" for name in arguments)])
    from prefopt.data.build import build
    from prefopt.data.plan import make_plan

    built = build(make_plan(given.sources, **arguments), given.out)
    print(f"{built.table}\n\n{built.folder}")
    return 0


def _data_inspect(given: argparse.Namespace, rest: list[str]) -> int:
    _no_more(rest, ["--split", "--revision", "--rows"])
    from prefopt.data.describe import describe

    print(describe(given.source, split=given.split, revision=given.revision, rows=given.rows))
    return 0


def _data_check(given: argparse.Namespace, rest: list[str]) -> int:
    _no_more(
        rest,
        "--split --revision --tokenizer --model --max-length --template --row --questions --ngram".split(),
    )
    from prefopt.data.check import check

    checked = check(
        given.source,
        split=given.split,
        revision=given.revision,
        tokenizer=given.tokenizer,
        max_length=given.max_length,
        chat_template_kwargs=_template_arguments(given.template),
        questions=given.questions,
        ngram=given.ngram,
        row=given.row,
    )
    print(checked.text)
    return 0 if checked.clean else FOUND_BAD_ROWS


def _template_arguments(text: str | None) -> dict[str, Any]:
    try:
        found = {} if text is None else yaml.safe_load(text)
    except yaml.YAMLError:
        found = text
    if not isinstance(found, dict):
        raise RecipeError(f"command line: --template is {text!r}; expected {{NAME: VALUE}}")
    return found


def _report_command(commands: Any) -> None:
    report = _command(
        commands, "report", _report, "write report.html, plots and model card of a run again"
    )
    report.add_argument("run", type=Path, metavar="RUN", help="run folder")


def _report(given: argparse.Namespace, rest: list[str]) -> int:
    _no_more(rest, [])
    if not (given.run / "run.json").is_file():
        raise RecipeError(f"{given.run} is not a run folder: it has no run.json")
    from prefopt.report import write_report

    print(write_report(given.run))
    return 0


def _study_command(commands: Any) -> None:
    study = commands.add_parser(
        "study", help="run an experiment again", description="Run an experiment again."
    )
    studies = study.add_subparsers(title="commands", metavar="COMMAND", required=True)
    bco = _command(
        studies,
        "bco-stability",
        _study_bco,
        "when BCO's shift makes training unstable, and what cures it, on an embedded tiny policy",
        epilog="A second start with the same --out runs only what is missing.",
    )
    size = bco.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a part of the grid, in about a minute (default)"
    )
    size.add_argument(
        "--full", action="store_true", help="the whole grid: about 45 minutes of one core"
    )
    bco.add_argument(
        "--out", type=Path, default=Path("bco-stability"), help="folder (default: bco-stability)"
    )
    bco.add_argument("--processes", type=int, default=1, help="of one thread each (default: 1)")
    bco.add_argument("--seeds", type=int, help="of each cell (default: what the plan says)")


def _study_bco(given: argparse.Namespace, rest: list[str]) -> int:
    _no_more(rest, ["--quick", "--full", "--out", "--processes", "--seeds"])
    from prefopt.study import run_study

    print(run_study(given.out, full=given.full, processes=given.processes, seeds=given.seeds))
    return 0


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace, list[str]], int],
    summary: str,
    **texts: str,
) -> argparse.ArgumentParser:
    text = summary[0].upper() + summary[1:] + "."
    parser = commands.add_parser(name, help=summary, description=text, allow_abbrev=False, **texts)
    parser.add_argument(
        "--traceback", action="store_true", help="on an error, show where it happened as well"
    )
    parser.set_defaults(command=run)
    return parser


def _user_errors() -> tuple[type[Exception], ...]:
    """What ends in one message: OSError for full disks and lost permissions, the rest are ours."""
    errors = [RecipeError, OSError]
    for module, name in (
        ("prefopt.data.rows", "DataError"),
        ("prefopt.evaluate.request", "EvalError"),
        ("prefopt.train.finite", "NonFiniteError"),
    ):
        if module in sys.modules:  # what was not imported was not raised
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def _no_more(rest: list[str], known: list[str]) -> None:
    """Refuse what no option took, with the nearest one that exists."""
    if rest:
        name = rest[0].partition("=")[0]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"command line: {name} is unknown{hint}")


def _value(key: str, text: str) -> Any:
    """A value as YAML would read it, except that a name stays a name: run 7 is a folder, not a number."""
    section, _, name = key.partition(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"command line: {key} is {text!r}; expected a YAML value") from None
    named = name and str in _kinds(get_type_hints(SECTIONS[section])[name])
    return text if named and value is not None and not isinstance(value, list) else value


def _kinds(hint: Any) -> tuple:
    """The alternatives of a union, the type itself otherwise."""
    return get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)


def _metavar(hint: Any) -> str:
    return "|".join(_word(kind) for kind in _kinds(hint))


def _word(kind: Any) -> str:
    choices = [choice for choice in get_args(kind) if isinstance(choice, str)]
    if choices:
        return "{" + ",".join(choices) + "}"
    words = {
        bool: "true|false",
        int: "INT",
        float: "NUMBER",
        str: "TEXT",
        dict: "MAPPING",
        type(None): "null",
    }
    return words.get(kind, "LIST")


def _help(one: Field) -> str:
    if required(one):
        return f"{one.metadata['help']} (required)"
    default = one.default if one.default is not MISSING else one.default_factory()
    shown = one.metadata["shown"] or (default if isinstance(default, str) else json.dumps(default))
    return f"{one.metadata['help']} (default: {shown})".replace("%", "%%")


if __name__ == "__main__":
    sys.exit(main())
