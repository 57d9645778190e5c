"""The study's language, policy, losses, shifts and verdicts, against independent definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from prefopt_kernels import kto_loss
from studies.bco_stability import components as parts
from studies.bco_stability.components import EMA, Running, schedule_of
from studies.bco_stability.grid import (
    COMPONENTS,
    MISTAKES,
    REMEDIES,
    VARIANTS,
    Config,
    full_plan,
    quick_plan,
    remedies_of,
)
from studies.bco_stability.language import ANSWER, END, PROMPT, SHORTEST, VOCABULARY, make_pairs
from studies.bco_stability.policy import (
    RANK,
    SCALE,
    adapter_size,
    make_reference,
    merged,
    names,
    new_adapters,
    pretrain,
    sequence_logps,
)
from studies.bco_stability.runs import FIRST_JUDGED, judge, run_cell

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def base():
    return pretrain(2)


@pytest.fixture(scope="module")
def window():
    """Three seeds' windows of 16 rows, up to 80 nats from the reference model."""
    rng = torch.Generator().manual_seed(0)
    ref_logps = -60 - 20 * torch.rand(3, 16, generator=rng)
    return parts.Window(
        logps=(ref_logps + 40 * torch.randn(3, 16, generator=rng)).clamp(max=-1.0),
        ref_logps=ref_logps,
        labels=torch.rand(3, 16, generator=rng) < 0.5,
        lengths=torch.randint(5, 45, (3, 16), generator=rng),
        z0=3 * torch.rand(3, 16, generator=rng),
        shift=torch.randn(3, 16, generator=rng),
        gate=1.0,
    )


# ---------------------------------------------------------------- language and policy


def test_answers_end_once_and_fit_their_lengths():
    pairs = make_pairs(200, seed=3)
    positions = torch.arange(ANSWER)
    for answers, lengths in ((pairs.good, pairs.good_lengths), (pairs.bad, pairs.bad_lengths)):
        assert lengths.min() > SHORTEST and lengths.max() <= ANSWER
        assert torch.equal(answers != END, positions < lengths[:, None] - 1)
    again = make_pairs(200, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(pairs, again, strict=True))


def test_good_and_bad_answers_differ_in_their_transitions():
    pairs = make_pairs(400, seed=4)

    def counts(answers):
        table = torch.zeros(VOCABULARY, VOCABULARY)
        table.index_put_((answers[:, :-1].flatten(), answers[:, 1:].flatten()), torch.ones(1), accumulate=True)
        table[END] = 0
        return table / table.sum()

    apart = (counts(pairs.good) - counts(pairs.bad)).abs().sum()
    # The same halves of one kind of answer differ by sampling alone.
    alike = (counts(pairs.good[:200]) - counts(pairs.good[200:])).abs().sum()
    assert apart > alike


def test_log_probabilities_are_those_of_the_plain_transformer(base):
    """One row at a time, LoRA beside the weights instead of in them, no padding, softmax written out; fp64."""
    pairs, adapters = make_pairs(9, seed=5), new_adapters([0, 1])
    rng = torch.Generator().manual_seed(1)
    adapters += 0.1 * torch.randn(adapters.shape, generator=rng)
    rows = [x.expand(2, *x.shape) for x in (pairs.prompts, pairs.good, pairs.good_lengths)]
    ours = sequence_logps(base, adapters, *rows)
    exact = torch.stack(
        [
            torch.stack(
                [
                    _exact_logp(base, adapter, pairs.prompts[i], pairs.good[i, :n])
                    for i, n in enumerate(pairs.good_lengths.tolist())
                ]
            )
            for adapter in adapters
        ]
    )
    # A sum of up to 44 tokens, each behind a few dozen roundings of values of order 10.
    assert (ours - exact).abs().max() < 44 * 100 * 10 * EPS
    planted = exact.roll(1, dims=1)
    assert (ours - planted).abs().max() > 1


def _exact_logp(base, adapter, prompt, answer):
    w = {name: weight.double() for name, weight in base.items()}
    start, lora = 0, {}
    for name, inputs, outputs in names():
        a = adapter[start : start + inputs * RANK].double().reshape(inputs, RANK)
        start += inputs * RANK
        lora[name] = (a, adapter[start : start + outputs * RANK].double().reshape(RANK, outputs))
        start += outputs * RANK

    def linear(x, name):
        return x @ w[name] + SCALE * (x @ lora[name][0]) @ lora[name][1]

    def normal(x):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)

    tokens = torch.cat([prompt, answer])
    x = w["embedding"][tokens] + w["position"][: len(tokens)]
    for layer in range(2):
        q, k, v = (linear(normal(x), f"{layer}.{name}") for name in "qkv")
        heads = []
        for head in range(2):
            of = slice(16 * head, 16 * head + 16)
            scores = q[:, of] @ k[:, of].T / 4
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, of])
        x = x + linear(torch.cat(heads, -1), f"{layer}.o")
        hidden = F.gelu(linear(normal(x), f"{layer}.up"), approximate="tanh")
        x = x + linear(hidden, f"{layer}.down")
    logp = (normal(x) @ w["head"]).log_softmax(-1)
    where = torch.arange(PROMPT - 1, len(tokens) - 1)
    return logp[where, tokens[where + 1]].sum()


def test_a_new_adapter_leaves_the_reference_model_as_it_is(base):
    adapters = new_adapters([0, 7])
    assert adapters.shape == (2, adapter_size()) and not torch.equal(*adapters)
    assert all(torch.equal(weight, base[name].expand_as(weight)) for name, weight in merged(base, adapters).items())
    assert torch.equal(new_adapters([7])[0], adapters[1])


# ---------------------------------------------------------------- losses


def test_without_components_both_forms_are_kto(window):
    leaf = window.logps.double().flatten().requires_grad_()
    loss = kto_loss(
        leaf,
        window.ref_logps.double().flatten(),
        window.labels.flatten(),
        beta=parts.BETA,
        reference_point=window.z0.double().flatten(),
    )
    (exact,) = torch.autograd.grad(loss.sum(), leaf)
    for form in ("naive", "ours"):
        pull = parts.coefficients(Config(form, (), "fp32", 0.01), window)
        # u is up to 20: its rounding, 20 eps, moves a slope of at most beta / 4 relatively by as much
        assert (pull.flatten() - exact).abs().max() <= parts.BETA / 4 * 40 * EPS


def test_the_naive_form_is_the_formula(window):
    """All four components, in fp64 and by differences of the loss itself."""

    def loss(logps):
        sign = torch.where(window.labels, 1.0, -1.0).double()
        u = sign * (0.1 * (logps - window.ref_logps.double()) - window.shift.double())
        v = torch.where(u >= 0, u.clamp(min=0) ** 0.88, -2.25 * (-u).clamp(min=0) ** 0.88)
        p = 1 / (1 + torch.exp(-v))
        w = p**0.61 / (p**0.61 + (1 - p) ** 0.61) ** (1 / 0.61)
        m = logps / window.lengths
        odds = m - torch.log(1 - torch.exp(m))
        return (1 - w) + 0.1 * torch.log(1 + torch.exp(-sign * odds))

    logps, step = window.logps.double(), 1e-4
    exact = (loss(logps + step) - loss(logps - step)) / (2 * step)
    pull = parts.coefficients(Config("naive", COMPONENTS, "fp32", 0.01), window)
    near = (0.1 * (window.logps - window.ref_logps) - window.shift).abs() > 0.01
    # Differences: step^2 / 6 times a third derivative; fp32: 1 - p loses up to e^|v| eps, |v| < 7 where it counts.
    usable = near & (exact.abs() > 1e-4)
    assert usable.sum() > 24
    assert ((pull - exact) / exact)[usable].abs().max() < 2e-3


@pytest.mark.parametrize(
    ("logp", "label", "why"),
    [(-1.0, True, "sigmoid rounds to 1 in bf16"), (-1000.0, True, "sigmoid rounds to 0")],
)
def test_the_naive_weighting_is_not_finite_at_the_ends_and_ours_is(logp, label, why):
    edge = parts.Window(
        logps=torch.full((1, 2), logp),
        ref_logps=torch.full((1, 2), -150.0 if logp == -1.0 else -1.0),
        labels=torch.full((1, 2), label),
        lengths=torch.full((1, 2), 40),
        z0=torch.zeros(1, 2),
        shift=torch.zeros(1, 2),
        gate=0.0,
    )
    on = ("value", "weighting")
    assert not parts.coefficients(Config("naive", on, "bf16", 0.01), edge).isfinite().any(), why
    cured = ("safe weighting",)
    assert parts.coefficients(Config("naive", on, "bf16", 0.01, cured), edge).isfinite().all()
    assert parts.coefficients(Config("ours", on, "bf16", 0.01), edge).isfinite().all()
    clipped = parts.coefficients(Config("naive", on, "bf16", 0.01, ("component clip",)), edge)
    assert torch.equal(clipped, torch.zeros(1, 2))


def test_each_seed_has_its_own_decision_weights(window):
    config = Config("ours", ("weighting",), "fp32", 0.01)
    together = parts.coefficients(config, window)
    one = parts.Window(
        *(getattr(window, name)[1:2] for name in ("logps", "ref_logps", "labels", "lengths")),
        *(getattr(window, name)[1:2] for name in ("z0", "shift")),
        window.gate,
    )
    # The mean of 16 weights may be summed in another order.
    alone = parts.coefficients(config, one)[0]
    assert (together[1] - alone).abs().max() <= 16 * EPS * alone.abs().max()


def test_changes_affect_the_gradient(window):
    for change in (*REMEDIES, *MISTAKES):
        config = Config("naive", COMPONENTS, "fp32", 0.01, (change,))
        same = torch.equal(
            parts.coefficients(config, window),
            parts.coefficients(Config("naive", COMPONENTS, "fp32", 0.01), window),
        )
        # These three change the shift or its gate, which the window already holds.
        assert same == (change in ("staging", "EMA window", "shift in nats")), change
    ours = parts.coefficients(Config("ours", COMPONENTS, "fp32", 0.01), window)
    for change in VARIANTS:
        pull = parts.coefficients(Config("ours", COMPONENTS, "fp32", 0.01, (change,)), window)
        assert torch.equal(pull, ours) == (change in ("no staging", "running mean")), change


def test_component_clip_bounds_both_parts(window):
    both = parts.coefficients(Config("naive", COMPONENTS, "fp32", 0.01), window)
    bound = parts.MAIN_BOUND + parts.ODDS_BOUND / window.lengths
    clipped = parts.coefficients(Config("naive", COMPONENTS, "fp32", 0.01, ("component clip",)), window)
    assert (both.abs() > bound).any() and (clipped.abs() <= bound * (1 + EPS)).all()


def test_shares_sum_to_one_over_the_active_components(window):
    for form in ("naive", "ours"):
        for on in ((), ("shift",), ("value", "odds"), COMPONENTS):
            shares = parts.shares(Config(form, on, "fp32", 0.01), window)
            assert tuple(shares) == parts.SHARES
            torch.testing.assert_close(sum(shares.values()), torch.ones(3), rtol=0, atol=len(parts.SHARES) * EPS)
            assert {name for name, share in shares.items() if share.any()} == {"kto", *on}


# ---------------------------------------------------------------- shifts


def test_the_running_shift_is_the_mean_of_all_rewards_seen():
    rng = torch.Generator().manual_seed(0)
    rewards, labels = torch.randn(5, 2, 16, generator=rng), torch.ones(2, 16, dtype=torch.bool)
    running, nats = Running(2), Running(2, unit=10.0)
    for step in range(5):
        got = running.next(rewards[step], labels)
        for pair in range(8):
            seen = torch.cat([rewards[: step + 1].transpose(0, 1).flatten(1)], 1)
            seen = seen[:, : 16 * step + 2 * pair + 2].double()
            # sums of up to 80 fp32 numbers of order 1
            assert (got[:, 2 * pair] - seen.mean(1)).abs().max() < 80 * EPS
            assert torch.equal(got[:, 2 * pair], got[:, 2 * pair + 1])
        assert (nats.next(rewards[step], labels) - 10 * got).abs().max() < 10 * 80 * EPS
    poison = rewards[0].clone()
    poison[0, 3] = torch.nan
    running.next(poison, labels)
    after = running.next(rewards[0], labels)
    assert after[0].isnan().all() and after[1].isfinite().all()


def test_our_shift_balances_the_classes():
    labels = torch.tensor([[True] * 3 + [False], [False] * 4])
    ema = EMA(2)
    shift = ema.next(torch.tensor([[2.0, 2.0, 2.0, -1.0], [1.0] * 4]), labels)
    assert shift[0].tolist() == pytest.approx([0.5] * 4)
    assert shift[1].tolist() == [0.0] * 4  # one class only: nothing to balance yet
    # (.9 x .1 x m1 + .1 x m2) / .19 in each class: (.18 + .9) / .19 and (-.09 + .9) / .19
    expected = ((0.18 + 0.9) / 0.19 + (-0.09 + 0.9) / 0.19) / 2
    assert ema.next(torch.full((2, 4), 9.0), labels)[0, 0].item() == pytest.approx(expected)


def test_the_gate_opens_after_three_tenths_and_is_open_at_four():
    def gates(config):
        schedule = schedule_of(config, 100)
        opened = []
        for step in range(100):
            schedule.update(step)
            opened.append(schedule.gate())
        return [opened[step] for step in (0, 30, 35, 40, 99)]

    assert gates(Config("ours", COMPONENTS, "fp32", 0.01)) == pytest.approx([0, 0, 0.5, 1, 1])
    assert gates(Config("ours", COMPONENTS, "fp32", 0.01, ("no staging",))) == [1] * 5
    assert gates(Config("naive", COMPONENTS, "fp32", 0.01)) == [1] * 5
    staged = gates(Config("naive", COMPONENTS, "fp32", 0.01, ("staging",)))
    assert staged == pytest.approx([0, 0, 0.5, 1, 1])
    assert schedule_of(Config("ours", ("value",), "fp32", 0.01), 100) is None


# ---------------------------------------------------------------- verdicts and runs

RISING = [0.01 * step for step in range(100)]


@pytest.mark.parametrize(
    ("norms", "margins", "failed_at", "expected"),
    [
        ([1.0] * 100, RISING, None, ("stable", None)),
        ([1.0] * 40, RISING[:40], 40, ("not finite", 40)),
        ([], [], 0, ("not finite", 0)),
        ([1.0] * 60 + [20.5] + [1.0] * 39, RISING, None, ("spike", 60)),
        ([1.0] * 60 + [19.5] + [1.0] * 39, RISING, None, ("stable", None)),
        ([30.0] + [1.0] * 99, RISING, None, ("stable", None)),  # a first step is not judged
        ([1.0] * 100, [-value for value in RISING], None, ("collapse", 99)),
        ([1.0] * 100, RISING[:70] + [0.1] * 30, None, ("collapse", 99)),
        ([1.0] * 100, RISING[:70] + [0.2] * 30, None, ("stable", None)),
    ],
)
def test_verdict(norms, margins, failed_at, expected):
    assert judge(norms, margins, failed_at)[:2] == expected


def test_the_running_median_forgets():
    # 20 is a spike above what came just before, though the run began with norms of 100
    norms = [100.0] * FIRST_JUDGED + [0.5] * 60 + [20.0] + [0.5] * 19
    assert judge(norms, RISING, None)[:2] == ("spike", FIRST_JUDGED + 60)


def test_a_run_is_independent_of_the_other_seeds(base):
    reference = make_reference(base, pairs=60, held_out=10)
    config = Config("naive", COMPONENTS, "bf16", 0.02)
    together = run_cell(reference, config, [0, 1, 2], 3).rows
    alone = [row for seed in (0, 1, 2) for row in run_cell(reference, config, [seed], 3).rows]
    for one, other in zip(together, alone, strict=True):
        numbers = ("ratio", "accuracy", "margin")
        assert {k: v for k, v in one.items() if k not in numbers} == {
            k: v for k, v in other.items() if k not in numbers
        }
        # After three steps the matrices' other order of sums has moved no margin by a thousandth of a reward.
        assert one["margin"] == pytest.approx(other["margin"], abs=1e-3)
    assert len({row["margin"] for row in together}) == 3


def test_plans():
    quick, full = quick_plan(), full_plan()
    assert set(quick.cells) >= quick.traced and set(full.cells) >= full.traced
    defaults = [
        seeds
        for config, seeds in full.cells.items()
        if config == Config("ours", COMPONENTS, "fp32", config.learning_rate)
    ]
    assert sum(defaults) >= 200
    plain = {(c.form, c.components, c.precision) for c in full.cells if not c.changes}
    assert len(plain) == 2 * 16 * 2  # every subset, both forms, both precisions
    assert set(full_plan(3).cells.values()) == {3}
    for config in full.cells:
        assert Config.of(config.fields()) == config
    assert remedies_of(("value", "shift"))[-1] == (
        "staging",
        "component clip",
        "EMA window",
        "bounded value",
        "bounded shift",
    )
