"""Computations on two gloo processes for the tests of vocab_parallel_linear_logprob."""

import torch
import torch.distributed as dist

from support.linear_logprob import (
    DIFFERENTIABLE,
    LORA_OPERANDS,
    OPERANDS,
    Problem,
    adapted,
    ours,
    problem,
)

V = 300
SPLITS = {
    "even": [0, 150, V],
    "uneven": [0, 7, V],
    "first empty": [0, 0, V],
    "last empty": [0, V, V],
}
OUTPUTS = ("entropy", "mean_logit")
TRANSFORMS = ("plain", "negative", "softcap", "all")

# name: problem, split, operands with a gradient, backend
CASES: dict[str, tuple[Problem, str, tuple[str, ...], str]] = {
    f"{family}, {split}, {backend}": (
        problem(family, bias=True, through=DIFFERENTIABLE),
        split,
        OPERANDS,
        backend,
    )
    for family in ("normal", "grid", "peak", "extreme")
    for split, backend in (("even", "auto"), ("uneven", "auto"), ("even", "reference"))
}
CASES |= {
    split: (problem(through=("logp",)), split, ("hidden", "weight"), "auto") for split in ("first empty", "last empty")
}
CASES |= {
    f"{transform} logits": (
        problem(bias=True, through=DIFFERENTIABLE, transform=transform),
        "uneven",
        OPERANDS,
        "auto",
    )
    for transform in TRANSFORMS
}
CASES |= {
    f"{dtype}, {wanted}": (
        problem("peak" if wanted == ("hidden",) else "normal", bias=True, dtype=dtype),
        "even",
        wanted,
        "auto",
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for wanted in (("hidden",), OPERANDS)
}
CASES |= {
    "adapter": (adapted(), "uneven", LORA_OPERANDS, "auto"),
    "adapter, empty": (adapted(), "first empty", LORA_OPERANDS, "auto"),
    "adapter alone": (adapted(), "even", ("A", "B"), "auto"),
    "no token counts": (problem(ignored=1.0), "even", ("hidden", "weight"), "auto"),
    "no tokens": (problem(T=0), "even", ("hidden", "weight"), "auto"),
}


def on_a_shard(bounds: list[int], rank: int):
    """vocab_parallel_linear_logprob with the signature of linear_logprob, on whole operands."""
    from prefopt_kernels import vocab_parallel_linear_logprob

    rows = slice(bounds[rank], bounds[rank + 1])

    def call(hidden, weight, targets, bias=None, lora=None, **settings):
        if lora is not None:
            A, B, scale = lora
            lora = (A, B[rows], scale)
        bias = None if bias is None else bias[rows]
        settings |= {"lora": lora, "vocab_start": bounds[rank]}
        return vocab_parallel_linear_logprob(hidden, weight[rows], targets, bias, **settings)

    return call


def counted_all_reduces() -> list[tuple]:
    """A list that records (shape, dtype, reduction) of every later all-reduce of this process."""
    calls, all_reduce = [], dist.all_reduce

    def counted(tensor, op=dist.ReduceOp.SUM, group=None):
        calls.append((tuple(tensor.shape), tensor.dtype, str(op)))
        return all_reduce(tensor, op, group)

    dist.all_reduce = counted
    return calls


def everything(rank: int) -> tuple[dict, tuple, dict]:
    return refusals(rank), compiled(rank), results(rank)  # the last counts all-reduces for good


def results(rank: int) -> dict:
    """Each case's outputs and gradients, and the all-reduces of its forward and backward."""
    calls = counted_all_reduces()
    found = {}
    for name, (made, split, wanted, backend) in CASES.items():
        calls.clear()
        call = on_a_shard(SPLITS[split], rank)
        result = ours(made, wanted, backend, OUTPUTS, call)
        found[name] = (tuple(result.outputs), result.grads, list(calls))
    return found


def refusals(rank: int) -> dict:
    """Error messages on both ranks, and results of the group afterwards."""
    from torch.distributed.device_mesh import init_device_mesh

    from prefopt_kernels import vocab_parallel_linear_logprob

    made = problem(ignored=0.0)
    weight, half = made.weight[150 * rank : 150 * (rank + 1)], 150 * rank
    too_large = made.targets.clone()
    too_large[3] = V
    good = {"hidden": made.hidden, "weight_shard": weight, "targets": made.targets}
    good["vocab_start"] = half
    attempts = {
        "no shard": good | {"targets": too_large},
        "two shards": good | {"vocab_start": 0},
        "is_top1": good | {"outputs": ("is_top1",)},
        "start": good | {"vocab_start": -1},
        "bias": good | {"bias_shard": torch.zeros(V)},
        "weight": good | {"weight_shard": weight[0]},
        "dtype": good | {"weight_shard": weight.double()},
        "hidden": good | {"hidden": [1.0]},
        "mesh": good | {"group": init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "dp"))},
    }
    found = {}
    for name, arguments in attempts.items():
        try:
            vocab_parallel_linear_logprob(**arguments)
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    alone = dist.new_group([0]), dist.new_group([1])
    whole = {"weight_shard": made.weight, "vocab_start": 0, "group": alone[rank]}
    found["alone"] = vocab_parallel_linear_logprob(**good | whole).logp
    found["mesh of one dimension"] = vocab_parallel_linear_logprob(
        **good, group=init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    ).logp
    return found


def compiled(rank: int) -> tuple:
    """One case, eager and compiled."""
    made, split, wanted, backend = CASES["normal, even, auto"]
    call = on_a_shard(SPLITS[split], rank)
    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    both = (ours(made, wanted, backend, OUTPUTS, each) for each in (call, traced))
    return tuple((tuple(result.outputs), result.grads) for result in both)
