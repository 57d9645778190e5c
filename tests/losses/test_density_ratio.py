"""DensityRatio against Newton's method, the ratio it is to recover, its clip and its state."""

import pytest
import torch
from torch import tensor

from prefopt_kernels.losses import DensityRatio


def embeddings(seed=0, n=40, m=120):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 3, generator=generator) + tensor([1.0, 0.0, -0.5]),
        torch.randn(m, 3, generator=generator),
    )


def newton(desirable, undesirable, C):
    """The same objective, minimised by twenty steps of Newton's method with the Hessian written out."""
    rows = torch.cat([desirable, undesirable]).double()
    n, m = len(desirable), len(undesirable)
    rows = torch.cat([rows, torch.ones(n + m, 1, dtype=torch.float64)], dim=1)
    y = tensor([1.0] * n + [0.0] * m, dtype=torch.float64)
    share = C * (n + m) / 2 * (y / n + (1 - y) / m)
    penalty = torch.ones(rows.shape[1], dtype=torch.float64)
    penalty[-1] = 0
    solution = torch.zeros_like(penalty)
    for _ in range(20):
        p = 1 / (1 + torch.exp(-rows @ solution))
        gradient = rows.T @ (share * (p - y)) + penalty * solution
        hessian = rows.T @ (rows * (share * p * (1 - p))[:, None]) + torch.diag(penalty)
        solution = solution - torch.linalg.solve(hessian, gradient)
    return solution


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_finds_the_minimum(C):
    rows = embeddings()
    ratio = DensityRatio(C=C)
    ratio.fit(*rows)
    exact = newton(*rows, C)
    found = torch.cat([ratio.weight, ratio.bias[None]])
    # the solver stops at a gradient of 1e-8, and the objective's curvature is above 0.1
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


def test_recovers_the_ratio_of_two_normal_densities():
    # log N(x; 1, 1) / N(x; 0, 1) = x - 1/2; classes of different size must not move it
    generator = torch.Generator().manual_seed(1)
    desirable = torch.randn(4000, 1, generator=generator) + 1
    undesirable = torch.randn(12_000, 1, generator=generator)
    ratio = DensityRatio(C=10.0)
    ratio.fit(desirable, undesirable)
    # standard errors are near 1 / sqrt(4000 / 4) = .03; four of them
    assert ratio.weight.item() == pytest.approx(1.0, abs=0.13)
    assert ratio.bias.item() == pytest.approx(-0.5, abs=0.13)


def test_weights_are_one_where_desirable_and_clipped_elsewhere():
    ratio = DensityRatio(clip=(0.5, 10.0))
    ratio.load_state_dict({"weight": tensor([1.0]), "bias": tensor(0.0)})
    rows = tensor([[1e6], [-1e6], [0.5], [1e6]]).bfloat16()
    weights = ratio.weights(rows, tensor([False, False, False, True]))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, tensor([10.0, 0.5, 1.6487213, 1.0]))


def test_state_survives_a_checkpoint(tmp_path):
    ratio = DensityRatio()
    assert ratio.state_dict() == {}
    ratio.fit(*embeddings())
    torch.save(ratio.state_dict(), tmp_path / "ratio.pt")
    restored = DensityRatio()
    restored.load_state_dict(torch.load(tmp_path / "ratio.pt", weights_only=True))
    rows, labels = embeddings(1)[0], torch.zeros(40, dtype=torch.bool)
    assert torch.equal(restored.weights(rows, labels), ratio.weights(rows, labels))
    restored.load_state_dict({})
    with pytest.raises(RuntimeError, match="^DensityRatio has no fit; call fit or load_state_dict"):
        restored.weights(rows, labels)


def test_fits_inside_no_grad():
    ratio = DensityRatio()
    with torch.no_grad():
        ratio.fit(*embeddings())
    assert ratio.weight.abs().sum() > 0 and not ratio.weight.requires_grad


def test_bad_arguments_are_named():
    good, fitted = torch.ones(2, 3), DensityRatio()
    fitted.fit(good, -good)
    with pytest.raises(ValueError, match=r"^clip is \(2, 1\); expected \(low, high\)"):
        DensityRatio(clip=(2, 1))
    with pytest.raises(ValueError, match="^C is 0; expected a finite number above 0"):
        DensityRatio(C=0)
    with pytest.raises(ValueError, match="^desirable has no rows"):
        fitted.fit(good[:0], good)
    with pytest.raises(ValueError, match="^undesirable has 2 columns; expected 3, as desirable"):
        fitted.fit(good, good[:, :2])
    with pytest.raises(ValueError, match="^undesirable has values that are not finite"):
        fitted.fit(good, good / 0)
    with pytest.raises(TypeError, match="^desirable has dtype torch.int64; expected floating"):
        fitted.fit(good.long(), good)
    with pytest.raises(ValueError, match=r"^embeddings has shape \(3,\); expected \(n, D\)"):
        fitted.weights(good[0], tensor([True]))
    with pytest.raises(ValueError, match="^embeddings has 2 columns; expected 3"):
        fitted.weights(good[:, :2], tensor([True, False]))
    with pytest.raises(ValueError, match=r"^labels has shape \(1,\); expected \(2,\)"):
        fitted.weights(good, tensor([True]))
    with pytest.raises(ValueError, match=r"^state has the keys \['weight'\]; expected"):
        fitted.load_state_dict({"weight": good[0]})
