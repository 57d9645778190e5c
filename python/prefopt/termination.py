"""SIGTERM ends a command as Ctrl-C does: what is open is closed, and what is half written is removed."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TERMINATED = 128 + signal.SIGTERM  # as a shell reports it


class Terminated(SystemExit):
    """SIGTERM was received. A SystemExit, so that code which handles Ctrl-C and goes on does not catch it."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise ``Terminated`` on SIGTERM within the block; later ones are ignored, so that the cleanup is not interrupted.

    Nothing changes outside the main thread, or where SIGTERM is already handled or ignored.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a forked worker ends at once: the cleanup is its parent's
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated(TERMINATED)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
