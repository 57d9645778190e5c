"""Test files that start themselves as scripts, once per process: how they start, what they leave, how they end.

pytest finds the tests of such a file; their fixture runs the file as the processes of one group.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

TESTS = Path(__file__).resolve().parents[1]
WORLD_SIZE = 2
PATIENCE = 240  # seconds; a hang is a failure


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """For processes on this machine that need no network."""
    paths = (TESTS, TESTS.parent, TESTS.parent / "python")
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # no name look-up, which fails on isolated machines
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONFAULTHANDLER": "1",  # SIGABRT writes where each thread was
        **extra,
    }


def run_as_ranks(script: str, folder: Path, **extra: str) -> list[dict]:
    """Start ``script folder`` once per process; returns what each has left in its ``rank{n}.pt``."""
    # Held here, and not by the first process: a port that is only looked up may be another's by the time it is used.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, logs = [], [folder / f"rank{rank}.log" for rank in range(WORLD_SIZE)]
    for rank, path in enumerate(logs):
        env = environment(extra) | _place(rank, store.port)
        with path.open("w", encoding="utf-8") as log:
            command = [sys.executable, script, str(folder)]
            started = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        processes.append(started)
    codes = _ended(processes)
    assert codes == [0] * WORLD_SIZE, "\n".join(
        f"rank {rank} ended with {code}:\n{path.read_text(encoding='utf-8')[-6000:]}"
        for rank, (code, path) in enumerate(zip(codes, logs, strict=True))
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


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


def _ended(processes: list[subprocess.Popen]) -> list[int]:
    """Their exit codes. When one has failed, or all have had their time, the others are told to say where they are."""
    until = time.monotonic() + PATIENCE
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > until or any(process.poll() for process in processes):
                break
            time.sleep(0.1)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)
        return [process.wait() for process in processes]
    finally:  # interrupted
        for process in processes:
            process.kill()
