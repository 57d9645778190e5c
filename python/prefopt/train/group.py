"""The end of a run on several processes."""

import gc

import torch.distributed as dist


def leave_process_group() -> None:
    """End torch's process group, if this process is in one; the last thing that a run does.

    A group that is left to the end of the interpreter is warned of by NCCL, and a thread of gloo that drops a tensor by
    then aborts the process. The threads end when nothing holds the group, so trainers that are gone are collected first.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
