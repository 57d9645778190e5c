"""Computations on four gloo processes for the tests of heads that are DTensors."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

WORLD = 4
T, H, V, R = 11, 7, 13, 3
BOUNDS = [0, 4, 9, 11]
# name: shape and names of the mesh, placements of weight and bias
LAYOUTS = {
    "vocabulary": ((4,), ("tp",), [Shard(0)]),
    "whole on every rank": ((4,), ("tp",), [Replicate()]),
    "columns": ((4,), ("tp",), [Shard(1)]),
    "data": ((4,), ("dp",), [Shard(0)]),
    "data, copies": ((2, 2), ("dp_replicate", "dp_shard"), [Replicate(), Shard(0)]),
    "data and vocabulary": ((2, 2), ("fsdp", "tp"), [Shard(0), Shard(0)]),
    "data, and whole": ((2, 2), ("fsdp", "tp"), [Shard(0), Replicate()]),
}


def batch(which: int) -> dict[str, Tensor]:
    """A batch; ranks of a tensor-parallel group have the same one."""
    generator = torch.Generator().manual_seed(which)
    targets = torch.randint(0, V, (T,), generator=generator)
    targets[which : which + 2] = -100
    return {
        "hidden": torch.randn(T, H, generator=generator),
        "targets": targets,
        "cu_seqlens": torch.tensor(BOUNDS),
        "labels": torch.tensor([True, False, True]),
        "ref_logps": -3 * torch.rand(3, generator=generator),
        "reference_point": torch.tensor(0.25),
    }


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100)
    shapes = {"weight": (V, H), "bias": (V,), "A": (R, H), "B": (V, R)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def step(inputs: dict[str, Tensor], weight: Tensor, bias: Tensor, **settings) -> dict[str, Tensor]:
    """Loss and gradients of one batch, as full tensors."""
    from prefopt_kernels import FusedLinearKTOLoss

    hidden = inputs["hidden"].clone().requires_grad_()
    operands = {"weight": weight, "bias": bias}
    operands = {name: each.detach().requires_grad_() for name, each in operands.items()}
    module = FusedLinearKTOLoss(beta=0.3, outputs=("entropy",), **settings)
    loss, metrics = module(**inputs | operands | {"hidden": hidden})
    loss.backward()
    grads = {
        name: each.grad.full_tensor() if isinstance(each, DTensor) else each.grad for name, each in operands.items()
    }
    return grads | {"loss": loss, "entropy": metrics.entropy_sum, "hidden": hidden.grad}


def group_of(mesh: DeviceMesh, rank: int) -> int:
    """Index of this rank's batch, from its coordinates in the data dimensions."""
    data = [i for i, name in enumerate(mesh.mesh_dim_names) if name != "tp"]
    place = mesh.get_coordinate()
    return sum(place[i] * 2**n for n, i in enumerate(data))


def layouts(rank: int) -> dict:
    """For each layout: the index of this rank's batch, and the results of the step."""
    found = {}
    for name, (shape, names, placements) in LAYOUTS.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        head = parameters()
        weight = distribute_tensor(head["weight"], mesh, placements)
        bias = [Replicate() if placement == Shard(1) else placement for placement in placements]
        bias = distribute_tensor(head["bias"], mesh, bias)
        which = group_of(mesh, rank)
        found[name] = (which, detached(step(batch(which), weight, bias)))
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    weight = distribute_tensor(parameters()["weight"], mesh, [Shard(0)]).requires_grad_()
    loss, _ = torch_default(batch(rank), weight)
    loss.backward()
    found["torch's default"] = (rank, {"weight": weight.grad.full_tensor()})
    return found


def torch_default(inputs: dict[str, Tensor], weight: DTensor):
    """The gathered weight without grad_placements."""
    from prefopt_kernels import FusedLinearKTOLoss

    return FusedLinearKTOLoss(beta=0.3)(**inputs, weight=weight.full_tensor(), bias=parameters()["bias"])


def adapter(rank: int) -> dict:
    """Gradients of a replicated adapter and bias with a row-sharded head."""
    from prefopt_kernels.parallel.dtensor import resolve_head

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    found = {}
    for name in ("ours", "expected"):
        whole = {each: value.requires_grad_() for each, value in parameters().items()}
        weight = whole["weight"]
        if name == "ours":
            weight = distribute_tensor(weight.detach(), mesh, [Shard(0)])
        head = resolve_head(weight, whole["bias"], (whole["A"], whole["B"], 0.5))
        inputs = batch(0)
        head.logprob(inputs["hidden"], inputs["targets"]).logp.square().sum().backward()
        found[name] = {each: whole[each].grad for each in ("bias", "A", "B")}
    return found


def half(rank: int) -> dict:
    """An fp32 head with bf16 hidden states: used in bf16, with an fp32 gradient."""
    from prefopt_kernels.parallel.dtensor import resolve_head

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    weight = distribute_tensor(parameters()["weight"], mesh, [Shard(0)]).requires_grad_()
    head = resolve_head(weight, dtype=torch.bfloat16)
    inputs = batch(0)
    head.logprob(inputs["hidden"].bfloat16(), inputs["targets"]).logp.sum().backward()
    return {"used": head.weight.dtype, "grad": weight.grad.full_tensor()}


def refusals(rank: int) -> dict[str, str]:
    head = parameters()
    found = {}
    for name, shape, names, placements, settings in (
        ("no names", (4,), None, [Shard(0)], {}),
        ("another name", (4,), ("cp",), [Shard(0)], {}),
        ("two", (2, 2), ("tp", "model"), [Shard(0), Shard(0)], {}),
        ("chunked", (4,), ("tp",), [Shard(0)], {"scheme": "chunked"}),
    ):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        weight = distribute_tensor(head["weight"], mesh, placements)
        try:
            step(batch(0), weight, head["bias"], **settings)
        except ValueError as error:
            found[name] = str(error)
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    from prefopt_kernels.parallel.dtensor import plain_hidden

    hidden = batch(0)["hidden"]
    for name, placement in (("sequence", Shard(0)), ("partial", Partial())):
        try:
            plain_hidden(DTensor.from_local(hidden, mesh, [placement]))
        except ValueError as error:
            found[name] = str(error)
    found["whole"] = plain_hidden(DTensor.from_local(hidden, mesh, [Replicate()]))
    return found


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def everything(rank: int) -> dict:
    return {
        "layouts": layouts(rank),
        "adapter": adapter(rank),
        "half": half(rank),
        "refusals": refusals(rank),
    }
