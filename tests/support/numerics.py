"""The tolerance policy of the tests and the families of inputs; docs/numerics.md says why."""

import torch
from torch import Tensor

NORMS = {
    "max": lambda error: error.abs().amax(),  # one bad entry
    "rms": lambda error: error.square().mean().sqrt(),  # drift
}


def assert_as_good_as_torch(
    name: str,
    ours: Tensor,
    baseline: Tensor,
    exact: Tensor,
    factor: float = 2.0,
    terms: Tensor | None = None,
) -> None:
    """Against fp64, ``ours`` may err ``factor`` times as much as ``baseline``, plus a few roundings.

    ``baseline`` is what plain torch makes of the same inputs. The roundings keep a baseline that is right by luck from
    being the yardstick: 2 eps of the dtype of ``ours`` times the norm of ``exact``, for the result and what it is made
    of; and where ``terms`` (the sum of the absolute values of the terms that ``exact`` is the sum of) is given, 2 eps
    of fp32 times its norm, because a sum that cancels keeps the rounding of its terms.
    """
    assert exact.dtype == torch.float64, f"{name}: exact is {exact.dtype}"
    assert ours.shape == baseline.shape == exact.shape, f"{name}: {ours.shape}, {exact.shape}"
    assert ours.isfinite().all(), f"{name} is not finite in {(~ours.isfinite()).sum()} places"
    if not exact.numel():
        return
    for norm, reduce in NORMS.items():
        error = reduce(ours.double() - exact).item()
        allowed = reduce(baseline.double() - exact).item()
        floor = 2 * torch.finfo(ours.dtype).eps * reduce(exact).item()
        if terms is not None:
            floor += 2 * torch.finfo(torch.float32).eps * reduce(terms).item()
        assert error <= factor * allowed + floor, (
            f"{name}, {norm} of the error: {error:.2e} > {factor} * {allowed:.2e} + {floor:.1e}"
        )


def normal(T: int, H: int, V: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (T, H), a head (V, H) and targets (T,), with logits of standard deviation 3."""
    hidden = torch.randn(T, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * (3 / max(1, H) ** 0.5)
    return hidden, weight, torch.randint(0, V, (T,), generator=generator)


def grid(T: int, H: int, V: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Products, sums and logits that are exact in bf16 (for H up to 256): both sides must be right to fp32."""
    hidden = torch.randint(-1, 2, (T, H), generator=generator).float()
    weight = torch.randint(-1, 2, (V, H), generator=generator) / 8
    return hidden, weight, torch.randint(0, V, (T,), generator=generator)


def peak(T: int, H: int, V: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states along the target's row of the head: p(target) is above 0.99 for H of 64 and more."""
    weight = torch.nn.functional.normalize(torch.randn(V, H, generator=generator), dim=1)
    targets = torch.randint(0, V, (T,), generator=generator)
    strength = 15 + 8 * torch.rand(T, 1, generator=generator)
    return strength * weight[targets], weight, targets


def extreme(T: int, H: int, V: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of size 1e4; in every second row the target is the largest, so logp is a difference of two such."""
    hidden, weight, targets = normal(T, H, V, generator)
    hidden, weight = 60 * hidden, 60 * weight
    targets[::2] = (hidden @ weight.T).argmax(1)[::2]
    return hidden, weight, targets


FAMILIES = {"normal": normal, "grid": grid, "peak": peak, "extreme": extreme}
