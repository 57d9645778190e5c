"""Rows for the methods: pairs stay together, sft takes answers alone, references beforehand, evaluation."""

import json

import pytest
import torch

from prefopt.data import DataError, load_rows, tokenize_rows
from prefopt.data.pairs import tokenize_pairs
from support.tiny_models import make_rows
from support.trainer import data_for, make_pairs, make_trainer, make_world, train

EPS = torch.finfo(torch.float32).eps
FP32_ROUNDING = 100 * EPS  # the same sums in another order, of about a hundred tokens
NATS = 200 * EPS  # of a completion's log-probability here


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("qwen3"))


def of(method: str) -> dict:
    """Options and rows of a method."""
    return {"method": method, "data": data_for(method, 20), "sampler": "sequential"}


@pytest.mark.parametrize("share", ["auto", "off"])
def test_both_members_of_a_pair_are_in_one_pass(world, tmp_path, share):
    trainer = make_trainer(
        world,
        tmp_path,
        method="dpo",
        share_prompts=share,
        data=make_pairs(9),
        per_device_train_batch_size=2,
        max_steps=5,
    )
    passes, forward = [], trainer.model.forward

    def keep(input_ids=None, **kwargs):
        passes.append(input_ids)
        return forward(input_ids=input_ids, **kwargs)

    trainer.model.forward = keep
    shared = share == "auto"
    seen, compute_loss = [], trainer.compute_loss

    def watch(model, inputs, *args, **kwargs):
        seen.append((inputs["row"].tolist(), inputs["labels"].tolist()))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watch
    train(trainer)
    assert sorted(row for rows, _ in seen for row in rows) == list(range(9))
    assert [len(rows) for rows, _ in seen] == [2, 2, 2, 2, 1] and seen[0][0] != [0, 1]
    for ids, (rows, labels) in zip(passes, seen, strict=True):
        assert labels == [True] * len(rows) + [False] * len(rows)
        assert len(ids) == (len(rows) if shared else 2 * len(rows))
        for place, row in enumerate(rows):
            for half, side in enumerate(("chosen", "rejected")):
                pair = trainer.train_dataset[row]
                prompt, answer = pair[f"{side}_prompt_ids"], pair[f"{side}_completion_ids"]
                found = ids[place if shared else half * len(rows) + place].tolist()
                start = len(prompt) + (half * len(pair["chosen_completion_ids"]) if shared else 0)
                assert found[: len(prompt)] == prompt and found[start : start + len(answer)] == answer


def test_rows_that_are_not_half_of_a_pair_are_left_out_and_counted(world, tmp_path):
    twin = {
        "prompt": "Why?",
        "chosen": "Because.",
        "rejected": "No.",
    }  # same prompt as the unpaired rows
    text_pairs = make_pairs(3, chat=False)
    rated = {"prompt": "Why?", "completion": "Because.", "label": True}
    rows = [text_pairs[0], rated, rated | {"label": False}, *text_pairs[1:], twin]
    loaded = load_rows(rows)
    pairs = tokenize_pairs(loaded, world.tokenizer, max_length=96)
    whole = tokenize_rows(loaded, world.tokenizer, max_length=96).dataset
    assert pairs.counts["rows"] == pairs.counts["pairs"] == 4 and pairs.counts["without_pair"] == 2
    for pair, (chosen, rejected) in zip(pairs.dataset, ((0, 1), (4, 5), (6, 7), (8, 9)), strict=True):
        for side, row in (("chosen", whole[chosen]), ("rejected", whole[rejected])):
            assert pair[f"{side}_prompt_ids"] == row["prompt_ids"]
            assert pair[f"{side}_completion_ids"] == row["completion_ids"]
        assert pair["group"] == whole[chosen]["group"]
    assert pairs.dataset["row"][:] == [0, 1, 2, 3]
    assert pairs.counts["completion_tokens"] == sum(
        len(whole[row]["completion_ids"]) for row in (0, 1, 4, 5, 6, 7, 8, 9)
    )
    assert pairs.fingerprint != tokenize_rows(loaded, world.tokenizer, max_length=96).fingerprint
    with pytest.raises(DataError, match="no pairs to train on; .* found 2 unpaired"):
        tokenize_pairs(load_rows([rated, rated]), world.tokenizer, max_length=96)


def test_sft_takes_desirable_answers_alone_and_says_so(world, tmp_path, caplog):
    rows = [*make_rows(True), *make_pairs(4)]
    trainer = make_trainer(world, tmp_path, method="sft", data=rows)
    assert "13 undesirable rows are left out" in caplog.text
    assert set(trainer.train_dataset["label"][:]) == {True}
    counts = trainer.run_folder.record["data"]["train"]
    assert counts["rows"] == 15 and counts["undesirable_left_out"] == 13
    bad = [row | {"label": False} for row in make_rows(True)]
    with pytest.raises(DataError, match="train_dataset has no desirable rows"):
        make_trainer(world, tmp_path, method="sft", data=bad)


def test_rows_tokenised_for_another_kind_of_method_are_refused(world, tmp_path):
    loaded = load_rows(make_pairs(4))
    rows = tokenize_rows(loaded, world.tokenizer, max_length=96)
    pairs = tokenize_pairs(loaded, world.tokenizer, max_length=96)
    with pytest.raises(ValueError, match="'dpo', which learns from pairs; .* tokenize_pairs"):
        make_trainer(world, tmp_path, method="dpo", data=rows)
    with pytest.raises(ValueError, match="'kto', which learns from unpaired rows; .* tokenize_rows"):
        make_trainer(world, tmp_path, data=pairs)
    assert len(make_trainer(world, tmp_path, method="dpo", data=pairs).train_dataset) == 4


@pytest.mark.parametrize("method", ["dpo", "bco"])
def test_precomputed_scores_are_those_of_the_reference(world, tmp_path, method):
    options = of(method) | {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eval_dataset": data_for(method, 5),
    }
    live = make_trainer(world, tmp_path, **options)
    stored = make_trainer(
        world,
        tmp_path,
        precompute_ref_logps=True,
        precompute_batch_size=3,
        reference_cache_dir=str(tmp_path / "cache"),
        **options,
    )
    assert stored.reference is None
    for mine, other in zip(train(stored), train(live), strict=True):
        for key, value in other.items():
            if key in ("kl_per_token", "eval_kl_per_token"):  # needs both distributions
                continue
            assert mine[key] == pytest.approx(value, abs=1e-4, rel=0), key
    mine, other = stored.evaluate(), live.evaluate()
    for key in ("eval_loss", "eval_rewards/margins"):
        assert mine[key] == pytest.approx(other[key], abs=1e-4, rel=0), key


# ---- evaluation ----


@pytest.mark.parametrize("name", ["cpo", "sft", "dpo", "simpo"])
def test_evaluation_weighs_every_row_or_token_the_same(world, tmp_path, name):
    """The same whatever the batches, and for a model that stands still what a step of all rows logs."""
    options = of(name) | {"learning_rate": 0.0, "max_steps": 1}
    rows = options["data"]
    split = make_trainer(world, tmp_path, eval_dataset=rows, per_device_eval_batch_size=3, **options)
    count = len(split.train_dataset)
    whole = make_trainer(
        world, tmp_path, eval_dataset=rows, per_device_eval_batch_size=count,
        per_device_train_batch_size=count, **options,
    )  # fmt: skip
    (log,) = train(whole)
    for metrics in (split.evaluate(), whole.evaluate()):
        for key in ("loss", "logps/chosen", "entropy"):
            value = metrics[f"eval_{key}"]
            assert value == pytest.approx(log[key], rel=FP32_ROUNDING, abs=NATS), key


@pytest.mark.parametrize("shift", ["window", "ema", "cumulative"])
def test_evaluation_moves_no_shift(world, tmp_path, shift):
    def run(**options):
        trainer = make_trainer(
            world,
            tmp_path,
            method="bco",
            shift=shift,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=2,
            max_steps=4,
            **options,
        )
        return train(trainer), trainer.baselines.state_dict()

    quiet = run()
    rows = [row for row in make_rows(True) if row["label"]]
    assert run(eval_dataset=rows, eval_strategy="steps", eval_steps=1) == quiet
    assert quiet[1]["shift"]["value"] != 0.0


def test_evaluate_takes_a_path(world, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(True)), encoding="utf-8")
    trainer = make_trainer(world, tmp_path / "run")
    expected = trainer.evaluate(make_rows(True))["eval_loss"]
    assert trainer.evaluate(str(path))["eval_loss"] == expected
    assert trainer.evaluate({"a": str(path)})["eval_a_loss"] == expected


@pytest.mark.parametrize("method", ["kto", "dpo", "cpo", "sft"])
def test_predict_gives_the_values_of_each_row(world, tmp_path, method):
    """Raw rows, in batches of 3: their means are the metrics, which are those of evaluate."""
    options = of(method)
    rows = options["data"][:7]
    trainer = make_trainer(world, tmp_path, per_device_eval_batch_size=3, **options)
    found = trainer.predict(rows)
    metrics = trainer.evaluate(rows)
    names = {
        "kto": ["logps", "ref_logps", "rewards"],
        "cpo": ["logps", "rewards"],
        "sft": ["logps"],
    }
    assert list(found.predictions) == names.get(method, names["kto"])
    count = len(rows) if method != "sft" else sum(row["label"] for row in rows)
    pairs = method in ("dpo", "cpo")
    assert found.label_ids.shape == ((count, 2) if pairs else (count,))
    for name, values in found.predictions.items():
        assert values.shape == found.label_ids.shape
        if name == "ref_logps":
            continue
        for label, side in ((True, "chosen"), (False, "rejected")):
            if (found.label_ids == label).any():
                mean = values[found.label_ids == label].mean()
                assert metrics[f"eval_{name}/{side}"] == pytest.approx(mean, abs=NATS), name
    for name, value in metrics.items():
        if not name.endswith(("runtime", "per_second", "preparation_time", "epoch")):
            assert found.metrics[name.replace("eval_", "test_")] == value, name
    if method == "kto":
        expected = 0.1 * (found.predictions["logps"] - found.predictions["ref_logps"])
        assert found.predictions["rewards"] == pytest.approx(expected, abs=NATS)
