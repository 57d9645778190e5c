"""kl_estimator "exact": the reference point from both models' distributions at the step's own tokens."""

import copy

import pytest
import torch
from peft import LoraConfig

from support.tiny_models import make_rows
from support.trainer import gradients_of_first_step, make_trainer, make_world, steps_of, train

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("llama", tmp_path_factory.mktemp("world"), noise=0.1)


def plain_kl(policy, reference, row: dict) -> float:
    """The KL at each completion token from all logits, summed, in fp64."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (policy, reference))
    return (p.exp() * (p - q)).sum(-1)[len(row["prompt_ids"]) - 1 : -1].sum().item()


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
def test_the_point_is_the_mean_of_the_rows_kl(world, tmp_path, batch, accumulation):
    trainer = make_trainer(
        world,
        tmp_path,
        kl_estimator="exact",
        sampler="sequential",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=0.0,
    )
    rows = [trainer.train_dataset[i] for i in range(4)]
    policy, reference = copy.deepcopy(world.model).eval(), copy.deepcopy(world.ref).eval()
    expected = sum(plain_kl(policy, reference, row) for row in rows) / 4
    (log,) = train(trainer)
    assert expected > 1.0 and log["rows_without_partner"] == 0
    assert log["kl"] == pytest.approx(expected, rel=1e-5)
    whole = make_trainer(world, tmp_path, kl_estimator="exact", data=make_rows(True)[:4], per_device_eval_batch_size=4)
    assert whole.evaluate(make_rows(True)[:4])["eval_kl"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["kto", "enhanced_kto"])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_gradient_does_not_depend_on_the_cut(world, tmp_path, method, adapter):
    def gradients(batch: int, accumulation: int):
        trainer = make_trainer(
            world,
            tmp_path,
            ref=not adapter,
            peft_config=LoraConfig(target_modules=["q_proj"], init_lora_weights=False) if adapter else None,
            method=method,
            kl_estimator="exact",
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        found = gradients_of_first_step(trainer)
        return torch.cat([gradient.flatten() for gradient in found.values()]), steps_of(trainer)[0]

    whole, log = gradients(8, 1)
    assert log["kl"] > 0.01
    for batch, accumulation in ((4, 2), (1, 8)):
        found, split = gradients(batch, accumulation)
        assert (found - whole).norm() <= 2e-5 * whole.norm()
        assert split["kl"] == pytest.approx(log["kl"], rel=1e-5)


def test_equal_weights_have_a_point_of_exactly_zero(world, tmp_path):
    trainer = make_trainer(
        world, tmp_path, ref=False, kl_estimator="exact", per_device_train_batch_size=4, max_steps=1, learning_rate=0.0
    )
    (log,) = train(trainer)
    assert log["kl"] == log["rewards/chosen"] == log["rewards/rejected"] == 0.0 and log["loss"] == 0.5


def test_no_pass_over_mismatched_completions(world, tmp_path):
    passes = {}
    for estimator in ("window", "exact"):
        trainer = make_trainer(
            world, tmp_path, kl_estimator=estimator, per_device_train_batch_size=4, max_steps=1, eval_strategy="no"
        )
        counts, handles = [0], []
        for model in (trainer.model, trainer.reference.model):
            handles.append(
                model.register_forward_pre_hook(lambda *_, counts=counts: counts.__setitem__(0, counts[0] + 1))
            )
        train(trainer)
        passes[estimator] = counts[0]
    assert passes == {"window": 4, "exact": 2}


def test_it_is_refused_with_precomputed_scores(world, tmp_path):
    with pytest.raises(ValueError, match="precompute_ref_logps with kl_estimator 'exact'"):
        make_trainer(world, tmp_path, kl_estimator="exact", precompute_ref_logps=True)
