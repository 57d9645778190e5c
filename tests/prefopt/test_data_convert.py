"""Every line of every published schema: an answer or two, or the one reason why not."""

import json
from pathlib import Path

import pytest

from prefopt.data.build.convert import KINDS, Dropped
from prefopt.data.build.convert.mmlu_pro import CATEGORIES
from prefopt.data.build.language import arabic_share, is_in
from prefopt.data.rows import RowError

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "data"


def lines(kind):
    text = (FIXTURES / f"{kind}.jsonl").read_text(encoding="utf-8")
    return list(enumerate((json.loads(line) for line in text.splitlines()), start=1))


def outcomes(kind, **options):
    """{line: reason | [(answer, label), ...]}"""
    found = {}
    for line, outcome in KINDS[kind].convert(lines(kind), **options):
        assert line not in found
        if isinstance(outcome, Dropped):
            found[line] = str(outcome)
        else:
            found[line] = [(answer.completion[0]["content"], answer.label) for answer in outcome]
    return found


def answers(kind, **options):
    return [
        answer
        for _, outcome in KINDS[kind].convert(lines(kind), **options)
        if isinstance(outcome, list)
        for answer in outcome
    ]


def pair(good, bad):
    return [(good, True), (bad, False)]


EXPECTED = {
    "ultrafeedback_binarized": {
        1: pair("Eleven.", "Twelve."),
        2: pair("عمّان.", "بغداد."),
        3: "both scores are equal",
        4: "the rejected answer has the higher score",
        5: "both answers are the same",
        6: "an answer is empty",
        7: pair("Fry them in butter.", "Throw them away."),
        8: "a conversation does not end with an answer",
        9: pair("Thirteen.", "Twelve."),
        10: "the conversations part before the last answer",
    },
    "hh-rlhf": {
        1: pair("Crush it with a knife first.", "No idea."),
        2: pair("Sure, shake it in a jar.", "Sure, use your teeth."),
        3: "the transcripts part before the last answer",
        4: "a transcript ends with the user's turn",
        5: "an answer is empty",
        6: "both transcripts are the same",
        7: "the speakers do not take turns",
        8: "a transcript does not begin with a speaker",
        9: pair("They write 'Human: hi' at the start.", "Ugly."),
        10: pair("Knock", "Knock knock"),
        11: pair("No idea.", "Crush it with a knife first."),
        12: "a turn before the answer is empty",
    },
    "shp": {
        1: pair("Three to five days if it is cooled at once.", "A week is fine."),
        2: pair("Three to five days if it is cooled at once.", "Until it walks."),
        3: pair("A week is fine.", "Until it walks."),
        4: "the scores tie",
        5: "the label contradicts the scores",
        6: "the score ratio is below 2",
        7: pair("Most lines of sight have not met a star's light yet.", "The sun is off."),
        8: "a comment was deleted",
        9: "the better score is not positive",
        10: pair("A guild of masons, after the flood.", "Bridge people."),
        11: "an answer is empty",
    },
    "oasst1": {
        **dict.fromkeys((1, 5, 11, 14, 17, 19, 22), "a prompter's message"),
        2: [("A long narrow inlet of the sea, carved by a glacier.", True)],
        3: "neither among the best nor the worst",
        4: [("A kind of car.", False)],
        6: [("No.", False)],
        7: [("Yes, in Fiordland.", True)],
        8: "the message is not ranked",
        9: "the message was deleted",
        10: "the review refused the message",
        12: [("ارتفاع ماء البحر وانخفاضه بفعل جاذبية القمر.", True)],
        13: [("لا أعرف.", False)],
        **dict.fromkeys((15, 16, 25, 26), "a message above it is deleted or missing"),
        **dict.fromkeys((18, 24), "no sibling to be compared with"),
        **dict.fromkeys((20, 21), "its siblings have the same rank"),
        23: "the answer is empty",
    },
    "kto-mix-14k": {
        1: [("Miso.", True)],
        2: [("Dog.", False)],
        3: [("Rain.", True)],
        4: [("Merci.", False)],
        5: "an answer is empty",
        6: [("Miso.", True)],
        7: [("Eleven.", True)],
        8: [("عمّان.", False)],
    },
    "mmlu-pro": {
        1: [("math", True)],
        2: [("computer science", True)],
        3: [("history", True)],
        4: "the question was asked before",
        5: [("physics", True)],
        6: [("law", True)],
        7: "the question is empty",
        8: [("health", True)],
    },
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_line_has_the_outcome_that_was_written_down(kind):
    assert outcomes(kind) == EXPECTED[kind]
    assert list(outcomes(kind)) == [line for line, _ in lines(kind)]  # in order, none forgotten


def test_the_prompt_of_a_transcript_is_all_it_shares():
    found = answers("hh-rlhf")
    assert [turn["role"] for turn in found[2].prompt] == ["user", "assistant", "user"]
    assert found[2].prompt[1]["content"] == "Crush it with a knife first."
    assert found[2].prompt == found[3].prompt
    # line 2 goes on from line 1: what line 1 teaches as an answer is in line 2's prompt
    assert found[0].group == found[2].group != found[4].group


def test_multi_turn_prompts_stay_messages():
    eggs = answers("ultrafeedback_binarized")[4]
    assert [turn["role"] for turn in eggs.prompt] == ["user", "assistant", "user"]
    assert [set(turn) for turn in eggs.prompt] == [{"role", "content"}] * 3
    rain = answers("kto-mix-14k")[2]
    assert [turn["role"] for turn in rain.prompt] == ["user", "assistant", "user"]


def test_the_ratio_of_scores_is_computed_and_can_be_chosen():
    assert outcomes("shp", min_ratio=1)[6] == pair("Four days.", "Six days.")
    assert outcomes("shp", min_ratio=4.5)[1] == "the score ratio is below 4.5"
    assert isinstance(outcomes("shp", min_ratio=4)[7], list)  # 20 to 5, written as 0.25
    assert {answer.category for answer in answers("shp")} == {"askculinary", "askphysics", "askhistory"}  # fmt: skip


def test_an_answer_down_a_tree_has_the_path_as_its_prompt():
    deep = next(one for one in answers("oasst1") if one.completion[0]["content"] == "No.")
    assert [turn["content"] for turn in deep.prompt] == [
        "What is a fjord?",
        "A long narrow inlet of the sea, carved by a glacier.",
        "Are there any in New Zealand?",
    ]
    assert [one.group for one in answers("oasst1")] == ["r1"] * 4 + ["r2"] * 2


def test_languages_and_halves_of_the_trees():
    arabic = outcomes("oasst1", languages=["ar"])
    assert [line for line, outcome in arabic.items() if isinstance(outcome, list)] == [12, 13]
    assert arabic[2] == "another language"
    rows = lines("oasst1")
    for rank, (line, row) in enumerate(rows[1:4]):
        assert row["rank"] == rank and line == rank + 2
    five = [(i, {**rows[1][1], "message_id": f"x{i}", "rank": i}) for i in range(5)]
    labels = [
        outcome[0].label if isinstance(outcome, list) else str(outcome)
        for line, outcome in KINDS["oasst1"].convert([(9, rows[0][1]), *five], keep="halves")
        if line != 9
    ]
    assert labels == [True, True, "neither among the best nor the worst", False, False]


def test_letters_are_those_of_the_options_shown():
    letters = outcomes("mmlu-pro", target="letter")
    assert [letters[line] for line in (1, 4, 5)] == [[("B", True)], [("A", True)], [("B", True)]]
    assert letters[6] == "answer and answer_index disagree"
    assert letters[8] == "the right option is N/A"
    newtons = answers("mmlu-pro", target="letter")[4].prompt[0]["content"]
    assert "A. 2\nB. 3\n" in newtons and "N/A" not in newtons


def test_a_question_shows_all_fields_and_not_its_source():
    asked = answers("mmlu-pro")[1].prompt[0]["content"]
    assert "ori_mmlu" not in asked and all(name in asked for name in CATEGORIES)
    assert len(CATEGORIES) == 14


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("ultrafeedback_binarized", {"score_chosen": None}, "score_chosen is missing; expected a number"),
        ("ultrafeedback_binarized", {"score_chosen": float("nan")}, "score_chosen is nan; expected a number"),
        ("ultrafeedback_binarized", {"chosen": "Eleven."}, "chosen is 'Eleven.'; expected a list of"),
        ("hh-rlhf", {"chosen": 3}, "chosen is 3; expected text"),
        ("shp", {"labels": 2}, "labels is 2; expected 1"),
        ("shp", {"post_id": None}, "post_id is missing; expected text"),
        ("oasst1", {"role": "user"}, "role is 'user'; expected prompter or assistant"),
        ("kto-mix-14k", {"label": 1}, "label is 1; expected true or false"),
        ("kto-mix-14k", {"label": "true"}, "label is 'true'; expected true or false"),
        ("mmlu-pro", {"category": "maths"}, "category is 'maths'; expected one of biology"),
    ],
)  # fmt: skip
def test_a_row_that_the_schema_should_not_have_is_a_bad_row(kind, change, reason):
    rows = [(1, {**lines(kind)[0][1], **change})]
    ((line, outcome),) = KINDS[kind].convert(rows)
    assert line == 1 and isinstance(outcome, RowError) and reason in str(outcome)


def test_a_rank_must_be_a_whole_number_and_a_nan_is_none():
    row = lines("oasst1")[1][1]
    reasons = [
        str(next(KINDS["oasst1"].convert([(1, {**row, "rank": rank})]))[1]) for rank in (0.5, True, float("nan"), 1.0)
    ]
    assert reasons == [
        "rank is 0.5; expected a whole number or nothing",
        "rank is True; expected a whole number or nothing",
        "the message is not ranked",
        "no sibling to be compared with",
    ]


def test_a_circle_of_messages_ends():
    root = {**lines("oasst1")[0][1], "parent_id": "a1"}
    rows = [(1, root), *lines("oasst1")[1:3]]
    assert str(list(KINDS["oasst1"].convert(rows))[1][1]) == "a message above it is deleted or missing"  # fmt: skip


# ---------------------------------------------------------------- Arabic


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("سلام", 1.0),
        ("سـلام", 1.0),  # tatweel is no letter
        ("سلام abcd", 0.5),
        ("ﺳﻼﻡ", 1.0),  # presentation forms
        ("٤٢؟ 😀", None),
        ("ʻabc", 0.0),
        ("گچپ", 0.0),  # letters of Persian alone
    ],
)
def test_the_share_of_arabic_letters(text, share):
    assert arabic_share(text) == share


def test_a_row_is_arabic_if_both_its_sides_are_as_far_as_they_have_letters():
    rows = [(row["prompt"], row["completion"]) for _, row in lines("arabic")]
    assert [is_in("ar", *row, 0.5) for row in rows] == [True, True, False, True, False, False, True]
    assert is_in("ar", *rows[4], 0.1) and all(is_in(None, *row, 0.5) for row in rows)
