"""Pairs made from rows that were labelled one by one: same prompt, both labels, in any order."""

import random

import pytest

from prefopt.data import DataError, load_rows
from prefopt.data.pairs import tokenize_pairs
from support.tiny_models import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def row(prompt, completion, label, group=None):
    made = {"prompt": prompt, "completion": completion, "label": label}
    return made if group is None else made | {"group": group}


ROWS = [
    row("A?", " good one", True, "g"),
    row("A?", " good two", True, "g"),
    row("A?", " bad one", False, "g"),
    row("B?", " good", True, "g"),  # of the same group, but another prompt
    row("C?", " bad", False),
    row("D?", " good", True),
    row("D?", " bad", False),
    row("D?", " worse", False),
    row("E?", " both", True),  # one answer with both labels says nothing
    row("E?", " both", False),
]


def texts(pairs, tokenizer):
    """{(prompt, better, worse)}"""
    return {
        tuple(
            tokenizer.decode(pair[name], skip_special_tokens=True)
            for name in ("chosen_prompt_ids", "chosen_completion_ids", "rejected_completion_ids")
        )
        for pair in pairs.dataset
    }


def test_rows_of_one_prompt_are_paired_each_once_and_the_rest_is_counted(tokenizer, caplog):
    pairs = tokenize_pairs(load_rows(ROWS), tokenizer, max_length=None)
    found = texts(pairs, tokenizer)
    assert {prompt for prompt, _, _ in found} == {"A?", "D?"} and len(found) == 2
    assert all("good" in better and "good" not in worse for _, better, worse in found)
    assert pairs.counts["pairs"] == pairs.counts["paired_by_prompt"] == 2
    assert pairs.counts["without_pair"] == len(ROWS) - 4
    assert "2 pairs were made of unpaired answers to the same prompt" in caplog.text
    assert "6 rows are not half of a pair and are left out" in caplog.text
    for pair in pairs.dataset:
        assert pair["chosen_prompt_ids"] == pair["rejected_prompt_ids"]


def test_the_pairs_do_not_depend_on_the_order_of_the_rows(tokenizer):
    expected = texts(tokenize_pairs(load_rows(ROWS), tokenizer, max_length=None), tokenizer)
    rng = random.Random(0)
    for _ in range(5):
        shuffled = rng.sample(ROWS, len(ROWS))
        pairs = tokenize_pairs(load_rows(shuffled), tokenizer, max_length=None)
        assert texts(pairs, tokenizer) == expected


def test_pairs_of_the_data_stay_pairs_and_come_first(tokenizer):
    pair = {"prompt": "D?", "chosen": " better", "rejected": " not so good"}
    pairs = tokenize_pairs(load_rows([*ROWS, pair]), tokenizer, max_length=None)
    assert ("D?", " better", " not so good") in texts(pairs, tokenizer)
    assert (pairs.counts["pairs"], pairs.counts["paired_by_prompt"]) == (3, 2)
    first = tokenizer.decode(pairs.dataset[0]["chosen_completion_ids"], skip_special_tokens=True)
    assert first == " better" and pairs.dataset["row"][:] == [0, 1, 2]


def test_no_prompt_with_both_labels_is_no_data_for_a_method_of_pairs(tokenizer):
    rows = [row("A?", " good", True), row("B?", " bad", False), *ROWS[-2:]]
    with pytest.raises(DataError, match="no pairs to train on; .* to the same prompt; found 4 unpaired"):
        tokenize_pairs(load_rows(rows), tokenizer, max_length=None)
