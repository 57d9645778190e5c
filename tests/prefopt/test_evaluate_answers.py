"""Names in generated answers, and the rules that judge them."""

import pytest

from prefopt.data.build.convert.mmlu_pro import CATEGORIES
from prefopt.errors import UserError
from prefopt.evaluate.answers import name_in
from prefopt.evaluate.request import EvalRequest
from prefopt.evaluate.rules import make_rule


@pytest.mark.parametrize("name", CATEGORIES)
@pytest.mark.parametrize("form", ["{}", " {}.\n", "**{}**", "The category is {}.", "Answer: {}, because"])
def test_every_name_is_read(name, form):
    assert name_in(form.format(name), CATEGORIES) == name
    assert name_in(form.format(name).upper(), CATEGORIES) == name


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("computer science", "computer science"),  # not its first word
        ("computer", None),
        ("Computer \n science of law", "computer science"),
        ("lawn mowing", None),
        ("mathematics", None),
        ("<think>\nlaw or math?\n</think>\n\nmath", "math"),
        ("<think>\nlaw", None),
        ("biology, not law", "biology"),
        ("It is about law", None),
        ("", None),
        ("؛ law،", "law"),
    ],
)
def test_what_is_read(answer, expected):
    assert name_in(answer, CATEGORIES) == expected


def test_the_longest_name_wins_in_any_order():
    assert name_in("other things", ["other", "other things"]) == "other things"
    assert name_in("other things", ["other things", "other"]) == "other things"


def test_rules():
    assert make_rule("demo")("How do I boil an egg?", "Gladly! Boil the egg.")
    assert not make_rule("demo")("How do I boil an egg?", "Look it up yourself.")
    assert make_rule("language")("ما لون السماء؟", "زرقاء") and not make_rule("language")("Why?", "لأن")
    assert not make_rule("language")("Why?", "  ")
    assert make_rule("contains:OK")("?", "it is ok") and not make_rule("contains:OK")("?", "no")
    assert make_rule("regex:^a+$")("?", "aaa") and not make_rule("regex:^a+$")("?", "b")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("demmo", "did you mean demo"),
        ("contains:", "expected demo, language, contains:TEXT or regex:PATTERN"),
        ("regex:(", "is not a regular expression"),
    ],
)
def test_a_rule_that_is_none(rule, message):
    with pytest.raises(UserError, match=message):
        make_rule(rule)


def test_the_demo_rule_refuses_other_questions():
    with pytest.raises(UserError, match="applies to the demo's questions only"):
        make_rule("demo")("What is the capital of Mali?", "Gladly! It is Bamako.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "benchmark"}, "did you mean benchmarks?"),
        ({"suite": "thesis"}, "--suite is 'thesis', which is now called benchmarks"),
        ({"suite": "benchmarks", "data": "x"}, "--data belongs to the suite preference and classify"),
        ({"suite": "classify", "rule": "demo"}, "--rule belongs to the suite preference, not to"),
        ({"suite": "classify", "limit": 0}, "--limit is 0; expected at least 1"),
        (
            {"suite": "preference", "temperature": 0.0},
            "--temperature is 0.0; expected a number above",
        ),
        ({"suite": "preference", "temperature": float("nan")}, "--temperature is nan"),
        ({"suite": "benchmarks", "seed": -1}, "--seed is -1"),
    ],
)
def test_a_request_that_makes_no_sense(tmp_path, options, message):
    with pytest.raises(UserError) as error:
        EvalRequest(run=tmp_path, **options)
    assert message in str(error.value)
