"""Pairs across prompts, padding, and the same batch as TRL 1.16 in "rotate"."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data import PreferenceCollator, pair_mismatched

GROUPS = st.lists(st.integers(0, 6), max_size=24)


def feature(row: int, prompt: list[int], completion: list[int], group: int | None = None) -> dict:
    return {
        "prompt_ids": prompt,
        "completion_ids": completion,
        "label": row % 2 == 0,
        "group": row if group is None else group,
        "row": row,
    }


@given(GROUPS)
@settings(max_examples=300, deadline=None)
def test_partners_come_from_other_groups_and_each_completion_is_used_once(groups):
    partners = pair_mismatched(groups)
    assert len(partners) == len(groups)
    used = [partner for partner in partners if partner >= 0]
    assert len(used) == len(set(used))
    for row, partner in enumerate(partners):
        assert partner == -1 or groups[partner] != groups[row]


@given(GROUPS)
@settings(max_examples=300, deadline=None)
def test_as_many_rows_as_possible_have_a_partner(groups):
    # A group of m rows finds at most n - m completions outside itself: m - (n - m) of its rows must stay alone.
    largest = max(Counter(groups).values(), default=0)
    assert pair_mismatched(groups).count(-1) == max(0, 2 * largest - len(groups))


@given(st.lists(st.integers(), unique=True, min_size=2, max_size=12))
def test_distinct_prompts_give_the_rotation_by_one(groups):
    assert pair_mismatched(groups) == [(row - 1) % len(groups) for row in range(len(groups))]


@given(GROUPS, st.permutations(range(7)))
def test_only_equality_of_groups_matters(groups, names):
    assert pair_mismatched([names[group] for group in groups]) == pair_mismatched(groups)


def test_pairs_accept_a_tensor_and_nothing():
    assert pair_mismatched(torch.tensor([4, 4, 9, 9])) == pair_mismatched([4, 4, 9, 9]) == [2, 3, 0, 1]
    assert pair_mismatched([]) == []
    assert pair_mismatched([5]) == [-1]


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_the_window_pairs_do_not_depend_on_the_micro_batches(cut):
    rows = [feature(i, [10 + i], [20 + i] * (1 + i), group=i // 2) for i in range(4)]
    collator = PreferenceCollator(0, mismatch="window", max_length=8)
    micro_batches = [collator(rows[i : i + cut]) for i in range(0, 4, cut)]
    window = [row for batch in micro_batches for row in batch["features"]]
    groups = torch.cat([batch["group"] for batch in micro_batches])
    mismatched = collator.build_mismatched(window, pair_mismatched(groups))
    assert mismatched["kl_input_ids"].tolist() == [
        [10, 22, 22, 22, 0],
        [11, 23, 23, 23, 23],
        [12, 20, 0, 0, 0],
        [13, 21, 21, 0, 0],
    ]
    assert mismatched["kl_index"].tolist() == [0, 1, 2, 3]


def test_batch_equals_trl(trl_batch):
    rows, theirs = trl_batch
    ours = PreferenceCollator(0, mismatch="rotate", max_length=7)(rows)
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(ours[name].long(), theirs[name]), name
        assert torch.equal(ours[f"kl_{name}"].long(), theirs[f"KL_{name}"]), name
    assert torch.equal(ours["labels"], theirs["label"])


@pytest.fixture
def trl_batch():
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    shapes = [
        (2, 9),
        (3, 1),
        (6, 4),
        (1, 2),
    ]  # prompt and completion tokens; max_length 7 cuts some, matched or not
    rows = [feature(i, [10 * i + 1] * p, [10 * i + 2] * c) for i, (p, c) in enumerate(shapes)]
    rotated = [{**row, "KL_completion_ids": rows[i - 1]["completion_ids"]} for i, row in enumerate(rows)]
    return rows, DataCollatorForUnpairedPreference(pad_token_id=0, max_length=7)(rotated)


def test_a_row_alone_or_among_its_own_prompt_leaves_the_estimate():
    collator = PreferenceCollator(0, mismatch="rotate", max_length=None)
    alone = collator([feature(0, [5], [6, 7])])
    assert alone["kl_input_ids"].shape[0] == 0 and alone["kl_index"].tolist() == []
    twins = collator([feature(0, [5], [6], group=1), feature(1, [5], [7], group=1), feature(2, [8], [9])])
    assert twins["kl_index"].tolist() == [
        0,
        2,
    ]  # row 1 would get the other answer to its own prompt
    assert twins["kl_input_ids"].tolist() == [[5, 9], [8, 7]]


def test_the_prompt_is_never_cut_and_a_completion_without_room_leaves_the_estimate():
    rows = [feature(0, [1] * 4, [2]), feature(1, [3], [4] * 4)]
    collator = PreferenceCollator(0, mismatch="window", max_length=5)
    mismatched = collator.build_mismatched(rows, [1, 0])
    assert mismatched["kl_input_ids"].tolist() == [[1, 1, 1, 1, 4], [3, 2, 0, 0, 0]]
    assert mismatched["kl_completion_mask"].sum(1).tolist() == [1, 1]
    full = [
        feature(0, [1] * 5, [2]),
        rows[1],
    ]  # a prompt that fills max_length, as raw rows may have
    assert collator.build_mismatched(full, [1, 0])["kl_index"].tolist() == [1]


def test_a_matched_row_without_room_is_refused():
    with pytest.raises(ValueError, match="row 0 of the batch has no completion token within max_length 3"):
        PreferenceCollator(0, max_length=3)([feature(0, [1, 1, 1], [2])])


def test_reference_columns_labels_and_raw_rows_are_passed_on():
    rows = [{**feature(i, [1], [2]), "ref_logps": -1.5 * i} for i in range(3)]
    batch = PreferenceCollator(0, max_length=None)(rows)
    assert batch["ref_logps"].dtype == torch.float32 and batch["ref_logps"].tolist() == [
        0.0,
        -1.5,
        -3.0,
    ]
    assert batch["labels"].dtype == torch.bool and batch["labels"].tolist() == [True, False, True]
    assert batch["row"].tolist() == batch["group"].tolist() == [0, 1, 2]
    assert list(batch["features"]) == rows and len(batch["features"]) == 3
    assert "kl_input_ids" not in batch


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="mismatch is 'rotated'; expected one of none, rotate, window"):
        PreferenceCollator(0, mismatch="rotated", max_length=None)
    with pytest.raises(TypeError, match="pad_token_id is None"):
        PreferenceCollator(None, max_length=None)
