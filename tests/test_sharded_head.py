"""Heads that are DTensors on four gloo processes against plain heads on one."""

import pytest
import torch

from support import sharded_head_ranks as ranks
from support.gloo_ranks import run_ranks

TOLERANCE = 1e-5  # the stated contract in fp32: nats, and a part of a gradient's norm


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    return run_ranks(ranks.everything, tmp_path_factory.mktemp("ranks"), ranks.WORLD)


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


def mean_of(name: str, steps: dict) -> torch.Tensor:
    return torch.stack([step[name] for step in steps.values()]).mean(0)


@pytest.mark.parametrize("layout", ranks.LAYOUTS)
def test_loss_and_gradients_equal_one_process(layout, processes):
    """Each rank has the loss of its batch; gradients are averaged over the batches."""
    found = [process["layouts"][layout] for process in processes]
    head = {name: ranks.parameters()[name] for name in ("weight", "bias")}
    steps = {which: ranks.step(ranks.batch(which), **head) for which, _ in found}
    assert len(steps) == {"data": 4, "data, copies": 4, "vocabulary": 1}.get(layout, len(steps))
    for which, ours in found:
        for name in ("loss", "entropy", "hidden"):
            assert error(ours[name], steps[which][name].detach()) < TOLERANCE, name
        for name in ("weight", "bias"):
            assert error(ours[name], mean_of(name, steps)) < TOLERANCE, name


def test_full_tensor_without_grad_placements_is_wrong(processes):
    """Without grad_placements torch assumes equal gradients on all ranks."""
    head = {name: ranks.parameters()[name] for name in ("weight", "bias")}
    steps = {rank: ranks.step(ranks.batch(rank), **head) for rank in range(ranks.WORLD)}
    for process in processes:
        _, ours = process["layouts"]["torch's default"]
        assert error(ours["weight"], mean_of("weight", steps)) > 0.1


def test_a_replicated_adapter_with_a_sharded_head(processes):
    for process in processes:
        for name, grad in process["adapter"]["ours"].items():
            assert error(grad, process["adapter"]["expected"][name]) < TOLERANCE, name


def test_fp32_head_with_bf16_hidden_states(processes):
    from prefopt_kernels import linear_logprob

    inputs = ranks.batch(0)
    weight = ranks.parameters()["weight"].bfloat16().requires_grad_()
    linear_logprob(inputs["hidden"].bfloat16(), weight, inputs["targets"]).logp.sum().backward()
    for process in processes:
        assert process["half"]["used"] == torch.bfloat16
        # every rank has the same gradient in bf16, and the mean over four of it is exact
        assert torch.equal(process["half"]["grad"], weight.grad.float())


def test_unsupported_meshes_are_refused(processes):
    expected = {
        "no names": "the head is a DTensor on a mesh without dimension names, so tensor and data",
        "another name": "the head is a DTensor over mesh dimension 'cp'; expected one of ('tp',",
        "two": "the head is sharded over 2 tensor-parallel mesh dimensions; expected one",
        "chunked": "scheme 'chunked' cannot run this call: the head's rows are sharded over",
        "sequence": "hidden is a DTensor with placements (Shard(dim=0),); expected Replicate()",
        "partial": "hidden is a DTensor with placements (Partial(sum),); expected Replicate()",
    }
    for process in processes:
        for name, sentence in expected.items():
            assert process["refusals"][name].startswith(sentence), name
        assert torch.equal(process["refusals"]["whole"], ranks.batch(0)["hidden"])
