"""vocab_parallel_linear_logprob on two gloo processes against fp64 on one, and its collectives."""

import pytest
import torch
import torch.distributed as dist

from prefopt_kernels import TokenLogprobs, linear_logprob, vocab_parallel_linear_logprob
from prefopt_kernels.ops.linear_logprob import reference as backend_reference
from support import vocab_parallel_ranks as ranks
from support.gloo_ranks import run_ranks
from support.linear_logprob import Results, check, problem


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[tuple[dict, tuple, dict]]:
    """For each rank: error messages, compiled results, results."""
    return run_ranks(ranks.everything, tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def both(processes) -> list[dict]:
    return [results for *_, results in processes]


def together(name: str, both: list[dict]) -> Results:
    """One result of both ranks: replicated values are bitwise equal, and gradients of the shards are joined."""
    (outputs, grads, _), (others, others_grads, _) = (results[name] for results in both)
    for mine, other in zip(outputs, others, strict=True):
        assert mine is other is None or torch.equal(mine, other)
    whole = {}
    for operand, grad in grads.items():
        if operand in ("hidden", "A"):
            assert torch.equal(grad, others_grads[operand]), operand
            whole[operand] = grad
        else:  # each rank has a gradient for its rows, and zeros for the others'
            assert not (grad.bool() & others_grads[operand].bool()).any(), operand
            whole[operand] = grad + others_grads[operand]
    return Results(TokenLogprobs(*outputs), whole)


@pytest.mark.parametrize("name", ranks.CASES)
def test_values_and_gradients_equal_the_whole_head(name, both):
    check(ranks.CASES[name][0], together(name, both))


def test_log_probabilities_are_within_1e_5(both):
    for name, (made, *_) in ranks.CASES.items():
        if name.startswith(("normal", "peak")):
            whole = linear_logprob(made.hidden, made.weight, made.targets, made.bias)
            logp = together(name, both).outputs.logp
            torch.testing.assert_close(logp, whole.logp, rtol=0, atol=1e-5)


def test_two_all_reduces_forward_and_one_backward(both):
    T, H = 17, 65
    for rank in range(2):
        calls = both[rank]["normal, even, auto"][2]
        maximum = ((T,), torch.float32, "RedOpType.MAX")
        sums = ((6, T), torch.float64, "RedOpType.SUM")  # entropy one row, mean_logit two
        assert calls == [maximum, sums, ((T, H), torch.float32, "RedOpType.SUM")]
        # as many where one rank has no rows, or no token counts
        assert len(both[rank]["first empty"][2]) == len(both[rank]["no token counts"][2]) == 3
        # in the dtype of hidden
        half = both[rank][f"{torch.bfloat16}, ('hidden',)"][2]
        assert half[2] == ((T, H), torch.bfloat16, "RedOpType.SUM")
        # a trained adapter has its gradient summed too, and without a gradient of hidden there is nothing else
        rank_of_adapter = (5, H)
        assert [call[0] for call in both[rank]["adapter"][2][2:]] == [(T, H), rank_of_adapter]
        assert [call[0] for call in both[rank]["adapter alone"][2][2:]] == [rank_of_adapter]


def test_a_planted_bug_is_found(both):
    """A rank that uses its own log-sum-exp for the group; a head trained on one rank only."""
    name = "normal, even, auto"
    made, (_, grads, _) = ranks.CASES[name][0], both[0][name]
    half = linear_logprob(made.hidden, made.weight[:150], made.targets.clamp(max=149))
    good = together(name, both)
    with pytest.raises(AssertionError, match="lse, max of the error"):
        check(made, Results(good.outputs._replace(lse=half.lse * (made.targets >= 0)), {}))
    with pytest.raises(AssertionError, match="weight, max of the error"):
        check(made, Results(good.outputs, {"weight": grads["weight"]}))


def test_errors_are_raised_on_every_rank(processes):
    expected = {
        "no shard": "ValueError: targets[3] is in the shards of 0 ranks; expected one",
        "two shards": "is in the shards of ",
        "is_top1": "ValueError: outputs has 'is_top1', which needs the largest logit",
        "start": "ValueError: vocab_start is -1; expected the id of the first row",
        "bias": "ValueError: bias_shard has shape (300,); expected (150,)",
        "weight": "ValueError: weight_shard has shape (65,); expected (V_r, H)",
        "dtype": "TypeError: weight has dtype torch.float64; expected that of hidden",
        "hidden": "TypeError: hidden is a list; expected a plain tensor",
        "mesh": "ValueError: group is a DeviceMesh of 2 dimensions; expected the one that shards",
    }
    made = problem(ignored=0.0)
    whole = linear_logprob(made.hidden, made.weight, made.targets).logp
    for found, *_ in processes:
        for name, sentence in expected.items():
            assert sentence in found[name], name
        for name in ("alone", "mesh of one dimension"):
            torch.testing.assert_close(found[name], whole, rtol=0, atol=1e-5)


def test_compiles_without_a_graph_break(processes):
    for _, ((outputs, grads), (traced, traced_grads)), _ in processes:
        for one, other in zip(outputs, traced, strict=True):
            assert one is other is None or torch.equal(one, other)
        assert all(torch.equal(grads[name], traced_grads[name]) for name in grads)


def test_a_frozen_head_costs_no_unit_gradient(monkeypatch):
    """The op's unit gradient d logp / d hidden is useless for a shard and must not be computed."""
    wanted, forward = [], backend_reference.forward

    def spy(operands, transform, want, grad_filter):
        wanted.append(set(want))
        return forward(operands, transform, want, grad_filter)

    monkeypatch.setattr(backend_reference, "forward", spy)
    made = problem()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        hidden = made.hidden.clone().requires_grad_()
        arguments = (hidden, made.weight, made.targets)
        vocab_parallel_linear_logprob(*arguments, vocab_start=0, backend="reference")
        linear_logprob(*arguments, backend="reference")
    finally:
        dist.destroy_process_group()
    assert wanted == [{"logp", "lse"}, {"logp", "lse", "unit"}]


def test_missing_process_group():
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="expected init_process_group before sharded heads"):
        vocab_parallel_linear_logprob(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), vocab_start=0)
