"""The benchmark of the loss alone: a row for each way and shape, and none kept from too few rounds."""

import pytest
import torch

from benchmarks import losses


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_row_for_each_method_shape_and_way(monkeypatch, capsys):
    monkeypatch.setattr(losses, "CALLS", 1)
    monkeypatch.setattr(losses, "keep", lambda *_: pytest.fail("kept"))
    losses.main(["--rounds", "2", "--threads", "1"])
    printed = [line for line in capsys.readouterr().out.splitlines() if " us, " in line]
    assert len(printed) == len(losses.METHODS) * len(losses.SHAPES) * 2
    assert printed[0].startswith("kto 4 x 128 plain: ") and printed[0].endswith(" us, 1.00")


@pytest.mark.parametrize("method", losses.METHODS)
def test_both_ways_compute_the_same(method, monkeypatch):
    monkeypatch.setattr(losses, "CALLS", 1)
    found = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: found.append(loss.item()) or backward(loss))
    for fused in (True, False):
        losses.step(method, 4, 32, fused)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
