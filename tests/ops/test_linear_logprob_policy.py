"""The tolerance policy of linear_logprob must be able to fail: it must find each planted bug."""

from dataclasses import replace

import pytest
import torch

from prefopt_kernels.ops import _extension, _sources
from support.linear_logprob import (
    DIFFERENTIABLE,
    DTYPES,
    Results,
    backends,
    baseline,
    check,
    exact,
    formula,
    problem,
)
from support.numerics import FAMILIES, assert_as_good_as_torch

T, H, V, TILE = 40, 65, 3001, 128


def sample(family="normal", dtype=torch.bfloat16, **options):
    """A problem with targets on both sides of tile edges, and none at the last column."""
    made = problem(family, T, H, V, dtype=dtype, ignored=0.1, **options)
    targets = made.targets.clone()
    targets[:4] = torch.tensor([TILE - 1, TILE, 2 * TILE, 2 * TILE + 1])
    targets[targets == V - 1] = 0
    return replace(made, targets=targets)


def with_outputs(problem, **changed) -> Results:
    right = baseline(problem)
    return replace(right, outputs=right.outputs._replace(**changed))


def with_grads(problem, **changed) -> Results:
    right = baseline(problem)
    return replace(right, grads={**right.grads, **changed})


def fp32(problem):
    return {name: x.to(torch.float32, copy=True) for name, x in problem.operands.items()}


def last_column_lost(problem):
    x = fp32(problem)
    outputs, _ = formula(x["hidden"], x["weight"][:-1], problem.targets)
    return with_outputs(problem, logp=outputs.logp)


def off_by_one_at_a_tile_edge(problem):
    targets = problem.targets - (problem.targets == TILE).long()
    return with_outputs(problem, logp=formula(**fp32(problem), targets=targets)[0].logp)


def row_unwritten(problem):
    logp = baseline(problem).outputs.logp.clone()
    logp[5 if problem.targets[5] >= 0 else 6] = 0
    return with_outputs(problem, logp=logp)


def row_left_as_allocated(problem):
    lse = baseline(problem).outputs.lse.clone()
    lse[-1] = torch.nan
    return with_outputs(problem, lse=lse)


def row_that_does_not_count_written(problem):
    lse = baseline(problem).outputs.lse
    return with_outputs(problem, lse=torch.where(problem.targets < 0, 1e-30, lse))


def logits_rounded_to_bf16(problem):
    _, z = formula(**fp32(problem), targets=problem.targets)
    z = z.bfloat16().float()
    rows = torch.arange(T), problem.targets.clamp(min=0)
    logp = torch.where(problem.targets >= 0, z[rows] - z.logsumexp(1), 0)
    return with_outputs(problem, logp=logp)


def logits_rounded_to_fp16(problem):
    _, z = formula(**fp32(problem), targets=problem.targets)
    lse = torch.where(problem.targets >= 0, z.half().float().logsumexp(1), 0)
    return with_outputs(problem, lse=lse)


def ties_are_not_top(problem):
    _, z = formula(**fp32(problem), targets=problem.targets)
    above = z >= z[torch.arange(T), problem.targets.clamp(min=0), None]  # counts the target itself
    is_top1 = (above.sum(1) == 1) & (problem.targets >= 0)
    return with_outputs(problem, is_top1=is_top1)


OUTPUT_BUGS = [
    last_column_lost,
    off_by_one_at_a_tile_edge,
    row_unwritten,
    row_left_as_allocated,
    row_that_does_not_count_written,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["normal", "grid"])
@pytest.mark.parametrize("bug", OUTPUT_BUGS)
def test_a_planted_bug_in_the_outputs_is_found(bug, family, dtype):
    made = sample(family, dtype)
    check(made, baseline(made))
    with pytest.raises(AssertionError):
        check(made, bug(made))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", [logits_rounded_to_bf16, logits_rounded_to_fp16])
def test_rounded_logits_are_found(bug, dtype):
    made = sample("normal", dtype)
    with pytest.raises(AssertionError):
        check(made, bug(made))


def test_a_tie_taken_for_a_loss_is_found():
    made = problem("grid", 40, 2, 30, ignored=0.1)
    rows = exact(made).outputs.is_top1
    assert rows.any(), "the problem has no target at the top"
    with pytest.raises(AssertionError, match="is_top1"):
        check(made, ties_are_not_top(made))


def slope_forgotten(problem):
    x = {name: operand.requires_grad_() for name, operand in fp32(problem).items()}
    _, z = formula(**x, targets=problem.targets, **problem.transform)
    softcap, temperature = problem.transform["softcap"], problem.transform.get("temperature", 1.0)
    slope = 1 - (z.detach() * temperature / softcap).square()
    z.register_hook(lambda dz: dz / slope)  # autograd multiplies by it afterwards
    z.retain_grad()
    rows = torch.arange(T), problem.targets.clamp(min=0)
    logp = torch.where(problem.targets >= 0, z[rows] - z.logsumexp(1), 0)
    (logp * problem.upstream["logp"]).sum().backward()
    return Results(baseline(problem).outputs, {"hidden": x["hidden"].grad.to(problem.hidden.dtype)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_forgotten_slope_is_found(dtype):
    made = sample("normal", dtype, transform="all")
    with pytest.raises(AssertionError, match="hidden"):
        check(made, slope_forgotten(made))


def wrong_upstream_row(problem):
    grad = baseline(problem).grads["hidden"]
    return with_grads(problem, hidden=grad.roll(1, 0))


def target_subtracted_after_rounding(problem):
    """softmax(z) W kept in the operands' dtype, W[target] subtracted later: 86 % wrong where p is above 0.99."""
    x = fp32(problem)
    _, z = formula(**x, targets=problem.targets)
    product = (z.softmax(1) @ x["weight"]).to(problem.hidden.dtype).float()
    unit = x["weight"][problem.targets.clamp(min=0)] - product
    grad = torch.where(problem.targets >= 0, problem.upstream["logp"], 0)[:, None] * unit
    return with_grads(problem, hidden=grad.to(problem.hidden.dtype))


def tile_of_the_head_lost(problem):
    grad = baseline(problem).grads["weight"].clone()
    grad[TILE : 2 * TILE] = 0
    return with_grads(problem, weight=grad)


def token_lost_in_the_head(problem):
    lost = int((problem.targets >= 0).nonzero()[-1])
    upstream = {"logp": torch.where(torch.arange(T) == lost, 0, problem.upstream["logp"])}
    return with_grads(problem, weight=baseline(replace(problem, upstream=upstream)).grads["weight"])


def bias_without_the_target(problem):
    grad = baseline(problem).grads["bias"].float()
    rows = problem.targets >= 0
    hit = torch.zeros(V).index_add(0, problem.targets[rows], problem.upstream["logp"][rows])
    return with_grads(problem, bias=(grad - hit).to(problem.hidden.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["normal", "grid"])
@pytest.mark.parametrize(
    "bug",
    [wrong_upstream_row, tile_of_the_head_lost, token_lost_in_the_head, bias_without_the_target],
)
def test_a_planted_bug_in_the_gradients_is_found(bug, family, dtype):
    made = sample(family, dtype, bias=True)
    check(made, baseline(made))
    with pytest.raises(AssertionError):
        check(made, bug(made))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_late_subtraction_is_found_on_confident_targets(dtype):
    made = problem("peak", T, H, V, dtype=dtype, ignored=0.1)
    with pytest.raises(AssertionError, match="hidden"):
        check(made, target_subtracted_after_rounding(made))


@pytest.mark.parametrize("seed", range(4))
def test_the_families_are_what_they_say(seed):
    made = {name: problem(name, T, H, V, ignored=0, seed=seed) for name in FAMILIES}
    assert exact(made["peak"]).outputs.logp.exp().min() > 0.99
    for operand in (made["grid"].hidden, made["grid"].weight):
        assert torch.equal(operand, operand.bfloat16().float())
    z = made["grid"].hidden @ made["grid"].weight.T
    assert torch.equal(z, z.bfloat16().float()), "the logits of the grid are exact in bf16"
    z = made["extreme"].hidden @ made["extreme"].weight.T
    assert z.abs().max() > 2e4 and z.std() > 8e3
    rows = made["extreme"]
    assert (exact(rows).outputs.is_top1).float().mean() >= 0.5


def test_a_result_that_is_not_a_number_fails():
    exact = torch.zeros(3, dtype=torch.float64)
    for bad in (torch.nan, torch.inf, -torch.inf):
        ours = torch.tensor([0.0, bad, 0.0])
        with pytest.raises(AssertionError, match="1 places"):
            assert_as_good_as_torch("value", ours, ours, exact)


@pytest.mark.parametrize("through", DIFFERENTIABLE)
def test_gradients_of_the_truth_agree_with_finite_differences(through):
    """The truth is autograd's in fp64; here its derivatives are compared with differences of its own values."""
    made = problem("normal", 3, 4, 7, bias=True, through=(through,), transform="all", ignored=0)

    def total(hidden, weight, bias):
        outputs, _ = formula(hidden, weight, made.targets, bias, **made.transform)
        return getattr(outputs, through)

    operands = tuple(operand.double().requires_grad_() for operand in made.operands.values())
    assert torch.autograd.gradcheck(total, operands)


def test_memory_comes_poisoned():
    """A row that nobody wrote is seen as NaN, in every test of this folder."""
    assert torch.empty(64).isnan().all()


def test_the_kernels_are_among_what_is_tested():
    """Where they can be built, a build that fails is a failure, and not a shorter list of backends."""
    asked_away = _sources.build_choice() == "none"
    if not asked_away and _sources.why_not_compile() is None:
        assert _extension.why_not() is None
        assert "cpu/generic" in backends()
