"""A run in a subprocess, so that runs do not share memory.

Nothing heavy is imported here: the child redirects its output before its libraries write any.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import RunError, UserError, first_line

if TYPE_CHECKING:
    from prefopt.compare.measure import Job

LOG = "log.txt"
STEP, DONE, REFUSED, FAILED = "step", "done", "refused", "failed"  # messages of the child; all but the first end it


def run_in_subprocess(job: "Job", on_step: Callable[[], object]) -> dict[str, Any]:
    """``measure`` in a new process.

    Args:
        job: the run; the output of the child goes to ``log.txt`` in its folder.
        on_step: called after each optimizer step.

    Raises:
        UserError: bad input; the message names the log.
        RunError: the run failed, or its process died; the message names the log.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    log = job.folder / LOG
    # pickled here: to unpickle a Job, the child would import everything before it redirects its output
    process = context.Process(target=_child, args=(pickle.dumps(job), log, sender))
    process.start()
    sender.close()  # else the end of the child would not close the pipe
    kind: str = STEP
    result: Any = None
    try:
        while kind == STEP:
            kind, result = receiver.recv()
            if kind == STEP:
                on_step()
    except EOFError:
        pass
    finally:
        if kind == STEP:
            process.terminate()
        process.join()
    if kind == DONE:
        return result
    error = UserError if kind == REFUSED else RunError
    raise error(f"{job.method}, seed {job.seed}: {result or _exit_reason(process.exitcode)}; see {log}")


def _exit_reason(code: int | None) -> str:
    """Why a process ended that sent no result."""
    if code == -9:  # SIGKILL, which Windows has no name for
        return "its process was killed, most likely for lack of memory"
    return f"its process ended with code {code}"


def _child(job: bytes, log: Path, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and terminates the child
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # an ordinary exit, with clean-up
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        for number in (1, 2):  # standard output and error, also those of C libraries
            os.dup2(file.fileno(), number)
    from prefopt.compare.measure import measure

    try:
        connection.send((DONE, measure(pickle.loads(job), lambda: connection.send((STEP, None)))))
    except UserError as error:
        traceback.print_exc()
        connection.send((REFUSED, str(error)))
    except Exception as error:  # noqa: BLE001  an exception may not cross to the parent process; its first line does
        traceback.print_exc()
        connection.send((FAILED, first_line(error)))
