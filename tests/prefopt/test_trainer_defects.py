"""One test for each defect of TRL 1.16's KTOTrainer that ours must not have; the numbers are those of the design.

Here: 1 (order of the rows), 2 and 3 (small micro-batches), 4 (mismatched pairs), 6 (weights of the metrics). 7 (cache
of the reference), 9 (waiting for the device), 12 (logits in fp32) and 14 (policy and reference in one mode):
test_trainer_defects_reference.py. Defects 5 and 9 (collectives) need two processes: test_trainer_two_ranks.py; 8:
test_trainer_resume.py; 10: test_trainer_config.py; 15: test_trainer_diagnostics.py.
"""

import copy
import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL's trainers ping a server when they are built, unless this is set

import pytest
import torch
from peft import LoraConfig
from trl import KTOConfig, KTOTrainer

from support.tiny_models import ROWS, make_rows
from support.trainer import (
    COMMON,
    gradients_of_first_step,
    make_trainer,
    make_world,
    steps_of,
    train,
)

EPS = torch.finfo(torch.float32).eps
# The same sums in another order: a gradient is a sum over about a hundred tokens, in two layers of them.
FP32_ROUNDING = 100 * EPS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def drifted(world):
    """Policy and reference the other way round: the first rows then have a reference point above 0."""
    return world._replace(model=world.ref, ref=world.model)


def pairs(count: int) -> list[dict]:
    """Paired data: both answers to each prompt, one row after the other once they are unpaired."""
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": completion}],
            "rejected": [{"role": "assistant", "content": "Bananas, I suppose."}],
        }
        for prompt, completion, _ in ROWS[:count]
    ]


def watch_rows(trainer) -> list[tuple[list[int], list[bool]]]:
    """Row numbers and labels of every micro-batch, in the order of training."""
    seen, compute_loss = [], trainer.compute_loss

    def keep(model, inputs, *args, **kwargs):
        if model.training:
            seen.append((inputs["row"].tolist(), inputs["labels"].tolist()))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = keep
    return seen


def watch_pairs(trainer) -> list[list[tuple[int, int]]]:
    """(row, partner's row, both as dictionaries) of every mismatched sequence that is scored."""
    seen, build, pair = [], trainer.mismatched.answers, trainer.mismatched.pair

    def keep(rows):
        found, partners = build(rows), pair([row["group"] for row in rows])
        assert all(one.answer.completion == rows[partners[one.row]]["completion_ids"] for one in found)
        seen.append([(rows[one.row], rows[partners[one.row]]) for one in found])
        return found

    trainer.mismatched.answers = keep
    return seen


# ---- 1 ----


def test_defect_01_paired_rows_come_shuffled_and_balanced(world, tmp_path):
    options = {"per_device_train_batch_size": 4, "max_steps": 8, "data": pairs(8)}
    runs = []
    for seed in (7, 7, 8):
        trainer = make_trainer(world, tmp_path, seed=seed, method="apo_zero", learning_rate=0.0, **options)
        seen = watch_rows(trainer)
        train(trainer)
        runs.append(seen)
    first, again, other = runs
    assert first == again and first != other
    epochs = [[row for rows, _ in epoch for row in rows] for epoch in (first[:4], first[4:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(16))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(16))
    assert [sum(labels) for _, labels in first] == [2] * 8


def test_defect_01_trl_gives_single_class_batches(world, tmp_path):
    """What ours is compared with: the same pairs, in TRL, are a block of one label and a block of the other."""
    from datasets import Dataset

    config = KTOConfig(output_dir=str(tmp_path), bf16=False, per_device_train_batch_size=4, **COMMON)
    theirs = KTOTrainer(
        model=copy.deepcopy(world.model),
        ref_model=copy.deepcopy(world.ref),
        args=config,
        train_dataset=Dataset.from_list(pairs(16)),
        processing_class=world.tokenizer,
    )
    classes = [set(batch["label"].tolist()) for batch in theirs.get_train_dataloader()]
    assert all(len(labels) == 1 for labels in classes)


# ---- 2, 3 ----


@pytest.mark.parametrize("sampler", ["sequential", "label_balanced"])
@pytest.mark.parametrize("adapter", [False, True])
def test_defect_02_accumulation_does_not_change_the_gradient(drifted, tmp_path, sampler, adapter):
    def gradients(batch: int, accumulation: int, estimator: str):
        trainer = make_trainer(
            drifted,
            tmp_path,
            ref=not adapter,
            peft_config=LoraConfig(target_modules=["q_proj"], init_lora_weights=False) if adapter else None,
            max_steps=1,
            sampler=sampler,
            kl_estimator=estimator,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        found = gradients_of_first_step(trainer)
        return torch.cat([g.flatten() for g in found.values()]), steps_of(trainer)[0]

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    whole, log = gradients(4, 1, "window")
    for batch, accumulation in ((2, 2), (1, 4)):
        split, split_log = gradients(batch, accumulation, "window")
        assert distance(split, whole) < FP32_ROUNDING
        for key, value in log.items():
            # logged quotients: the same sums, of values up to 200 nats in fp32
            assert split_log[key] == pytest.approx(value, rel=FP32_ROUNDING, abs=200 * EPS), key
    if sampler == "sequential" and not adapter:
        # The rows at hand tell the two estimates apart.
        assert log["kl"] > 0
        assert distance(gradients(2, 2, "microbatch")[0], whole) > 1000 * FP32_ROUNDING


def plain_logps(model, prompt: list[int], completion: list[int]) -> float:
    """Sum of the completion's log-probabilities from the model's own logits, in fp64."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return logp[torch.arange(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum().item()


def test_defect_03_batch_size_one_takes_its_pairs_from_the_window(drifted, tmp_path):
    trainer = make_trainer(
        drifted,
        tmp_path,
        max_steps=1,
        sampler="sequential",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=0.0,
    )
    rows = [trainer.train_dataset[i] for i in range(4)]
    (log,) = train(trainer)
    policy, reference = drifted.model.eval(), drifted.ref.eval()
    ratios = [
        plain_logps(policy, rows[i]["prompt_ids"], rows[i - 1]["completion_ids"])
        - plain_logps(reference, rows[i]["prompt_ids"], rows[i - 1]["completion_ids"])
        for i in range(4)
    ]
    z0 = sum(ratios) / 4
    assert z0 > 0.01 and log["rows_without_partner"] == 0
    # eight sums of log-probabilities of some 200 nats each, in fp32
    assert log["kl"] == pytest.approx(z0, abs=8 * 200 * EPS)
    losses = []
    for row in rows:
        ratio = plain_logps(policy, row["prompt_ids"], row["completion_ids"]) - plain_logps(
            reference, row["prompt_ids"], row["completion_ids"]
        )
        sign = 1.0 if row["label"] else -1.0
        losses.append(1 - torch.sigmoid(torch.tensor(0.1 * sign * (ratio - z0))).item())
    assert log["loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)  # the contract on the loss


def test_defect_03_every_row_weighs_the_same_in_an_uneven_last_window(world, tmp_path):
    """7 rows, batch 2, accumulation 2: the second window has micro-batches of two rows and of one."""
    options = {"data": make_rows(True)[:7], "sampler": "sequential", "learning_rate": 0.0}
    split = make_trainer(
        world,
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        method="apo_zero",
        **options,
    )
    logs = train(split)
    single = make_trainer(
        world,
        tmp_path,
        max_steps=7,
        per_device_train_batch_size=1,
        method="apo_zero",
        **options,
    )
    losses = [entry["loss"] for entry in train(single)]
    expected = [sum(losses[:4]) / 4, sum(losses[4:]) / 3, sum(losses[:4]) / 4]
    by_microbatch = (sum(losses[4:6]) / 2 + losses[6]) / 2  # TRL's
    assert abs(by_microbatch - expected[1]) > 10 * FP32_ROUNDING
    assert [entry["loss"] for entry in logs] == pytest.approx(expected, rel=FP32_ROUNDING)


# ---- 4 ----


def test_defect_04_a_pair_never_joins_two_answers_to_one_prompt(world, tmp_path):
    trainer = make_trainer(
        world,
        tmp_path,
        data=pairs(8),
        eval_dataset=pairs(7),  # 14 rows in batches of 3: a tail of two
        sampler="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=3,
        max_steps=4,
    )
    seen = watch_pairs(trainer)
    logs = train(trainer)
    metrics = trainer.evaluate()
    assert sum(len(piece) for piece in seen) > 16
    for piece in seen:
        assert all(row["group"] != partner["group"] for row, partner in piece)
    assert [entry["rows_without_partner"] for entry in logs] == [0] * 4
    # Batches [a a b] [b c c] [d d e] [e f f] hold one row each that no other prompt is left for; [g g] two.
    assert metrics["eval_rows_without_partner"] == 6


def test_defect_04_rows_without_a_partner_are_counted_and_leave_the_estimate(world, tmp_path):
    row = make_rows(True)[0]
    rows = [row | {"label": label} for label in (True, False, True, False)]
    options = {
        "data": rows,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    with pytest.warns(UserWarning, match="no row of another prompt"):
        trainer = make_trainer(world, tmp_path, **options)
        trainer.train()
    (log,) = steps_of(trainer)
    assert log["kl"] == 0.0 and log["rows_without_partner"] == 4
    (apo,) = train(make_trainer(world, tmp_path, method="apo_zero", **options))
    assert log["loss"] == pytest.approx(apo["loss"], rel=FP32_ROUNDING)


# ---- 6 ----


def test_defect_06_metrics_are_weighted_by_rows_and_tokens(world, tmp_path):
    """Two steps of two micro-batches per log, with 1 to 3 desirable rows each, against one batch of all the rows."""
    options = {"sampler": "sequential", "learning_rate": 0.0, "method": "apo_zero"}
    split = make_trainer(
        world,
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=2,
        **options,
    )
    seen = watch_rows(split)
    (log,) = train(split)
    assert len({sum(labels) for _, labels in seen}) > 1
    whole = make_trainer(world, tmp_path, per_device_train_batch_size=16, max_steps=1, **options)
    (expected,) = train(whole)
    for key in expected:
        if key.split("/")[0] in ("rewards", "logps", "logits", "entropy", "num_tokens"):
            assert log[key] == pytest.approx(expected[key], rel=FP32_ROUNDING, abs=200 * EPS), key
    # The mean of the micro-batches' means is another number, far beyond rounding.
    means = []
    for rows, labels in seen:
        subset = [make_rows(True)[r] for r, label in zip(rows, labels, strict=True) if label]
        one = make_trainer(world, tmp_path, data=subset, per_device_train_batch_size=4, max_steps=1, **options)
        means.append(train(one)[0]["logps/chosen"])
    assert abs(sum(means) / len(means) - log["logps/chosen"]) > 0.1
