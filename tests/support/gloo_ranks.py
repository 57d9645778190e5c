"""Gloo processes on this machine, for tests of collectives."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from support.forked import start
from support.rank_scripts import ended, leave_group


def run_ranks(work, folder: Path, world_size: int = 2) -> list:
    """``[work(0), work(1), ...]``, each computed in a process of its own inside one gloo group.

    ``work`` is a function of a helper module, or a partial of one.
    """
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    place = (str(folder), world_size)
    ended([start(_rank, work, *place, rank, log=log) for rank, log in enumerate(logs)], logs)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]


def _rank(work, folder: str, world_size: int, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no name look-up, which fails on isolated machines
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.save(work(rank), f"{folder}/rank{rank}.pt")
    leave_group()


def reference_points(rank: int) -> list[dict]:
    """Both estimators on uneven, empty and single-rank data: values, stored values, collectives."""
    from prefopt_kernels.reference_point import MicrobatchKL, WindowKL

    calls, all_reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    results = []
    for per_rank in LOG_RATIOS:
        log_ratios = torch.tensor(per_rank[rank], dtype=torch.float32)
        row = {}
        for name, kl in (
            ("micro-batch", MicrobatchKL()),
            ("window", WindowKL()),
            ("window of this rank", WindowKL(group=alone)),
        ):
            calls.clear()
            row[name] = (kl.estimate(log_ratios).item(), kl.value.item(), list(calls))
        results.append(row)
    return results


# one row per case, one list per rank; nats
LOG_RATIOS = [
    ([1.0, 2.0], [3.0, 6.0]),  # as many on each
    ([8.0], [1.0, 1.0, 1.0]),  # rank means 8 and 1, window mean 11 / 4
    ([], [2.0, 4.0]),  # none on rank 0
    ([], []),  # none anywhere
    ([6.0], [-3.0, -3.0]),  # positive on one rank, clamped only together
    ([-6.0], [1.0, -3.0]),  # below 0 together
]
