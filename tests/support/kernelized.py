"""Models with a layer that a kernel of Hugging Face ``kernels`` replaces."""

from pathlib import Path

import kernels
import torch
from torch import nn

import prefopt_kernels

MODES = {
    "TRAINING": kernels.Mode.TRAINING,
    "INFERENCE": kernels.Mode.INFERENCE,
    "TRAINING | TORCH_COMPILE": kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE,
}


@kernels.use_kernel_forward_from_hub("LinearLogprob")
class LinearLogprob(nn.Module):
    calls = 0

    def forward(self, hidden, weight, targets):
        LinearLogprob.calls += 1
        logp = (hidden @ weight.T).log_softmax(-1)
        return logp.gather(-1, targets[:, None])[:, 0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(16, 50, bias=False)
        self.score = LinearLogprob()

    def forward(self, hidden, targets):
        return self.score(hidden, self.head.weight, targets)


def run(mode: str, folder: Path) -> dict[str, list]:
    """Scores and gradients of the replaced layer, of the layer itself, and of the installed package."""
    hidden, targets = torch.randn(9, 16), torch.arange(9)
    plain, model = Model(), Model()
    expected = plain(hidden, targets)
    expected.sum().backward()
    repository = kernels.LocalLayerRepository(folder, layer_name="LinearLogprob")
    with kernels.use_kernel_mapping({"LinearLogprob": {"cpu": repository}}):
        model = kernels.kernelize(model, mode=MODES[mode], device="cpu", use_fallback=False)
    LinearLogprob.calls = 0
    if kernels.Mode.TORCH_COMPILE in MODES[mode]:
        model = torch.compile(model, backend="eager", fullgraph=True)
    found = model(hidden, targets)
    found.sum().backward()
    installed = prefopt_kernels.linear_logprob(hidden, plain.head.weight, targets, backend="reference").logp
    tensors = {
        "found": found,
        "expected": expected,
        "installed": installed,
        "gradient": next(model.parameters()).grad,
        "expected gradient": plain.head.weight.grad,
    }
    return {name: tensor.tolist() for name, tensor in tensors.items()} | {"calls": LinearLogprob.calls}
