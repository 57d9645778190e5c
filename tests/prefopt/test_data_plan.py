"""Plans: what the words of the command line mean, strict keys, and the plans that come with the package."""

import argparse
import inspect

import pytest
import yaml

from prefopt.cli import build_parser
from prefopt.data.build.convert import KINDS
from prefopt.data.build.plan import OPTION_CHECKS, PLAN_CHECKS, Plan, make_plan, plan_names
from prefopt.errors import DataError


@pytest.mark.parametrize(
    ("word", "name", "kind", "path", "revision"),
    [
        ("a/rows.jsonl", "rows", "rows", "a/rows.jsonl", None),
        ("mine=a/rows.jsonl", "mine", "rows", "a/rows.jsonl", None),
        ("shp:a/rows.parquet", "shp", "shp", "a/rows.parquet", None),
        ("base=hh-rlhf:a.jsonl", "base", "hh-rlhf", "a.jsonl", None),
        ("someone/rows", "rows", "rows", "someone/rows", None),
        ("someone/rows@v1", "rows", "rows", "someone/rows", "v1"),
        ("stanfordnlp/SHP", "shp", "shp", "stanfordnlp/SHP", KINDS["shp"].revision),
        ("shp", "shp", "shp", "stanfordnlp/SHP", KINDS["shp"].revision),
        ("shp:stanfordnlp/SHP@main", "shp", "shp", "stanfordnlp/SHP", "main"),
    ],
)
def test_words(word, name, kind, path, revision):
    (source,) = make_plan([word]).sources
    assert (source.name, source.kind, source.path, source.revision) == (name, kind, path, revision)


def test_a_file_is_a_file_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shp:x@y.jsonl").write_text("")
    (source,) = make_plan(["shp:x@y.jsonl"]).sources
    assert (source.path, source.kind) == ("shp:x@y.jsonl", "rows")
    (source,) = make_plan(["shp:x@y.jsonl.parquet"]).sources
    assert (source.path, source.kind, source.revision) == ("x@y.jsonl.parquet", "shp", None)
    (tmp_path / "a=b.jsonl").write_text("")
    assert make_plan(["a=b.jsonl"]).sources[0].path == "a=b.jsonl"


def write(path, content):
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_a_plan_from_a_file_and_the_command_line_over_it(tmp_path):
    path = write(
        tmp_path / "plan.yaml",
        {
            "sources": ["kto-mix-14k", {"kind": "shp", "min_ratio": 3, "groups": 10}],
            "seed": 1,
            "test": 0.1,
        },
    )
    plan = make_plan([path], seed=2, validation=None)
    assert (plan.seed, plan.test, plan.validation) == (2, 0.1, 0.05)
    assert plan.sources[1].options == {"min_ratio": 3} and plan.sources[1].groups == 10
    assert plan.sources[1].per_group == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sources": ["shp"], "sead": 1}, "sead is unknown; did you mean seed?"),
        ({"sources": []}, r"sources is \[\]; expected a list of sources"),
        ({"seed": 1}, "sources is None; expected a list"),
        (["shp"], "expected keys with values"),
        ({"sources": [{"kind": "shp", "min_ration": 2}]}, "min_ration is unknown; did you mean min_ratio?"),
        ({"sources": [{"kind": "hh-rlhf", "min_ratio": 2}]}, "hh-rlhf: min_ratio is unknown"),
        ({"sources": [{"kind": "shp", "min_ratio": 0.5}]}, "min_ratio is 0.5; expected a number, at least 1"),
        ({"sources": [{"kind": "oasst1", "languages": "ar"}]}, "languages is 'ar'; expected a list"),
        ({"sources": [{"kind": "mmlu-pro", "target": "field"}]}, "target is 'field'; expected one of category, letter"),
        ({"sources": [{"kind": "oast1"}]}, "kind is 'oast1'; expected one of .*; did you mean oasst1?"),
        ({"sources": [{"kind": "rows"}]}, "a source of the kind rows needs a path"),
        ({"sources": [{"split": "train"}]}, "expected a kind or a path"),
        ({"sources": [3]}, "a source is 3; expected a kind or a path"),
        ({"sources": ["shp"], "language": "en"}, "language is 'en'; expected one of ar"),
        ({"sources": ["shp"], "seed": True}, "seed is True; expected a whole number"),
        ({"sources": ["shp"], "format": "csv"}, "format is 'csv'; expected one of parquet, jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_plan_is_one_sentence(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        make_plan([write(tmp_path / "plan.yaml", content)])


def test_a_plan_that_is_no_yaml(tmp_path):
    (tmp_path / "plan.yaml").write_text("sources: [", encoding="utf-8")
    with pytest.raises(DataError, match="plan.yaml is not valid YAML"):
        make_plan([str(tmp_path / "plan.yaml")])


def test_the_plans_that_come_with_the_package():
    assert plan_names() == ["s0-ultrafeedback", "s1-combined", "s2-arabic", "s3-kto-mix", "s4-mmlu-pro"]  # fmt: skip
    plans = {name: make_plan([name]) for name in plan_names()}
    assert all(source.revision for plan in plans.values() for source in plan.sources)
    assert plans["s1-combined"].max_rows == 14_000 and len(plans["s1-combined"].sources) == 3
    assert plans["s4-mmlu-pro"].sources[0].per_category == 142


def test_the_command_line_has_every_argument_of_a_plan_and_no_other():
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    data = commands.choices["data"]
    actions = next(a for a in data._actions if isinstance(a, argparse._SubParsersAction))
    flags = {action.dest for action in actions.choices["build"]._actions}
    assert flags - {"help", "sources", "out", "traceback"} == set(PLAN_CHECKS)
    assert set(PLAN_CHECKS) == set(inspect.signature(Plan).parameters) - {"sources"}
    text = " ".join(actions.choices["build"].format_help().split())
    plan = make_plan(["shp"])
    for name in ("seed", "validation", "test", "language_share"):
        assert f"(default: {getattr(plan, name):g})" in text
    assert all(kind in text.replace(" ", "") for kind in KINDS)


def test_every_option_of_a_converter_can_be_checked():
    taken = {
        name
        for kind in KINDS.values()
        for name, one in inspect.signature(kind.convert).parameters.items()
        if one.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert taken == set(OPTION_CHECKS) | {"messages"}  # messages belongs to the plan
