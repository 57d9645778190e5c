"""One batch for the classes with Liger's names, and how far two of them may differ."""

import torch

B, L, H, V = 6, 7, 16, 33
CONTRACT = 1e-5


class Batch:
    """Operands with gradients, a reference model and padded targets; a fresh copy for each class that is called."""

    def __init__(self, bias: bool = True, frozen: bool = False):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        self.input = randn(B, L, H).requires_grad_()
        self.weight = randn(V, H).requires_grad_(not frozen)
        self.bias = randn(V).requires_grad_(not frozen) if bias else None
        self.ref_input, self.ref_weight = randn(B, L, H), randn(V, H)
        self.ref_bias = randn(V) if bias else None
        self.target = torch.randint(V, (B, L), generator=generator)
        for row in range(B):
            self.target[row, :row] = -100  # the prompt
        self.target[1, 5:] = -100  # padding
        self.labels = torch.tensor([True, False, False, True, True, False])

    def reference(self) -> dict:
        return {
            "ref_input": self.ref_input,
            "ref_weight": self.ref_weight,
            "ref_bias": self.ref_bias,
        }

    def gradients(self) -> dict:
        operands = {"input": self.input, "weight": self.weight, "bias": self.bias}
        return {k: v.grad for k, v in operands.items() if v is not None and v.requires_grad}


def assert_agree(mine: torch.Tensor, other: torch.Tensor, what: str) -> None:
    assert mine.shape == other.shape and mine.dtype == other.dtype, what
    allowed = CONTRACT * other.detach().abs().max().clamp(min=1e-3)
    assert (mine - other).abs().max() <= allowed, f"{what}: {mine} {other}"
