"""The losses against TRL's own code, fed with random log-probabilities through a stand-in for its trainer.

BCO left TRL after 1.13.0. Its numbers here were recorded from that release's ``BCOTrainer.bco_loss``. Where
ours is meant to differ, the test says by what.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from prefopt_kernels.losses import (
    apo_zero_loss,
    bco_loss,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    sft_loss,
    simpo_loss,
)
from prefopt_kernels.reference_point import CumulativeShift, MicrobatchKL
from support.losses import assert_within_rounding

pytest.importorskip("trl", reason="trl is a test dependency")

P, S = 6, 12  # pairs, tokens
BETA = 0.1


class Accelerator(SimpleNamespace):
    """One process: what is gathered is what there is."""

    def __init__(self):
        super().__init__(device=torch.device("cpu"))

    def gather(self, value):
        return value

    gather_for_metrics = gather


def sequences(rows: int, seed: int = 0):
    """Per-token log-probabilities in fp64, 0 where masked; the mask; sums under a reference model."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, S + 1, (rows,), generator=generator)
    mask = torch.arange(S) < lengths[:, None]
    logp = -3 * torch.rand(rows, S, dtype=torch.float64, generator=generator) * mask
    ref = logp.sum(1) + 10 * torch.randn(rows, dtype=torch.float64, generator=generator)
    return logp, mask, ref


def outputs(logp):
    # what a model with TRL's fused head returns; only log_probs matters to the loss
    return SimpleNamespace(
        log_probs=logp,
        entropy=torch.zeros_like(logp),
        mean_logits=torch.zeros_like(logp),
        is_top1=torch.zeros_like(logp, dtype=torch.bool),
    )


def trainer(**settings):
    return SimpleNamespace(
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        beta=BETA,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def trl_dpo(loss_type, logp, mask, ref, **settings):
    from trl.trainer.dpo_trainer import DPOTrainer

    stand_in = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        **settings,
    )
    prompt = torch.zeros(2 * P, 1, dtype=torch.int64)
    batch = {
        "input_ids": torch.zeros(2 * P, S + 1, dtype=torch.int64),
        "attention_mask": torch.ones(2 * P, S + 1, dtype=torch.int64),
        "completion_mask": torch.cat([prompt, mask.long()], dim=1),
        "ref_chosen_logps": ref[:P],
        "ref_rejected_logps": ref[P:],
    }
    return DPOTrainer._compute_loss(stand_in, lambda **_: outputs(logp), batch, False)


def ours(loss_type, logp, mask, ref):
    chosen, rejected = logp.sum(1).split(P)
    four = (chosen, rejected, ref[:P], ref[P:])
    lengths = mask.sum(1).split(P)
    if loss_type == "ipo":
        return ipo_loss(*four, *lengths, beta=BETA)
    if loss_type == "robust":
        return dpo_loss(*four, beta=BETA, label_smoothing=0.2, robust=True)
    if loss_type == "bco_pair":
        labels = torch.ones(P, dtype=torch.bool)
        desirable = bco_loss(chosen, ref[:P], labels, beta=BETA, shift=0.0)
        return desirable + bco_loss(rejected, ref[P:], ~labels, beta=BETA, shift=0.0)
    if loss_type == "apo_zero":
        labels = torch.ones(P, dtype=torch.bool)
        return apo_zero_loss(chosen, ref[:P], labels, beta=BETA) + apo_zero_loss(rejected, ref[P:], ~labels, beta=BETA)
    if loss_type == "sft":
        weights = lengths[0] / lengths[0].double().mean()
        return weights * sft_loss(chosen, lengths[0])
    return dpo_loss(*four, beta=BETA)


def assert_same(ours, ours_leaf, theirs, theirs_leaf, largest):
    assert ours.dtype == theirs.dtype
    # arguments of exponentials stay below 10; a mean of P rows adds P roundings, within the sixteen
    assert_within_rounding(ours.detach(), theirs.detach(), argument=10, largest=largest)
    (own,) = torch.autograd.grad(ours, ours_leaf)
    (trls,) = torch.autograd.grad(theirs, theirs_leaf)
    assert_within_rounding(own, trls, argument=10, largest=largest)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "ipo", "bco_pair", "apo_zero", "sft"])
def test_the_losses_of_trls_dpo_trainer(loss_type):
    logp, mask, ref = sequences(2 * P)
    own, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    trls = trl_dpo(loss_type, theirs, mask, ref, label_smoothing=0.2)
    loss = ours(loss_type, own, mask, ref).mean()
    if loss_type == "sft":  # TRL averages the tokens of the mask; ours weighs sums
        (gradient,) = torch.autograd.grad(loss, own)
        own.grad, loss = None, ours(loss_type, own, mask, ref).mean()
        assert not gradient[P:].any()
        gradient = gradient * torch.cat([mask[:P], mask[P:]])
        (trls_gradient,) = torch.autograd.grad(trls, theirs, retain_graph=True)
        assert_within_rounding(loss.detach(), trls.detach(), argument=0, largest=3)
        assert_within_rounding(gradient, trls_gradient, argument=0, largest=1)
        return
    assert_same(loss, own, trls, theirs, largest=400 if loss_type == "ipo" else 5)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_losses_of_trls_kto_trainer(loss_type):
    from trl.trainer.kto_trainer import KTOTrainer

    logp, mask, ref = sequences(2 * P, seed=1)
    labels = tensor([True, False, False] * (2 * P // 3))
    kl_logps = ref + torch.linspace(-2, 9, 2 * P, dtype=torch.float64)  # a mean of 3.5 nats
    stand_in = trainer(
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        desirable_weight=1.2,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda model, batch: kl_logps,
    )
    batch = {
        "input_ids": torch.zeros(2 * P, S + 1, dtype=torch.int64),
        "attention_mask": torch.ones(2 * P, S + 1, dtype=torch.int64),
        "completion_mask": torch.cat([torch.zeros(2 * P, 1).long(), mask.long()], dim=1),
        "label": labels,
        "ref_logps": ref,
        "ref_KL_logps": ref,
    }
    own, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    trls = KTOTrainer._compute_loss(stand_in, lambda **_: outputs(theirs), batch, False)
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7}
    if loss_type == "kto":
        # ours is kept in fp32; this mean is exact there
        z0 = MicrobatchKL().estimate(torch.linspace(-2, 9, 2 * P))
        assert z0.item() == 3.5 and stand_in._metrics["train"]["kl"][0] == pytest.approx(
            3.5, rel=1e-14
        )  # TRL takes it from differences of sums near 30, in fp64
        loss = kto_loss(own.sum(1), ref, labels, beta=BETA, reference_point=z0, **weights)
    else:
        loss = apo_zero_loss(own.sum(1), ref, labels, beta=BETA, **weights)
    assert_same(loss.mean(), own, trls, theirs, largest=2)


def cpo_stand_in(**settings):
    return SimpleNamespace(accelerator=Accelerator(), alpha=0.0, beta=BETA, label_smoothing=0.0, **settings)


def test_trls_cpo_loss():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    logp, mask, _ = sequences(2 * P, seed=2)
    own, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    trls, _, _ = CPOTrainer.cpo_loss(cpo_stand_in(loss_type="sigmoid"), *theirs.sum(1).split(P))
    lengths = mask.sum(1)[:P]
    loss = cpo_loss(*own.sum(1).split(P), lengths, beta=BETA, alpha=0.0)
    assert_same(loss.mean(), own, trls.mean(), theirs, largest=5)
    # TRL's likelihood is the mean over the tokens of the chosen completions, a row's is not; both anchor
    chosen = logp[:P].sum(1)
    of_rows = cpo_loss(*logp.sum(1).split(P), lengths, beta=BETA, alpha=1.0).mean()
    of_tokens = trls.mean() - chosen.sum() / lengths.sum()
    assert of_rows.item() != pytest.approx(of_tokens.item(), rel=1e-3)
    equal = torch.full_like(lengths, S)
    of_rows = cpo_loss(*logp.sum(1).split(P), equal, beta=BETA, alpha=1.0).mean()
    assert_within_rounding(of_rows, (trls.mean() - chosen.sum() / equal.sum()).detach(), argument=10)


def test_trls_simpo_loss():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    logp, mask, _ = sequences(2 * P, seed=3)
    own, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    lengths = mask.sum(1)
    stand_in = cpo_stand_in(loss_type="simpo", simpo_gamma=0.5)
    trls, _, _ = CPOTrainer.cpo_loss(stand_in, *(theirs.sum(1) / lengths).split(P))
    loss = simpo_loss(*own.sum(1).split(P), *lengths.split(P), beta=BETA, gamma=0.5)
    # TRL subtracts gamma / beta = 5 before it multiplies by beta
    assert_same(loss.mean(), own, trls.mean(), theirs, largest=8)


def test_trls_orpo_loss():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logp, mask, _ = sequences(2 * P, seed=4)
    lengths = mask.sum(1)
    stand_in = SimpleNamespace(accelerator=Accelerator(), beta=0.5)
    trls, *_ = ORPOTrainer.odds_ratio_loss(stand_in, *(logp.sum(1) / lengths).split(P))
    loss = orpo_loss(*logp.float().sum(1).split(P), *lengths.split(P), odds_weight=0.5)
    likelihood = -(logp.sum(1) / lengths)[:P]
    # TRL's is fp32, and is subtracted from the likelihood
    exact = likelihood - trls.double()
    assert_within_rounding(loss, exact, argument=10, largest=4)


def test_trls_orpo_loss_is_not_finite_at_probability_one_and_ours_is():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    zero, one = torch.zeros(1), tensor([1])
    stand_in = SimpleNamespace(accelerator=Accelerator(), beta=0.5)
    trls, *_ = ORPOTrainer.odds_ratio_loss(stand_in, zero, zero)
    assert trls.isnan().all()
    assert orpo_loss(zero, zero, one, one, odds_weight=0.5).isfinite().all()


# TRL 1.13.0's bco_loss on three micro-batches of training and one of evaluation, beta 0.1:
# (chosen, rejected, ref_chosen, ref_rejected) -> its losses, chosen first, and its delta
BCO = [
    (
        ([-10.5, -31.25], [-20.75], [-12.0, -30.0], [-18.5]),
        [0.5906705, 0.7227392, 0.6171109],
        -0.06666667,
    ),
    (
        ([-7.5], [-44.0, -16.25], [-9.25], [-40.5, -16.5]),
        [0.5832707, 0.55791, 0.7356817],
        -0.05833333,
    ),
    (([-25.0], [], [-31.5], []), [0.4349628], 0.04285715),
    (([-5.0], [-6.5], [-9.0], [-6.0]), [0.5304356, 0.647796], 0.04285715),
]


def test_the_recorded_bco_losses_of_trl_1_13():
    shift = CumulativeShift()
    for i, ((chosen, rejected, ref_chosen, ref_rejected), losses, delta) in enumerate(BCO):
        logps, ref_logps = tensor(chosen + rejected), tensor(ref_chosen + ref_rejected)
        labels = tensor([True] * len(chosen) + [False] * len(rejected))
        rewards = BETA * (logps - ref_logps)
        value = shift.estimate(rewards, labels, update=i < 3)
        loss = bco_loss(logps, ref_logps, labels, beta=BETA, shift=value)
        # both sides round in fp32, numbers below one, some eight times; seven and eight decimals are recorded
        atol = 8 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(value, tensor(delta), rtol=0, atol=atol)
        torch.testing.assert_close(loss, tensor(losses), rtol=0, atol=atol)


def test_one_bad_reward_does_not_stay_in_the_shift_for_ever():
    # TRL's mean += (batch mean - mean) * n / N is NaN from the first NaN on; ours leaves the row out
    shift, labels = CumulativeShift(), tensor([True, False])
    shift.estimate(tensor([float("nan"), 1.0]), labels)
    assert shift.estimate(tensor([3.0, 5.0]), labels).item() == 3
