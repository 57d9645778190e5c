"""Heads stored as DTensors: which mesh dimensions shard the vocabulary, and which only store the parameters in shards.

Tensor parallel: all ranks have the same tokens, and each scores them with its own rows of the head. Data parallel
(FSDP2): each rank has its own tokens, so the rows are all-gathered and the gradient is averaged.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from prefopt_kernels.ops.linear_logprob import TokenLogprobs, linear_logprob
from prefopt_kernels.parallel.vocab import Lora, SumGradients, vocab_parallel_linear_logprob

if TYPE_CHECKING:  # importing it takes half a second
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

# names of mesh dimensions in torch's examples, torchtitan, accelerate and transformers
VOCABULARY_DIMS = ("tp", "tensor", "tensor_parallel", "model")
DATA_DIMS = (
    "dp",
    "ddp",
    "data",
    "data_parallel",
    "fsdp",
    "hsdp",
    "dp_replicate",
    "dp_shard",
    "dp_shard_cp",  # accelerate's name of dp_shard, even without context parallelism
    "replicate",
    "shard",
)


class ResolvedHead(NamedTuple):
    """A head as plain tensors of this rank: all rows, or this rank's shard of them."""

    weight: Tensor  # (V, H), or (V_r, H)
    bias: Tensor | None = None  # (V,), or (V_r,)
    lora: Lora | None = None  # A (R, H) and B with as many rows as weight
    group: "ProcessGroup | None" = None  # the ranks that shard the vocabulary; None: weight is the whole head
    vocab_start: int = 0  # id of the first row

    def logprob(self, hidden: Tensor, targets: Tensor, **settings: Any) -> TokenLogprobs:
        """``linear_logprob`` under the whole head; ``settings`` are its keyword arguments."""
        if self.group is None:
            return linear_logprob(hidden, self.weight, targets, self.bias, lora=self.lora, **settings)
        settings |= {"lora": self.lora, "vocab_start": self.vocab_start, "group": self.group}
        return vocab_parallel_linear_logprob(hidden, self.weight, targets, self.bias, **settings)


def resolve_head(
    weight: Tensor,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> ResolvedHead:
    """The plain tensors behind a head's DTensors; gradients return to the parameters in their placements and dtypes.

    Args:
        weight, bias, lora: as for ``linear_logprob``; DTensors or plain tensors.
        dtype: dtype in which weight and bias are all-gathered; by default their own.

    Raises:
        ValueError: the names of a mesh's dimensions do not show what they are for.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor import Shard, distribute_tensor
        >>> from prefopt_kernels.parallel.dtensor import resolve_head
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        >>> head = resolve_head(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]))
        >>> head.logprob(torch.eye(2), torch.tensor([3, -100])).logp.exp()  # uniform over four
        tensor([0.2500, 1.0000])
        >>> dist.destroy_process_group()
    """
    shard = _vocabulary_shard(weight)
    weight = _to_plain(weight, dtype)
    bias = None if bias is None else _to_plain(bias, dtype)
    if lora is not None:
        lora = (_to_plain(lora[0], None), _to_plain(lora[1], None), lora[2])
    if shard is None:
        return ResolvedHead(weight, bias, lora)
    group, start, V = shard
    rows = weight.shape[0]
    bias = None if bias is None else _own_rows(bias, rows, start, V, group)
    if lora is not None:
        lora = (lora[0], _own_rows(lora[1], rows, start, V, group), lora[2])
    return ResolvedHead(weight, bias, lora, group, start)


def is_dtensor(tensor: object) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor, without importing the class."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def plain_hidden(hidden: Tensor) -> Tensor:
    """Hidden states as a plain tensor.

    Raises:
        ValueError: they are a DTensor that is not replicated.
    """
    if not is_dtensor(hidden):
        return hidden
    if not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(
            f"hidden is a DTensor with placements {hidden.placements}; expected Replicate() on every mesh dimension: "
            "context and sequence parallel, which shard the sequence, are not supported"
        )
    return hidden.to_local()


def _vocabulary_shard(weight: Tensor) -> "tuple[ProcessGroup, int, int] | None":
    """The group that shards the rows of ``weight``, this rank's first row, and V; None if the rows are not sharded."""
    if not is_dtensor(weight):
        return None
    dims = [
        i
        for i, (placement, tensor_parallel) in enumerate(
            zip(weight.placements, _tensor_parallel_dims(weight), strict=True)
        )
        if tensor_parallel and placement.is_shard(0)
    ]
    if not dims:
        return None
    if len(dims) > 1:
        raise ValueError(f"the head is sharded over {len(dims)} tensor-parallel mesh dimensions; expected one")
    (dim,) = dims
    mesh, V = weight.device_mesh, weight.shape[0]
    rows = -(-V // mesh.size(dim))  # as torch.chunk: the last shards may be shorter or empty
    return mesh.get_group(dim), min(V, rows * mesh.get_local_rank(dim)), V


def _tensor_parallel_dims(tensor: "DTensor") -> list[bool]:
    """For each mesh dimension, whether it is tensor parallel (same tokens on its ranks) or data parallel."""
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names
    if names is None:
        raise ValueError(
            "the head is a DTensor on a mesh without dimension names, so tensor and data parallel cannot be told "
            "apart; expected init_device_mesh(..., mesh_dim_names=('tp',)), or ('dp',)"
        )
    for i, name in enumerate(names):
        if mesh.size(i) > 1 and name not in (*VOCABULARY_DIMS, *DATA_DIMS):
            raise ValueError(
                f"the head is a DTensor over mesh dimension {name!r}; expected one of {VOCABULARY_DIMS} (tensor "
                f"parallel, shards the vocabulary) or of {DATA_DIMS} (data parallel, averages gradients)"
            )
    return [name in VOCABULARY_DIMS for name in names]


def _to_plain(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """This rank's plain tensor: all-gathered over data dimensions, its own rows over tensor-parallel ones.

    Data-parallel ranks have different gradients, which are averaged. Without ``grad_placements``, torch would take the
    gradients of all ranks to be equal.
    """
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial, Placement, Replicate

    tensor_parallel = _tensor_parallel_dims(tensor)
    kept: list[Placement] = [
        placement if same_tokens and placement.is_shard(0) else Replicate()
        for placement, same_tokens in zip(tensor.placements, tensor_parallel, strict=True)
    ]
    gathered = tensor.redistribute(placements=kept, forward_dtype=dtype or tensor.dtype, backward_dtype=tensor.dtype)
    return gathered.to_local(
        grad_placements=[
            placement if same_tokens else Partial("avg")
            for placement, same_tokens in zip(kept, tensor_parallel, strict=True)
        ]
    )


def _own_rows(operand: Tensor, rows: int, start: int, V: int, group: "ProcessGroup") -> Tensor:
    """This rank's rows of a replicated bias or adapter B, whose gradient is all-reduced; a shard is returned as is."""
    if operand.shape[0] == rows:
        return operand
    if operand.shape[0] != V:
        raise ValueError(
            f"a bias or adapter has {operand.shape[0]} rows; expected {V}, those of the head, or this rank's {rows}"
        )
    (operand,) = SumGradients.apply(group, operand)
    return operand[start : start + rows]
