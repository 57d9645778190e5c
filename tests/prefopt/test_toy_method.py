"""A method is added with a row of METHODS and its options, as CONTRIBUTING.md shows, and no other file changes."""

from dataclasses import dataclass

import pytest
import torch

from prefopt.errors import UserError
from prefopt.options import option
from prefopt.train import PreferenceConfig, PreferenceTrainer
from prefopt.train.methods import METHODS, PAIRS, Method
from support.trainer import COMMON, make_pairs, make_world, train

BETA, MARGIN = 0.2, 0.5


@dataclass(repr=False)
class ToyConfig(PreferenceConfig):
    beta: float | None = option("inverse temperature, 1/nats", None, above=0, methods={"toy": BETA})
    toy_margin: float | None = option("target margin, reward units", None, least=0, methods={"toy": MARGIN})


def toy_rewards(rows, args):
    return args.beta * (rows.logps - rows.ref_logps)


def toy_loss(rows, baselines, args):
    """(m - beta (log-ratio of chosen - log-ratio of rejected))^2"""
    chosen, rejected = toy_rewards(rows, args).chunk(2)
    return (args.toy_margin - (chosen - rejected)) ** 2


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", Method("Toy", PAIRS, toy_loss, toy_rewards))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("llama", tmp_path_factory.mktemp("world"))


def test_it_trains_by_its_formula(world, tmp_path):
    pairs = make_pairs(4)
    config = ToyConfig(output_dir=str(tmp_path), method="toy", **COMMON | {"max_steps": 2, "logging_steps": 1})
    trainer = PreferenceTrainer(world.model, config, pairs, processing_class=world.tokenizer, ref_model=world.ref)
    found = trainer.predict(pairs)
    ratios = torch.tensor(found.predictions["logps"] - found.predictions["ref_logps"]).double()  # (P, 2), chosen first
    expected = (MARGIN - BETA * (ratios[:, 0] - ratios[:, 1])).square().mean()
    assert found.metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-5)
    logs = train(trainer)
    assert len(logs) == 2 and logs[1]["loss"] != logs[0]["loss"] and "rewards/margins" in logs[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "toy", "toy_margin": -1.0}, "toy_margin is -1.0; expected a number at least 0"),
        (
            {"method": "toy", "gamma": 1.0},
            r"gamma is 1.0; method 'toy' has no use for it here \(it takes: beta, toy_margin\)",
        ),
        ({"method": "dpo", "toy_margin": 1.0}, "toy_margin is 1.0; method 'dpo' has no use for it here"),
        ({"method": "toyy"}, "method is 'toyy'; expected one of .*toy; did you mean toy?"),
    ],
)
def test_its_options_are_checked_as_all_others(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ToyConfig(output_dir=str(tmp_path), use_cpu=True, **options)
