"""The loss of a micro-batch in one call of sequence_loss is that of the pure functions, for every option."""

import pytest
import torch

from prefopt.train import PreferenceConfig
from prefopt.train.methods import Baselines, Sequences
from prefopt.train.objective import Objective

WEIGHTS = {"beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.9}
SHIFTED = {"shift": "window", "shift_bound": 0.4}
CASES = {
    "kto": WEIGHTS,
    "apo_zero": WEIGHTS,
    "bco": {"beta": 0.3, "shift": "ema", "shift_bound": 0.2},
    "bco unbounded": {},
    "bco without shift": {"shift": "off"},
    "enhanced_kto": WEIGHTS,
    "enhanced_kto shift": WEIGHTS | SHIFTED | {"odds_bound": 0.05, "main_bound": 0.01},
    "enhanced_kto prelec": SHIFTED | {"win_weighting": "prelec", "decision_weighting": "prelec"},
    "enhanced_kto tversky": {"win_weighting": "tversky-kahneman", "decision_clip": (0.8, 1.1)},
    "enhanced_kto plain": {"decision_weighting": "off", "odds_weight": 0.0, "loss_aversion": 1.5, "alpha": 1.0},
}


def config(name: str, folder) -> PreferenceConfig:
    return PreferenceConfig(
        output_dir=str(folder), method=name.split()[0], use_cpu=True, report_to="none", **CASES[name]
    )


def scored(seed: int) -> Sequences:
    """Seven sequences of one to nine tokens, in the order of a packed micro-batch."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 1, 9, 2, 5, 7, 4])
    tokens = -3 * torch.rand(int(lengths.sum()), generator=generator)
    labels = torch.tensor([True, False, True, True, False, False, True])
    logps = torch.stack([part.sum() for part in tokens.split(lengths.tolist())])
    ref_logps = logps + 2 * torch.randn(7, generator=generator)
    tokens.requires_grad_()
    logps = torch.stack([part.double().sum() for part in tokens.split(lengths.tolist())]).float()
    return Sequences(logps, ref_logps, labels, lengths, tokens)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_both_ways_have_the_loss_and_the_gradient(name, tmp_path, backend):
    args = config(name, tmp_path)
    args.backend = backend
    objective = Objective(args)
    shift = torch.tensor(0.35) if (args.shift or "off") != "off" else None
    mean = torch.tensor(1.1) if (args.decision_weighting or "off") != "off" else None
    baselines = Baselines(torch.tensor(0.8), shift, gate=0.6, decision_mean=mean)
    found = []
    for fused in (True, False):
        rows = scored(seed=len(name))
        tokens = rows.tokens
        if not fused:
            rows = Sequences(rows.logps, rows.ref_logps, rows.labels, rows.lengths)
        losses = objective.losses(rows, baselines)
        (gradient,) = torch.autograd.grad((losses * torch.arange(1.0, 8.0)).sum(), tokens)
        found.append((losses.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=2e-6, atol=2e-7)
    assert found[0][1].abs().min() > 0


def test_every_method_that_the_op_has_uses_it(tmp_path):
    for method in ("kto", "apo_zero", "bco", "enhanced_kto"):
        objective = Objective(config(method, tmp_path))
        with torch.profiler.profile() as profile:
            objective.losses(scored(1), Baselines(decision_mean=torch.tensor(1.0)))
        assert any(event.name == "prefopt_kernels::sequence_loss" for event in profile.events()), method
