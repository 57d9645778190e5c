"""All ten methods: the same step however it is cut, numbers that follow from the formula, and that they learn."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from prefopt.train.diagnostics import TrainingWarning
from prefopt.train.methods import COMPONENTS, METHODS, PAIRS
from support.tiny_models import make_rows
from support.trainer import (
    data_for,
    gradients_of_first_step,
    make_pairs,
    make_trainer,
    make_world,
    steps_of,
    train,
)

EPS = torch.finfo(torch.float32).eps
# The same sums in another order: a gradient is a sum over about a hundred tokens, in two layers of them.
FP32_ROUNDING = 100 * EPS
NATS = 200 * EPS  # of a completion's log-probability here
CASES = {method: {} for method in METHODS} | {
    "enhanced_kto-shift": {"shift": "ema", "shift_start": 0.0, "shift_ramp": 0.0},
    "enhanced_kto-win": {
        "win_weighting": "prelec",
        "decision_clip": (0.1, 9.0),
        "kl_estimator": "ema",
    },
    "bco-cumulative": {"shift": "cumulative", "shift_bound": 0.02},
    "dpo-robust": {"label_smoothing": 0.1, "robust": True},
    "cpo-alpha": {"alpha": 3.0},
}


CUTS = {"enhanced_kto-win": ((4, 1), (2, 2), (1, 4)), "dpo": ((4, 1), (2, 2), (1, 4))}  # batch size, accumulation


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Policy and reference the other way round: the first rows then have a reference point above 0."""
    world = make_world("qwen3", tmp_path_factory.mktemp("qwen3"))
    return world._replace(model=world.ref, ref=world.model)


def case(name: str) -> dict:
    """Options and data of a case."""
    method = name.partition("-")[0]
    rows = data_for(method, 20)
    return {"method": method, "data": rows, "sampler": "sequential", **CASES[name]}


@pytest.mark.parametrize("name", CASES)
def test_a_step_does_not_depend_on_how_it_is_cut(world, tmp_path, name):
    found = {}
    for batch, accumulation in CUTS.get(name, ((4, 1), (1, 4))):
        trainer = make_trainer(
            world,
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **case(name),
        )
        gradients = torch.cat([g.flatten() for g in gradients_of_first_step(trainer).values()])
        found[batch] = gradients, steps_of(trainer)
    whole, logs = found[4]
    for batch in found.keys() - {4}:
        gradients, others = found[batch]
        assert ((gradients - whole).norm() / whole.norm()).item() < FP32_ROUNDING
        for log, other in zip(logs, others, strict=True):
            assert set(log) == set(other)
            for key, value in log.items():
                if key == "epoch":  # Trainer's, which counts micro-batches
                    continue
                # the second step adds the first update's rounding to the sums of up to 200 nats
                assert other[key] == pytest.approx(value, rel=10 * FP32_ROUNDING, abs=NATS), key


# ---- against the formula, in fp64, from the model's own logits ----


class Exact:
    """Four rows or pairs under policy and reference: l, l_ref and T, from the models' own logits in fp64."""

    def __init__(self, world, trainer, count: int = 4):
        self.policy, self.ref = world.model.eval(), world.ref.eval()
        self.rows = [trainer.train_dataset[position] for position in range(count)]

    def of(self, prompt: str = "prompt_ids", completion: str = "completion_ids", shift: int = 0):
        """l, l_ref, T, each (4,); ``shift`` takes the completion from so many rows before."""
        found = []
        for position, row in enumerate(self.rows):
            ids, scored = row[prompt], self.rows[position - shift][completion]
            found.append([logp(model, ids, scored) for model in (self.policy, self.ref)] + [len(scored)])
        return torch.tensor(found, dtype=torch.float64).unbind(1)

    def side(self, side: str):
        return self.of(f"{side}_prompt_ids", f"{side}_completion_ids")

    @property
    def signs(self):
        return torch.tensor([1.0 if row["label"] else -1.0 for row in self.rows]).double()


def logp(model, prompt: list[int], completion: list[int]) -> float:
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    targets = ids[0, len(prompt) :]
    return logps[torch.arange(len(prompt) - 1, ids.shape[1] - 1), targets].sum().item()


def first_log(world, tmp_path, method: str, **options) -> tuple[dict, Exact]:
    """The log of a first step of four rows or pairs, one a micro-batch."""
    trainer = make_trainer(
        world,
        tmp_path,
        method=method,
        data=data_for(method, 20),
        max_steps=1,
        sampler="sequential",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **options,
    )
    exact = Exact(world, trainer)
    return train(trainer)[0], exact


def close(log: dict, **expected: float) -> None:
    for key, value in expected.items():
        key = key.replace("__", "/")
        tolerance = 1e-5 if key == "loss" else 1e-4  # the contract of the parity tests
        assert log[key] == pytest.approx(float(value), abs=tolerance, rel=0), key


def log_odds(m: torch.Tensor) -> torch.Tensor:
    return m - torch.log(-torch.expm1(m))


@pytest.mark.parametrize("method", ["dpo", "ipo", "cpo", "simpo", "orpo"])
def test_the_numbers_of_a_pair_follow_from_the_formula(world, tmp_path, method):
    options = {
        "dpo": {"beta": 0.3, "label_smoothing": 0.2},
        "ipo": {"beta": 0.7},
        "cpo": {"alpha": 0.5},
        "simpo": {"gamma": 0.4},
        "orpo": {"odds_weight": 0.6},
    }[method]
    log, exact = first_log(world, tmp_path, method, **options)
    (w, ref_w, n_w), (l, ref_l, n_l) = exact.side("chosen"), exact.side("rejected")
    assert len(set(n_w.tolist())) > 1  # or a mean over tokens would be a mean over rows
    rewards = 0.3 * (w - ref_w), 0.3 * (l - ref_l)
    if method == "dpo":
        x = rewards[0] - rewards[1]
        loss = (-0.8 * F.logsigmoid(x) - 0.2 * F.logsigmoid(-x)).mean()
    elif method == "ipo":
        loss = (((w - ref_w) / n_w - (l - ref_l) / n_l - 1 / 1.4) ** 2).mean()
        rewards = 0.7 * (w - ref_w), 0.7 * (l - ref_l)
    elif method == "cpo":
        rewards = 0.1 * w, 0.1 * l
        loss = -F.logsigmoid(rewards[0] - rewards[1]).mean() - 0.5 * w.sum() / n_w.sum()
    elif method == "simpo":
        rewards = 2 * w / n_w, 2 * l / n_l
        loss = -F.logsigmoid(rewards[0] - rewards[1] - 0.4).mean()
    else:
        rewards = 0.6 * w / n_w, 0.6 * l / n_l
        ratio = log_odds(w / n_w) - log_odds(l / n_l)
        loss = -(w / n_w).mean() - 0.6 * F.logsigmoid(ratio).mean()
    close(
        log,
        loss=loss,
        rewards__chosen=rewards[0].mean(),
        rewards__rejected=rewards[1].mean(),
        rewards__margins=(rewards[0] - rewards[1]).mean(),
        rewards__accuracies=(rewards[0] > rewards[1]).double().mean(),
        logps__chosen=w.mean(),
        logps__rejected=l.mean(),
    )


def test_sft_is_the_mean_over_the_tokens_of_desirable_answers(world, tmp_path):
    log, exact = first_log(world, tmp_path, "sft")
    l, _, n = exact.of()
    close(log, loss=-l.sum() / n.sum(), logps__chosen=l.mean())
    assert abs((-l / n).mean() + l.sum() / n.sum()) > 1e-3  # another number
    assert not {key for key in log if key.startswith(("rewards", "kl")) or "rejected" in key}


@pytest.mark.parametrize("bound", [0.0, 0.02])
def test_bco_takes_one_shift_for_the_whole_step(world, tmp_path, bound):
    log, exact = first_log(world, tmp_path, "bco", shift_bound=bound)
    l, ref, _ = exact.of()
    rewards, s = 0.1 * (l - ref), exact.signs
    shift = (rewards[s > 0].mean() + rewards[s < 0].mean()) / 2
    let_in = shift.clamp(-bound, bound) if bound else shift
    pulls = [-s * 0.1 * torch.sigmoid(-s * (rewards - d)) for d in (0.0, let_in)]
    parts = pulls[0].abs().sum(), (pulls[1] - pulls[0]).abs().sum()
    assert abs(shift) > 0.03
    close(
        log,
        loss=-F.logsigmoid(s * (rewards - let_in)).mean(),
        shift=shift,
        shift_gate=1.0,
        grad__base=parts[0] / sum(parts),
        grad__shift=parts[1] / sum(parts),
    )


def test_enhanced_kto_follows_from_the_formula(world, tmp_path):
    options = {
        "shift": "window",
        "shift_start": 0.0,
        "shift_ramp": 0.0,
        "decision_clip": (1e-3, 1e3),
    }
    log, exact = first_log(world, tmp_path, "enhanced_kto", **options)
    l, ref, n = exact.of()
    s, beta = exact.signs, 0.1
    rewards = beta * (l - ref)
    shift = ((rewards[s > 0].mean() + rewards[s < 0].mean()) / 2).clamp(-0.5, 0.5)
    u = s * (rewards - shift)
    a = u.sign() * 0.1 / 0.88 * ((1 + u.abs() / 0.1) ** 0.88 - 1)
    value = (torch.sigmoid(a) - 0.5) * torch.where(u >= 0, 1.0, 2.25)
    p = (l / n).exp()
    omega = p**0.61 / (p**0.61 + (1 - p) ** 0.61) ** (1 / 0.61) / p
    assert omega.max() > 1.3 * omega.min()  # the weights do something
    main = omega / omega.mean() * (0.5 - value)
    odds = 0.1 * F.softplus(-s * log_odds(l / n))
    close(log, loss=(main + odds).mean(), shift=shift)
    mismatched, mismatched_ref, _ = exact.of(shift=1)
    z0 = (mismatched - mismatched_ref).mean().clamp(min=0)
    assert z0 > 0.01
    close(log, kl=z0)
    shares = [log[f"grad/{part}"] for part in COMPONENTS]
    assert sum(shares) == pytest.approx(1.0) and all(share > 0 for share in shares)


def test_everything_off_is_kto(world, tmp_path):
    """Beside the reference point, which is KTO's: all logs of three steps, to the bit."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    off = {"loss_aversion": 1.0, "alpha": 1.0, "decision_weighting": "off", "odds_weight": 0.0}
    kto = train(make_trainer(world, tmp_path, **options))
    same = train(make_trainer(world, tmp_path, method="enhanced_kto", **off, **options))
    for mine, other in zip(same, kto, strict=True):
        assert {key: mine[key] for key in other} == other
        assert mine["grad/base"] == 1.0


# ---- the shift's stages ----


def test_the_shift_comes_in_by_its_schedule(world, tmp_path):
    trainer = make_trainer(
        world,
        tmp_path,
        method="enhanced_kto",
        shift="ema",
        shift_start=0.4,
        shift_ramp=0.2,
        max_steps=10,
        per_device_train_batch_size=4,
    )
    logs = train(trainer)
    assert [log["shift_gate"] for log in logs] == [0.0] * 5 + [0.5] + [1.0] * 4
    assert [log["grad/shift"] > 0 for log in logs] == [False] * 5 + [True] * 5
    args = trainer.args
    assert (args.main_bound, args.odds_bound, args.shift_bound) == (0.025, 0.2, 0.5)


def test_the_shift_waits_for_a_plateau(world, tmp_path):
    """Without learning the margin never rises, so the wait is as short as it can be: three logs."""
    trainer = make_trainer(
        world,
        tmp_path,
        method="bco",
        shift_start="plateau",
        learning_rate=0.0,
        max_steps=8,
        data=make_rows(True)[:4],
        per_device_train_batch_size=4,
    )
    gates = [log["shift_gate"] for log in train(trainer)]
    assert gates[:3] == [0.0] * 3 and gates[-3:] == [1.0] * 3 and sorted(gates) == gates


# ---- they learn ----

BAR = {"ipo": 0.5}  # share of the first loss that is left; half of IPO's is the distance to its target


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(world, tmp_path, method):
    """Eight rows or pairs, starting at the reference: the loss falls and desirable answers have higher rewards."""
    options = case(method) | {"data": data_for(method, 8)}
    trainer = make_trainer(
        world,
        tmp_path,
        ref=False,
        max_steps=20,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **options,
    )
    logs = train(trainer)
    first, last = logs[0], logs[-1]
    assert all(math.isfinite(value) for log in logs for value in log.values())
    assert last["loss"] < BAR.get(method, 0.6) * first["loss"]
    if METHODS[method].needs_reference:
        assert first["rewards/margins"] == 0.0
    if method == "sft":
        assert last["logps/chosen"] > 0.5 * first["logps/chosen"]
    else:
        assert last["rewards/margins"] > first["rewards/margins"] + 0.1
    if METHODS[method].data == PAIRS:
        assert last["rewards/accuracies"] == 1.0


def test_a_method_without_a_reference_says_so_and_is_told_nothing_of_rewards(world, tmp_path):
    trainer = make_trainer(world, tmp_path, method="simpo", data=make_pairs(8), max_steps=4)
    with pytest.MonkeyPatch.context() as patch:
        told = []
        patch.setattr("warnings.warn", lambda *args, **kwargs: told.append(args))
        train(trainer)
    assert abs(trainer.state.log_history[0]["rewards/chosen"]) > 10  # far, and no cause for concern
    assert not [one for one in told if TrainingWarning in one]
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["reference"] == {"kind": "none", "fingerprint": None}
    with pytest.raises(ValueError, match="method 'orpo' has no reference model, leave it out"):
        from prefopt.train import PreferenceConfig, PreferenceTrainer

        config = PreferenceConfig(str(tmp_path), use_cpu=True, method="orpo")
        PreferenceTrainer(world.model, config, make_pairs(4), None, world.tokenizer, world.ref)
