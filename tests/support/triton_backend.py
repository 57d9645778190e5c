"""Where the Triton kernels are tested: on the GPU if there is one, else in Triton's interpreter on the CPU.

The interpreter multiplies bf16 wrongly, so bf16 is for GPUs. Nothing here needs more than torch, triton and pytest.
"""

from dataclasses import replace

import torch

from prefopt_kernels import TokenLogprobs, linear_logprob
from prefopt_kernels.ops.linear_logprob.checks import OUTPUTS
from support.linear_logprob import Problem, Results, ours

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


def there(value):
    """Tensors, and what holds them, on DEVICE."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {name: there(entry) for name, entry in value.items()}
    return value


def triton_results(
    made: Problem, wanted: tuple[str, ...] = (), outputs: tuple[str, ...] = OUTPUTS, **options
) -> Results:
    """``ours`` by the triton backend on DEVICE, brought back to the CPU to be judged."""
    moved = replace(made, **{name: there(value) for name, value in vars(made).items()})
    results = ours(
        moved,
        wanted,
        "triton",
        outputs,
        call=lambda **arguments: linear_logprob(**arguments, **options),
    )
    values = (None if value is None else value.cpu() for value in results.outputs)
    grads = {name: grad.cpu() for name, grad in results.grads.items()}
    return Results(TokenLogprobs(*values), grads)
