"""What a step's baselines come from: kl_rows, window_values, and the exact KL that is logged beside them."""

import copy

import pytest
import torch
from peft import LoraConfig

from support.trainer import data_for, gradients_of_first_step, make_trainer, make_world, steps_of, train

STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "sampler": "sequential"}
ADAPTER = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("llama", tmp_path_factory.mktemp("world"), noise=0.1)


def kl_of(policy, reference, prompt_ids, completion_ids) -> float:
    """The KL at each completion token from all logits, summed, in fp64."""
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (policy, reference))
    return (p.exp() * (p - q)).sum(-1)[len(prompt_ids) - 1 : -1].sum().item()


# ---- the KL that is logged


@pytest.mark.parametrize(
    ("method", "adapter"), [("kto", False), ("kto", True), ("enhanced_kto", False), ("bco", False), ("dpo", True)]
)
def test_the_exact_kl_per_token_is_logged(world, tmp_path, method, adapter):
    trainer = make_trainer(
        world,
        tmp_path,
        ref=not adapter,
        peft_config=ADAPTER if adapter else None,
        data=data_for(method, 8),
        method=method,
        learning_rate=0.0,
        max_steps=1,
        eval_dataset=data_for(method, 8),
        **STEP,
    )
    sides = ("chosen_", "rejected_") if method == "dpo" else ("",)
    answers = [
        (row[f"{side}prompt_ids"], row[f"{side}completion_ids"]) for row in trainer.train_dataset for side in sides
    ]
    policy = copy.deepcopy(trainer.model).eval()
    reference = copy.deepcopy(world.model if adapter else world.ref).eval()
    kl = sum(kl_of(policy, reference, *answer) for answer in answers)
    expected = kl / sum(len(completion) for _, completion in answers)
    (log,) = train(trainer)
    assert expected > 1e-4
    assert log["kl_per_token"] == pytest.approx(expected, rel=2e-5)
    assert trainer.evaluate()["eval_kl_per_token"] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("options", [{"precompute_ref_logps": True}, {"method": "cpo"}])
def test_no_kl_without_both_distributions(world, tmp_path, options):
    options = {
        "reference_cache_dir": str(tmp_path / "cache"),
        "data": data_for(options.get("method", "kto"), 8),
    } | options
    (log,) = train(make_trainer(world, tmp_path, max_steps=1, **options, **STEP))
    assert "kl_per_token" not in log


def test_models_in_different_dtypes_are_scored_one_after_the_other(world, tmp_path):
    reference = copy.deepcopy(world.ref).bfloat16()
    (log,) = train(make_trainer(world, tmp_path, ref=reference, max_steps=1, **STEP))
    assert "kl_per_token" not in log and log["kl"] > 0
    with pytest.raises(ValueError, match="the policy is in torch.float32 and the reference model in torch.bfloat16"):
        make_trainer(world, tmp_path, ref=copy.deepcopy(reference), kl_estimator="exact")


# ---- kl_rows


def test_kl_rows_takes_part_of_the_rows_and_logs_their_error(world, tmp_path):
    def logs_of(rows, seed=7):
        trainer = make_trainer(world, tmp_path, kl_rows=rows, learning_rate=0.0, max_steps=4, seed=seed, **STEP)
        found = []
        estimate = trainer.mismatched.estimator.estimate

        def keep(ratios, **options):
            found.append(ratios)
            return estimate(ratios, **options)

        trainer.mismatched.estimator.estimate = keep
        return train(trainer), found

    logs, ratios = logs_of(3)
    every, all_ratios = logs_of("all")
    for log, some, whole, full in zip(logs, ratios, all_ratios, every, strict=True):
        assert len(some) == 3 and len(whole) >= 4
        # the scores are those of the whole window, up to the rounding of another layout
        assert all((whole - one).abs().min() <= 1e-5 * one.abs() for one in some)
        assert log["kl"] == pytest.approx(some.mean().clamp(min=0).item(), rel=1e-6)
        assert log["kl_standard_error"] == pytest.approx((some.var() / 3).sqrt().item(), rel=1e-5)
        assert full["kl_standard_error"] == pytest.approx((whole.var() / len(whole)).sqrt().item(), rel=1e-5)
        assert log["rows_without_partner"] == full["rows_without_partner"]
        assert log["logps/chosen"] == full["logps/chosen"]
    assert [log["kl"] for log in logs] == [log["kl"] for log in logs_of(3)[0]]
    assert [log["kl"] for log in logs] != [log["kl"] for log in logs_of(3, seed=8)[0]]
    assert [log["kl"] for log in logs_of(1000)[0]] == [log["kl"] for log in every]


def test_kl_rows_runs_fewer_passes(world, tmp_path):
    counts = {}
    for rows in ("all", 2):
        trainer = make_trainer(world, tmp_path, kl_rows=rows, max_steps=1, **STEP | {"sampler": "random"})
        counts[rows] = count_passes(trainer)
    # 4 passes of policy and reference with gradient; as many over mismatched completions, or 1
    assert counts == {"all": 16, 2: 10}


def test_kl_rows_is_refused_where_it_has_no_use(world, tmp_path):
    for options in ({"kl_estimator": "exact"}, {"kl_estimator": "microbatch"}, {"method": "bco"}):
        with pytest.raises(ValueError, match="kl_rows is 4; method .* has no use for it here"):
            make_trainer(world, tmp_path, kl_rows=4, **options)
    with pytest.raises(ValueError, match="kl_rows is 0; expected"):
        make_trainer(world, tmp_path, kl_rows=0)


# ---- window_values

WINDOWED = [
    {"method": "bco"},
    {"method": "enhanced_kto", "shift": "window", "shift_start": 0.0, "shift_ramp": 0.0},
    {"method": "kto", "kl_estimator": "exact"},
]
ids = pytest.mark.parametrize("options", WINDOWED, ids=lambda options: options["method"])


def count_passes(trainer) -> int:
    """Forward passes of policy and reference in one step."""
    counts, models = [0], {id(trainer.model): trainer.model, id(trainer.reference.model): trainer.reference.model}
    for model in models.values():
        model.register_forward_pre_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    train(trainer)
    return counts[0]


@ids
def test_previous_runs_no_pass_ahead(world, tmp_path, options):
    counts = {}
    for values in ("exact", "previous"):
        trainer = make_trainer(world, tmp_path, window_values=values, max_steps=3, **options, **STEP)
        counts[values] = count_passes(trainer)
    # 20 rows: 4, 4 and 2 micro-batches. The policy's pass ahead of each, but in the first step.
    assert counts["exact"] - counts["previous"] == 4 + 2


@ids
def test_previous_takes_the_values_of_the_step_before(world, tmp_path, options):
    def run(values):
        trainer = make_trainer(
            world, tmp_path, window_values=values, max_steps=3, learning_rate=1e-2, **options, **STEP
        )
        made = []
        losses = trainer.objective.losses

        def keep(rows, baselines):
            if trainer.model.training:
                made.append(baselines)
            return losses(rows, baselines)

        trainer.objective.losses = keep
        train(trainer)
        return made

    def numbers(baselines):
        values = [baselines.shift, baselines.decision_mean]
        values += [torch.as_tensor(baselines.reference_point)] if options.get("kl_estimator") == "exact" else []
        return torch.stack([value for value in values if value is not None])

    exact, previous = run("exact"), run("previous")
    first, second = numbers(exact[0]), numbers(exact[4])
    assert not torch.allclose(first, second)
    for baselines in previous[:4]:  # there is none before the first step
        torch.testing.assert_close(numbers(baselines), first, rtol=1e-6, atol=0)
    for baselines in previous[4:8]:
        torch.testing.assert_close(numbers(baselines), first, rtol=1e-6, atol=0)
    assert not torch.allclose(numbers(previous[8]), first)


@ids
def test_the_first_step_and_a_single_micro_batch_are_exact(world, tmp_path, options):
    for step in (STEP, STEP | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}):
        gradients = []
        for values in ("exact", "previous"):
            trainer = make_trainer(world, tmp_path, window_values=values, max_steps=1, **options, **step)
            found = gradients_of_first_step(trainer)
            gradients.append(torch.cat([one.flatten() for one in found.values()]))
            assert len(steps_of(trainer)) == 1
        assert torch.equal(*gradients) and gradients[0].norm() > 0


def test_window_values_is_refused_where_there_are_none(world, tmp_path):
    with pytest.raises(ValueError, match="window_values is 'previous'; method 'kto' has no use for it here"):
        make_trainer(world, tmp_path, window_values="previous")
