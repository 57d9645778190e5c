"""The end of a run on several processes."""

import gc

import torch.distributed as dist


def leave_process_group() -> None:
    """End torch's process group, if this process is in one; the last thing that a run does.

    NCCL warns if the interpreter exits with a group, and a gloo thread that frees a tensor by then aborts the process.
    The threads end with the last reference to the group, so unreachable trainers are collected first.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
