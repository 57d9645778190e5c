"""Test files that start themselves as scripts, once per process: how they start, what they leave, how they end.

pytest finds the tests of such a file; their fixture runs the file as the processes of one group.
"""

import os
import runpy
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from support.forked import environment, start

WORLD_SIZE = 2
PATIENCE = 240  # seconds; a hang is a failure


def run_as_ranks(script: str, folder: Path, **extra: str) -> list[dict]:
    """Start ``script folder`` once per process; returns what each has left in its ``rank{n}.pt``."""
    # Held here, and not by the first process: a port that is only looked up may be another's by the time it is used.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, logs = [], [folder / f"rank{rank}.log" for rank in range(WORLD_SIZE)]
    for rank, path in enumerate(logs):
        env = environment(extra) | _place(rank, store.port)
        processes.append(start(_run_script, script, str(folder), log=path, env=env))
    ended(processes, logs)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


def _run_script(script: str, folder: str) -> None:
    sys.argv = [script, folder]
    runpy.run_path(script, run_name="__main__")


def leave(folder: Path, seen: dict) -> None:
    """Where ``run_as_ranks`` finds it."""
    torch.save(seen, folder / f"rank{os.environ['RANK']}.pt")


def leave_group() -> NoReturn:
    """End the process, and its group with it.

    Not by returning: a thread of gloo that drops a tensor while the interpreter ends aborts the process, and torch's
    caches of meshes keep a group, and so its threads, after it was destroyed.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _place(rank: int, port: int) -> dict[str, str]:
    """What torchrun would set for one of the processes; like its agent, this process holds the store."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def ended(processes: list[BaseProcess], logs: list[Path]) -> None:
    """Wait for the processes of a group, and fail with what they printed if one fails or hangs."""
    codes = _exit_codes(processes)
    assert not any(codes), "\n".join(
        f"rank {rank} ended with {code}:\n{path.read_text(encoding='utf-8')[-6000:]}"
        for rank, (code, path) in enumerate(zip(codes, logs, strict=True))
    )


def _exit_codes(processes: list[BaseProcess]) -> list[int | None]:
    """When one has failed, or the time is over, the others get SIGABRT: they print their stacks."""
    until = time.monotonic() + PATIENCE
    try:
        while any(process.is_alive() for process in processes):
            if time.monotonic() > until or any(process.exitcode for process in processes):
                break
            time.sleep(0.1)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGABRT)
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]
    finally:  # interrupted
        for process in processes:
            process.kill()
