"""A run in a process of its own, so that it finds nothing in memory that another one left there.

Nothing heavy is imported here: the child redirects what it prints before its libraries begin to.
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
from typing import TYPE_CHECKING

from prefopt.errors import RunError, UserError, first_line

if TYPE_CHECKING:
    from prefopt.compare.measure import Job

LOG = "log.txt"
STEP, DONE = "step", "done"  # what the child sends
REFUSED, FAILED = "refused", "failed"
ENDS = (DONE, REFUSED, FAILED)


def run_apart(job: "Job", on_step: Callable[[], None]) -> dict:
    """``measure`` in a fresh process.

    Args:
        job: what to run; the child's output goes to ``log.txt`` in its folder.
        on_step: called after each optimizer step.

    Raises:
        UserError: the run could not be made from its input; the message names the log.
        RunError: it failed, or its process died; the message names the log.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    log = job.folder / LOG
    # as bytes, or the child would import everything in order to read its arguments
    process = context.Process(target=_work, args=(pickle.dumps(job), log, sender))
    process.start()
    sender.close()  # so that the end of the child is the end of the pipe
    kind, said = None, None
    try:
        while kind not in ENDS:
            kind, said = receiver.recv()
            if kind == STEP:
                on_step()
    except EOFError:
        pass
    finally:
        if kind not in ENDS:
            process.terminate()
        process.join()
    if kind == DONE:
        return said
    kind_of_error = UserError if kind == REFUSED else RunError
    raise kind_of_error(f"{job.method}, seed {job.seed}: {said or _end(process.exitcode)}; see {log}")


def _end(code: int | None) -> str:
    """How a process ended that did not say so itself."""
    if code == -9:  # SIGKILL, which Windows has no name for
        return "its process was killed, most likely for lack of memory"
    return f"its process ended with code {code}"


def _work(job: bytes, log: Path, connection: Connection) -> None:
    """The child's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the child
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # in order, so that nothing is left behind
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        for number in (1, 2):  # standard output and error, those of libraries in C as well
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
