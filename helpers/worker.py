"""A process that does one piece of work at a time beside this one, over a pipe of its own.

concurrent.futures shares its pipes among all workers: one that is killed in the middle of an answer leaves half a
message behind, and the rest wait for ever. Here the pipe ends with the process, and what it had is done by the caller.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

START = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
PATIENCE = 120  # seconds for a piece of work that takes less than one


class Worker:
    """Does `work` on what it is asked. idle: it may be asked; False for good once its process is gone."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context(START)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.pipe, work), daemon=True)
        self.process.start()
        theirs.close()  # the process alone holds its end: the pipe ends with it
        self.idle = True

    def ask(self, question: Any) -> bool:
        """Hand over a piece of work; False when the process is gone. The answer must be taken before the next."""
        self.idle = False
        try:
            self.pipe.send(question)
        except OSError:
            return False
        return True

    def answered(self) -> bool:
        """Whether `answer` would return at once."""
        return self.pipe.poll()

    def answer(self) -> Any:
        """What came of the work; None when the process was killed, or has said nothing for `PATIENCE` seconds."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll(PATIENCE):
                found = self.pipe.recv()
                self.idle = True
                return found
        self.stop()
        return None

    def stop(self) -> None:
        """End the process."""
        self.idle = False
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, askers_end: Connection, work: Callable[[Any], Any]) -> None:
    askers_end.close()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # the asker is gone
        while True:
            pipe.send(work(pipe.recv()))
