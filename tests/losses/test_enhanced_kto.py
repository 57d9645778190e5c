"""enhanced_kto_loss against the textbook formulas in Python's arithmetic, one component at a time and together."""

import math

import pytest
import torch
from torch import tensor

from prefopt_kernels.losses import decision_weights, enhanced_kto_loss, kto_loss
from support.losses import EVERY_COMPONENT, ROWS, assert_within_rounding, inputs

GAMMA, PRELEC = 0.61, 0.65
BETA, Z0 = 0.1, 1.5


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def weighted(p, kind):
    """Tversky and Kahneman 1992, Prelec 1998."""
    if kind == "tversky-kahneman":
        return p**GAMMA / (p**GAMMA + (1 - p) ** GAMMA) ** (1 / GAMMA)
    return math.exp(-((-math.log(p)) ** PRELEC)) if kind == "prelec" else p


def weighted_slope(p, kind):
    w = weighted(p, kind)
    if kind == "tversky-kahneman":
        total = p**GAMMA + (1 - p) ** GAMMA
        return w * (GAMMA / p - (p ** (GAMMA - 1) - (1 - p) ** (GAMMA - 1)) / total)
    return w * PRELEC * (-math.log(p)) ** (PRELEC - 1) / p if kind == "prelec" else 1.0


def textbook(
    z=Z0, loss_aversion=1.0, alpha=1.0, kappa=0.1, win_weighting=None, decision_weighting=None,
    decision_clip=(0.5, 2.0), odds_weight=0.0, odds_baseline=0.0, desirable_weight=1.0,
    undesirable_weight=1.0,
):  # fmt: skip
    """Values and d loss / d logps of ROWS, as the papers write them."""
    rows = list(zip(*ROWS.values(), strict=True))
    confidences = [math.exp(logp / T) for logp, _, _, T in rows]
    omegas = [min(max(weighted(c, decision_weighting) / c, decision_clip[0]), decision_clip[1]) for c in confidences]
    mean = sum(omegas) / len(omegas)
    values, gradients = [], []
    for (logp, ref, label, T), c, omega in zip(rows, confidences, omegas, strict=True):
        s = 1 if label else -1
        weight = (desirable_weight if label else undesirable_weight) * omega / mean
        u = s * BETA * (logp - ref - z)
        sign = 1 if u >= 0 else -1
        a = sign * (kappa / alpha) * ((1 + abs(u) / kappa) ** alpha - 1)
        slope = (1 + abs(u) / kappa) ** (alpha - 1)
        p, half = sigmoid(a), weighted(0.5, win_weighting)
        averse = 1 if u >= 0 else loss_aversion
        gain = (weighted(p, win_weighting) - half) * averse
        h = weighted_slope(p, win_weighting) * p * (1 - p) * averse
        odds = math.log(c / (1 - c))
        behind = sigmoid(-s * (odds - odds_baseline))
        values.append(weight * (1 - half - gain) - odds_weight * math.log(1 - behind))
        gradients.append(-s * weight * BETA * slope * h - s * odds_weight * behind / (1 - c) / T)
    return values, gradients


def gradient_of(tensors, **settings):
    leaf = tensors["logps"].clone().requires_grad_()
    loss = enhanced_kto_loss(**(tensors | {"logps": leaf}), beta=BETA, **settings)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


COMPONENTS = {
    "off": {},
    "class weights": {"desirable_weight": 1.3, "undesirable_weight": 0.7},
    "curvature": {"alpha": 0.88},
    "strong curvature": {"alpha": 0.3, "kappa": 0.5},
    "loss aversion": {"loss_aversion": 2.25},
    "win weighting TK": {"win_weighting": "tversky-kahneman"},
    "win weighting Prelec": {"win_weighting": "prelec"},
    "decision weighting TK": {"decision_weighting": "tversky-kahneman"},
    "decision weighting Prelec": {"decision_weighting": "prelec", "decision_clip": (0.9, 1.1)},
    "odds": {"odds_weight": 0.1},
    "odds, baseline": {"odds_weight": 0.1, "odds_baseline": -1.25},
    "all": {k: v for k, v in EVERY_COMPONENT.items() if "shift" not in k},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COMPONENTS)
def test_value_and_gradient_are_the_textbooks(name, dtype):
    settings = COMPONENTS[name]
    loss, gradient = gradient_of(inputs("enhanced_kto", dtype), reference_point=Z0, **settings)
    values, slopes = textbook(**settings)
    # u goes up to 2.9, log-odds up to 4; the largest factor before a sigmoid is beta * 2.25 * 2
    assert_within_rounding(loss, values, argument=8, largest=2.25)
    assert_within_rounding(gradient, slopes, argument=8, largest=BETA * 4.5)


@pytest.mark.parametrize(
    ("shift", "gate", "bound", "z"),
    [
        (0.4, 0.0, 10.0, Z0),
        (0.4, 1.0, 10.0, 4.0),
        (0.4, 0.25, 10.0, 0.75 * Z0 + 0.25 * 4.0),
        (-3.0, 0.5, 0.5, 0.5 * Z0 - 0.5 * 5.0),
        (3.0, 1.0, 0.5, 5.0),
    ],
)
def test_the_shift_moves_the_reference_point(shift, gate, bound, z):
    tensors = inputs("enhanced_kto", torch.float64)
    exact = kto_loss(*(tensors[k] for k in list(tensors)[:3]), beta=BETA, reference_point=z)
    for wrap in (float, lambda x: tensor(x, dtype=torch.float64)):
        settings = {"shift": wrap(shift), "shift_gate": wrap(gate), "shift_bound": bound}
        loss, _ = gradient_of(tensors, reference_point=Z0, **settings)
        assert_within_rounding(loss, exact, argument=3.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("z0", [0.0, Z0, tensor(Z0), torch.full((5,), Z0)])
def test_all_off_is_kto_bit_for_bit(dtype, z0):
    tensors = inputs("enhanced_kto", dtype)
    settings = {"reference_point": z0, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    loss, gradient = gradient_of(tensors, **settings)
    leaf = tensors["logps"].clone().requires_grad_()
    kto = kto_loss(leaf, tensors["ref_logps"], tensors["labels"], beta=BETA, **settings)
    (kto_gradient,) = torch.autograd.grad(kto.sum(), leaf)
    assert torch.equal(loss, kto.detach())
    assert torch.equal(gradient, kto_gradient)


def test_all_off_is_kto_bit_for_bit_over_many_rows():
    generator = torch.Generator().manual_seed(0)
    ref = -400 * torch.rand(100_000, generator=generator)
    logps = ref + 100 * torch.randn(100_000, generator=generator)
    labels = torch.rand(100_000, generator=generator) < 0.5
    lengths = torch.randint(0, 400, (100_000,), generator=generator)
    tensors = {"logps": logps, "ref_logps": ref, "labels": labels, "lengths": lengths}
    # a gate that is a tensor is not read, so 0 must be exact by arithmetic
    loss, gradient = gradient_of(tensors, reference_point=Z0, shift=tensor(math.nan), shift_gate=tensor(0.0))
    leaf = logps.requires_grad_()
    kto = kto_loss(leaf, ref, labels, beta=BETA, reference_point=Z0)
    (kto_gradient,) = torch.autograd.grad(kto.sum(), leaf)
    assert torch.equal(loss, kto.detach()) and torch.equal(gradient, kto_gradient)


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_first_step_of_a_run_has_a_gradient(name):
    # Policy and reference model agree, so u is exactly 0 in every row. With abs or sign in the curvature
    # its derivative would be 0 there and nothing would ever move; a plain power's would be NaN.
    tensors = inputs("enhanced_kto", torch.float64)
    tensors["ref_logps"] = tensors["logps"].clone()
    settings = {**COMPONENTS[name], "odds_weight": 0.0}
    _, gradient = gradient_of(tensors, reference_point=0.0, **settings)
    h = {None: 0.25, "tversky-kahneman": 0.12829500, "prelec": 0.16802049}
    slope = BETA * h[settings.get("win_weighting")]
    for i, label in enumerate(ROWS["labels"]):
        weight = settings.get("desirable_weight" if label else "undesirable_weight", 1.0)
        if (kind := settings.get("decision_weighting")) is not None:
            clip = settings.get("decision_clip", (0.5, 2.0))
            omegas = decision_weights(tensors["logps"], tensors["lengths"], weighting=kind, clip=clip)
            weight *= (omegas / omegas.mean())[i].item()
        # 8 digits of h are written above
        assert gradient[i].item() == pytest.approx((-slope if label else slope) * weight, rel=1e-7)


def test_decision_weights_have_mean_one_over_the_rows_given_or_over_the_callers():
    tensors = inputs("enhanced_kto", torch.float64)
    settings = {"reference_point": Z0, "decision_weighting": "tversky-kahneman"}
    plain, _ = gradient_of(tensors, reference_point=Z0)
    loss, _ = gradient_of(tensors, **settings)
    omegas = loss / plain
    assert_within_rounding(omegas.mean(), 1.0, argument=3)
    raw = decision_weights(tensors["logps"], tensors["lengths"], weighting="tversky-kahneman")
    assert_within_rounding(omegas, raw / raw.mean(), argument=3)
    # two calls that are given the mean of both are one call
    halves = [
        gradient_of({k: v[rows] for k, v in tensors.items()}, decision_mean=raw.mean(), **settings)[0]
        for rows in (slice(0, 2), slice(2, 5))
    ]
    assert_within_rounding(torch.cat(halves), loss, argument=3)


def test_decision_weights_are_clipped_and_constants():
    lengths = torch.ones(4, dtype=torch.int64)
    logps = tensor([0.0, -1e-3, -50.0, -1e6], requires_grad=True)
    for kind in ("tversky-kahneman", "prelec"):
        weights = decision_weights(logps, lengths, weighting=kind, clip=(0.75, 3.0))
        assert not weights.requires_grad
        assert weights.tolist()[2:] == [3.0, 3.0]
        assert weights[0] == 1  # W(1) = 1
        assert (weights >= 0.75).all()


@pytest.mark.parametrize("baseline", ["reference_point", "shift", "odds_baseline"])
def test_baselines_are_constants_to_the_gradient(baseline):
    tensors = inputs("enhanced_kto")
    leaf = tensors.pop("logps").requires_grad_()
    mean = (0.01 * leaf).mean()
    settings = {"reference_point": Z0, "shift_gate": 0.5, "odds_weight": 0.1, baseline: mean}
    loss = enhanced_kto_loss(leaf, **tensors, beta=BETA, **settings)
    (through,) = torch.autograd.grad(loss.sum(), mean, allow_unused=True)
    assert through is None


def bad(message, error=ValueError, **change):
    return pytest.param(change, error, message, id=message.split(";")[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        bad("lengths has shape (2,); expected (5,), as", lengths=tensor([1, 2])),
        bad("lengths has dtype torch.bool; expected", TypeError, lengths=torch.ones(5).bool()),
        bad("shift_gate is 1.5; expected a number in [0, 1]", shift_gate=1.5),
        bad("shift_gate has shape (5,); expected ()", shift_gate=torch.zeros(5)),
        bad("shift_gate is a NoneType; expected a number in", TypeError, shift_gate=None),
        bad("shift_bound is 0; expected a finite number above 0", shift_bound=0),
        bad("shift is inf; expected a finite number", shift=math.inf),
        bad("loss_aversion is 0; expected a finite number above 0", loss_aversion=0),
        bad("alpha is 0; expected a number in (0, 1]", alpha=0),
        bad("alpha is 1.1; expected a number in (0, 1]", alpha=1.1),
        bad("kappa is -1; expected a finite number above 0", kappa=-1),
        bad(
            "win_weighting is 'tversky-kahnemann'; expected None or one of ('tversky-kahneman', "
            "'prelec'); did you mean 'tversky-kahneman'?",
            win_weighting="tversky-kahnemann",
        ),
        bad("decision_weighting is 3; expected None or one of", decision_weighting=3),
        bad("decision_clip is (2.0, 0.5); expected (low, high)", decision_clip=(2.0, 0.5)),
        bad("decision_clip is 2.0; expected (low, high)", TypeError, decision_clip=2.0),
        bad("decision_mean has shape (5,); expected ()", decision_mean=torch.ones(5)),
        bad("decision_mean is 0; expected a finite number above 0", decision_mean=0),
        bad("odds_weight is -0.1; expected a finite number, 0 or above", odds_weight=-0.1),
        bad("odds_baseline has shape (2,); expected () or", odds_baseline=torch.zeros(2)),
        bad("main_bound is 0; expected a finite number above 0", main_bound=0),
        bad("odds_bound is inf; expected a finite number above 0", odds_bound=math.inf),
        bad("beta is 0; expected a finite number above 0", beta=0),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = inputs("enhanced_kto") | {"beta": BETA, "reference_point": Z0} | change
    with pytest.raises(error) as caught:
        enhanced_kto_loss(**arguments)
    assert str(caught.value).startswith(message)


def test_decision_weights_name_a_bad_argument():
    logps, lengths = tensor([-1.0]), tensor([1])
    with pytest.raises(ValueError, match="^weighting is None; expected one of"):
        decision_weights(logps, lengths, weighting=None)
    with pytest.raises(ValueError, match=r"^weighting is 'Prelec'.*did you mean 'prelec'\?"):
        decision_weights(logps, lengths, weighting="Prelec")
    with pytest.raises(ValueError, match=r"^clip is \(0, 2\); expected \(low, high\)"):
        decision_weights(logps, lengths, weighting="prelec", clip=(0, 2))
