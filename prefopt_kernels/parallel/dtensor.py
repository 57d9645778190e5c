"""A head that is kept in DTensors: which of its mesh dimensions share the vocabulary, and which only store it in
pieces.

Tensor parallel: its ranks work on the same tokens, and each scores them with its own rows of the head. Data parallel
(FSDP2): its ranks work on tokens of their own, so that the rows are brought together, and the gradient is the mean.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prefopt_kernels.ops.linear_logprob import TokenLogprobs, linear_logprob
from prefopt_kernels.parallel.vocab import Lora, SumGradients, vocab_parallel_linear_logprob

# Names of mesh dimensions: torch's examples, torchtitan, accelerate and transformers.
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
    "dp_shard_cp",  # accelerate's name for dp_shard, without context parallelism too
    "replicate",
    "shard",
)


class ResolvedHead(NamedTuple):
    """A head as plain tensors of this rank: all of its rows, or those that it has in a group."""

    weight: Tensor  # (V, H), or (V_r, H)
    bias: Tensor | None = None  # (V,), or (V_r,)
    lora: Lora | None = None  # A (R, H) and B of as many rows as weight
    group: object | None = None  # the ranks that share the vocabulary; None: the weight is whole
    vocab_start: int = 0  # id of the first row

    def logprob(self, hidden: Tensor, targets: Tensor, **settings) -> TokenLogprobs:
        """``linear_logprob`` of the whole head, wherever its rows are; ``settings`` as there."""
        if self.group is None:
            return linear_logprob(hidden, self.weight, targets, self.bias, lora=self.lora, **settings)
        return vocab_parallel_linear_logprob(
            hidden,
            self.weight,
            targets,
            self.bias,
            vocab_start=self.vocab_start,
            group=self.group,
            lora=self.lora,
            **settings,
        )


def resolve_head(
    weight: Tensor,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> ResolvedHead:
    """The plain tensors behind a head's DTensors, with gradients that arrive where and as the parameters expect them.

    Args:
        weight, bias, lora: as for ``linear_logprob``; DTensors or plain tensors.
        dtype: in which the pieces of weight and bias are brought together; left out, their own. Gradients travel back
            in the parameters' own.

    Raises:
        ValueError: a mesh does not say what its dimensions are for.

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
    shared = _vocabulary_dim(weight)
    A, B, scale = (None, None, 1.0) if lora is None else lora
    weight, bias = (_plain(each, dtype) for each in (weight, bias))
    A, B = (_plain(each, None) for each in (A, B))
    if shared is None:
        return ResolvedHead(weight, bias, None if lora is None else (A, B, scale))
    group, start, V = shared
    bias, B = (_own_rows(each, weight.shape[0], start, V, group) for each in (bias, B))
    return ResolvedHead(weight, bias, None if lora is None else (A, B, scale), group, start)


def is_dtensor(tensor) -> bool:
    """Told by an attribute: importing DTensor takes half a second, and few have one."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def plain_hidden(hidden: Tensor) -> Tensor:
    """Hidden states as this rank's tensor: the same on every rank that shares the vocabulary.

    Raises:
        ValueError: they are a DTensor of which each rank has a part.
    """
    if not is_dtensor(hidden):
        return hidden
    if not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(
            f"hidden is a DTensor with placements {hidden.placements}; expected it whole on every rank: sequences that "
            "are spread over processes (context or sequence parallel) are not supported"
        )
    return hidden.to_local()


def _vocabulary_dim(weight: Tensor):
    """The group that shares the rows of ``weight``, this rank's first row, and V; None where nobody does."""
    if not is_dtensor(weight):
        return None
    found = [
        i
        for i, (placement, shares) in enumerate(zip(weight.placements, _shares(weight), strict=True))
        if shares and placement.is_shard(0)
    ]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"the head is sharded over {len(found)} tensor-parallel mesh dimensions; expected one")
    (dim,) = found
    mesh, V = weight.device_mesh, weight.shape[0]
    chunk = -(-V // mesh.size(dim))  # as torch.chunk: the last ones may be shorter, or empty
    return mesh.get_group(dim), min(V, chunk * mesh.get_local_rank(dim)), V


def _shares(tensor: Tensor) -> list[bool]:
    """For each mesh dimension, whether its ranks work on the same tokens (tensor parallel) or on their own (data)."""
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names
    if names is None:
        raise ValueError(
            "the head is a DTensor on a mesh without names, which does not say whether its ranks share the vocabulary "
            "or the data; expected init_device_mesh(..., mesh_dim_names=('tp',)), or ('dp',)"
        )
    for i, name in enumerate(names):
        if mesh.size(i) > 1 and name not in (*VOCABULARY_DIMS, *DATA_DIMS):
            raise ValueError(
                f"the head is a DTensor over mesh dimension {name!r}; expected one of {VOCABULARY_DIMS} (the "
                f"vocabulary is shared) or of {DATA_DIMS} (gradients are averaged)"
            )
    return [name in VOCABULARY_DIMS for name in names]


def _plain(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """This rank's tensor: whole over data dimensions and, over tensor-parallel ones, its rows.

    Ranks with data of their own each have a gradient of their own, and what is trained is the mean: without
    ``grad_placements``, torch would take one rank's for everybody's.
    """
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial, Replicate

    shares = _shares(tensor)
    keeps = [
        placement if shared and placement.is_shard(0) else Replicate()
        for placement, shared in zip(tensor.placements, shares, strict=True)
    ]
    gathered = tensor.redistribute(placements=keeps, forward_dtype=dtype or tensor.dtype, backward_dtype=tensor.dtype)
    return gathered.to_local(
        grad_placements=[keep if shared else Partial("avg") for keep, shared in zip(keeps, shares, strict=True)]
    )


def _own_rows(operand: Tensor | None, rows: int, start: int, V: int, group) -> Tensor | None:
    """This rank's rows of a bias or an adapter's B that each rank has whole; its gradient is everybody's."""
    if operand is None or operand.shape[0] == rows:
        return operand
    if operand.shape[0] != V:
        raise ValueError(
            f"a bias or adapter has {operand.shape[0]} rows; expected {V}, those of the head, or this rank's {rows}"
        )
    (operand,) = SumGradients.apply(group, operand)
    return operand[start : start + rows]
