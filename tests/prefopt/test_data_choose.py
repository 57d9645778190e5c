"""The stages between reading and writing: nothing is lost without a reason, no group is in two splits."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prefopt.data.build.choose import (
    CONTRADICTORY,
    ELSEWHERE,
    GROUPS,
    MAX_ROWS,
    PER_CATEGORY,
    PER_GROUP,
    RAN_OUT,
    REASONS,
    REPEATED,
    Answers,
    choose,
)
from prefopt.data.build.counts import Reading, count, table
from prefopt.data.build.plan import Plan, Source
from prefopt.errors import DataError


def plan(sources=1, **arguments):
    made = tuple(Source(kind="rows", path=f"{i}.jsonl", name=f"s{i}") for i in range(sources))
    return Plan(sources=made, **{"validation": 0.0, "one_label": True, **arguments})


def answers(*rows):
    """Rows of (source, line, prompt, completion, label) or with a group and a category as well."""
    made = Answers()
    for source, line, prompt, completion, label, *more in rows:
        group, category = (more + [f"g{prompt}", ""][len(more) :])[:2]
        key = f"{prompt}|{completion}".encode()
        made.add(source, line, label, prompt.encode(), key, f"s{source}/{group}", category)
    return made


ROWS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(1, 8),
        st.sampled_from("abcdefghij"),
        st.sampled_from("xyz"),
        st.booleans(),
        st.sampled_from(["t1", "t2", "t3", "t4", "t5", "t6", "t7", "t8"]),
        st.sampled_from(["", "law"]),
    ),
    min_size=1,
    max_size=60,
)
PLANS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "validation": st.sampled_from([0.0, 0.2]),
        "test": st.sampled_from([0.0, 0.3]),
        "exact_split": st.booleans(),
        "groups_per_source": st.sampled_from([None, 1, 3]),
        "max_rows": st.sampled_from([None, 4, 20]),
        "until": st.sampled_from(["all", "first"]),
    }
)


@given(ROWS, PLANS, st.sampled_from([None, 1, 2]), st.sampled_from([None, 2]))
@settings(max_examples=300, deadline=None)
def test_every_answer_is_accounted_for_and_no_group_is_in_two_splits(rows, arguments, per_group, per_category):
    made, asked = answers(*rows), plan(3, **arguments)
    capped = replace(asked.sources[0], per_group=per_group, per_category=per_category)
    asked = replace(asked, sources=(capped, *asked.sources[1:]))
    try:
        splits = choose(made, asked)
    except DataError:
        assume(False)  # a split without rows; another test looks at the message
    kept = [number for split in splits.values() for number in split]
    assert sorted(kept) == made.alive() and len(set(kept)) == len(kept)
    assert set(made.reason) <= {None, *REASONS}
    groups = [{made.group_name(number) for number in split} for split in splits.values()]
    prompts = [{rows[number][2] for number in split} for split in splits.values()]
    for sets in (groups, prompts):
        assert sum(map(len, sets)) == len(set().union(*sets))
    keys = [made.key[number] for number in kept]
    assert len(set(keys)) == len(keys)  # neither repeated nor contradictory
    readings = [Reading(read=5, used=5) for _ in range(3)]
    counts = count(readings, made, splits, asked)
    for column in (*counts["sources"].values(), counts["total"]):
        assert column["answers"] == column["kept"] + sum(column["dropped"].values())
        assert column["kept"] == sum(split["rows"] for split in column["splits"].values())
        assert column["kept"] == column["desirable"] + column["undesirable"]
        for name in ("desirable", "undesirable"):
            assert column[name] == sum(split[name] for split in column["splits"].values())
    for name in ("answers", "kept", "desirable"):
        assert counts["total"][name] == sum(one[name] for one in counts["sources"].values())
    assert f"{counts['total']['kept']}" in table(counts)


@given(ROWS, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_a_groups_split_does_not_depend_on_the_order_of_the_rows(rows, random):
    asked = plan(3, validation=0.4)
    shuffled = rows.copy()
    random.shuffle(shuffled)
    found = []
    for one in (rows, shuffled):
        made = answers(*one)
        try:
            splits = choose(made, asked)
        except DataError:
            assume(False)
        found.append({name: {made.group_name(n) for n in split} for name, split in splits.items()})
    assert found[0] == found[1]


def test_contradictions_leave_with_all_their_copies_across_sources():
    made = answers(
        (0, 1, "p", "a", True),
        (0, 2, "p", "a", True),
        (1, 1, "p", "a", False),
        (1, 2, "p", "b", False),
    )
    assert choose(made, plan(2)) == {"train": [3]}
    assert made.reason == [CONTRADICTORY] * 3 + [None]


def test_the_first_copy_stays_and_where_the_others_were_is_said():
    made = answers(
        (0, 1, "p", "a", True),
        (1, 1, "p", "a", True),
        (0, 2, "p", "a", True),
        (2, 1, "q", "a", True),
    )
    choose(made, plan(3))
    assert made.reason == [None, ELSEWHERE, REPEATED, None]


def test_groups_that_share_a_prompt_are_one():
    made = answers(
        (0, 1, "p", "a", True, "tree1"),
        (0, 2, "q", "b", True, "tree1"),
        (1, 1, "q", "c", True, "post9"),
        (1, 2, "r", "d", True, "post9"),
        (1, 3, "z", "e", True, "other"),
    )
    assert [made.group_name(number) for number in range(5)] == ["s0/tree1"] * 4 + ["s1/other"]


def test_rows_of_a_group_are_capped_pair_by_pair():
    rows = [(0, i // 2, "p", f"{i}", i % 2 == 0, "post") for i in range(12)]
    made = answers(*rows, (0, 20, "q", "a", True, "small"))
    asked = plan()
    choose(made, replace(asked, sources=(replace(asked.sources[0], per_group=2),)))
    assert made.reason.count(PER_GROUP) == 8
    kept = [made.line[number] for number in made.alive() if made.line[number] != 20]
    assert sorted(Counter(kept).values()) == [2, 2]  # whole pairs


def test_caps_count_groups():
    rows = [(0, i, f"p{i // 3}", f"{i}", True) for i in range(30)]
    made = answers(*rows)
    splits = choose(made, plan(groups_per_source=4))
    assert len(splits["train"]) == 12 and made.reason.count(GROUPS) == 18
    assert len({made.group_name(number) for number in splits["train"]}) == 4


def test_categories_are_capped_by_their_groups():
    rows = [(0, i, f"p{i}", "a", True, f"g{i}", "law" if i < 7 else "art") for i in range(10)]
    made, asked = answers(*rows), plan()
    splits = choose(made, replace(asked, sources=(replace(asked.sources[0], per_category=4),)))
    assert Counter(made.category[n] for n in splits["train"]) == {"law": 4, "art": 3}
    assert made.reason.count(PER_CATEGORY) == 3


def test_the_sources_take_turns_until_the_rows_are_full():
    rows = [(s, i, f"{s}p{i}", "a", True) for s, many in enumerate((20, 5, 9)) for i in range(many)]
    made = answers(*rows)
    choose(made, plan(3, max_rows=9))
    assert Counter(made.source[number] for number in made.alive()) == {0: 3, 1: 3, 2: 3}
    assert made.reason.count(MAX_ROWS) == 25
    made = answers(*rows)
    choose(made, plan(3, until="first"))
    assert Counter(made.source[number] for number in made.alive()) == {0: 5, 1: 5, 2: 5}
    assert made.reason.count(RAN_OUT) == 19
    made = answers(*rows)
    choose(made, plan(3, max_rows=25))  # 5 turns of three, 4 of two, 2 of one
    assert Counter(made.source[number] for number in made.alive()) == {0: 11, 1: 5, 2: 9}


def test_a_group_is_taken_whole_or_not_at_all():
    made = answers(*[(0, i, f"p{i // 4}", f"{i}", True) for i in range(12)])
    choose(made, plan(max_rows=7))
    assert len(made.alive()) == 4


def test_an_exact_split_of_14_categories_of_142():
    rows = [(0, i, f"p{i}", "a", True, f"g{i}", f"field {i % 14}") for i in range(14 * 142)]
    made = answers(*rows)
    splits = choose(made, plan(validation=0.2, test=0.2, exact_split=True))
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1192,
        "validation": 398,
        "test": 398,
    }
    for split, share in (("train", 85.1), ("validation", 28.4), ("test", 28.4)):
        sizes = Counter(made.category[number] for number in splits[split])
        # ranks are cut at one place of a list in which each field stands evenly: within one of the share
        assert len(sizes) == 14 and all(abs(size - share) <= 1.5 for size in sizes.values())


def test_the_threshold_split_keeps_its_groups_when_the_data_grow():
    rows = [(0, i, f"p{i}", "a", True) for i in range(200)]
    asked = plan(validation=0.2, test=0.1)

    def members(made):
        splits = choose(made, asked)
        return {name: {made.group_name(n) for n in split} for name, split in splits.items()}

    first, later = members(answers(*rows)), members(answers(*rows, (0, 900, "new", "a", True)))
    assert all(first[name] <= later[name] for name in first)
    # 200 draws with probability 0.2: standard deviation 5.7; five of them
    assert abs(len(first["validation"]) - 40) < 29


def test_an_empty_split_and_one_label_are_one_sentence():
    with pytest.raises(DataError, match="the validation split is empty: its share is 0.1 of 1 groups"):
        choose(answers((0, 1, "p", "a", True)), plan(validation=0.1, seed=0))
    with pytest.raises(DataError, match="all 2 rows of the train split are undesirable, but kto and apo_zero need"):
        choose(answers((0, 1, "p", "a", False), (0, 2, "q", "a", False)), plan(one_label=False))
    with pytest.raises(DataError, match="no rows are left to train on; they were: the same answer has both labels"):
        choose(answers((0, 1, "p", "a", False), (0, 2, "p", "a", True)), plan())
