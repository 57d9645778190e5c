"""Processes forked from one server that has imported torch, transformers and prefopt, which takes seconds."""

import faulthandler
import gc
import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import torch

TESTS = Path(__file__).resolve().parents[1]
PRELOADED = [
    "support.distributed",
    "prefopt.recipe.run",
    "transformers.models.qwen3.modeling_qwen3",
    "benchmarks.measure_cpu",
]


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


def start(target: Callable, *args, log: Path | None = None, env: Mapping[str, str] | None = None, **kwargs):
    """A started process of multiprocessing that calls ``target`` on one thread; its output is appended to ``log``."""
    if log is not None:
        log.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, environment({})):
        forkserver.ensure_running()
    process = context.Process(target=_run, args=(target, args, kwargs, log, dict(env or {})))
    process.start()
    return process


def _run(target: Callable, args: tuple, kwargs: dict, log: Path | None, env: dict[str, str]) -> None:
    gc.freeze()  # accelerate collects garbage at every start of a training: not what was imported
    os.environ |= env
    faulthandler.enable()
    torch.set_num_threads(1)
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    target(*args, **kwargs)
