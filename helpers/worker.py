"""Child processes: what may crash, hang or eat the memory works in a process of its own, which ends with this one.

    with Worker("helpers.gguf.llama_cpp:LlamaCpp", start={"path": "m.gguf"}, name="llama.cpp") as child:
        child.ask(["tokenize", "Hello"], timeout_s=60)
    run("helpers.data.documents:parse", {"path": "a.pdf"}, wall_s=60, memory_gib=2)

The named function is called in the child as `handler(request, event)`; what it returns is the answer, `event(value)`
reports on the way. A class is made once, with `start` as its arguments, and its object is the handler. Requests and
answers are JSON, answers as [kind, value], the kinds being event, result, error (the handler's TunebookError), memory,
and bug (anything else). The pipe is a socket of their own: what libraries print does not stand among the answers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from helpers.display import clean
from helpers.errors import TunebookError

Event = Callable[[Any], None]
PROJECT = Path(__file__).resolve().parent.parent
MAIN = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); from helpers import worker; worker.main(*sys.argv[1:])"


class Lost(TunebookError):
    """A child was lost before it answered. why: a limit of time or of memory, or it ended by itself."""

    def __init__(self, message: str, why: Literal["time", "memory", "ended"]) -> None:
        super().__init__(message)
        self.why = why


class Worker:
    """One child that answers requests one after another; it is started anew when it was lost in the middle of one.

    target: "module:function" or "module:Class". name: what messages call it. memory_gib: address space beyond what the
    child has after its start. started: what the handler object has as its attribute `started`.
    """

    def __init__(
        self,
        target: str,
        *,
        start: dict[str, Any] | None = None,
        name: str = "",
        memory_gib: float = 0,
        start_timeout_s: float | None = 120,
    ) -> None:
        self.name, self._memory_gib, self._start_timeout_s = name or target, memory_gib, start_timeout_s
        self._command = [sys.executable, "-P", "-c", MAIN, target, json.dumps(start or {}), str(memory_gib)]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the child
        self._one_at_a_time = threading.Lock()
        self._begin()

    def ask(self, request: Any, on_event: Event | None = None, timeout_s: float | None = 600) -> Any:
        """The handler's answer to a request, plain JSON both.

        Raises Lost when the child ends or takes longer than `timeout_s`, the handler's own TunebookError, and
        RuntimeError with the child's traceback for any other exception.
        """
        with self._one_at_a_time:
            if self.process.poll() is not None:
                self.close()
                self._begin()
            with contextlib.suppress(OSError):  # it has ended: the answer that does not come says so
                self._pipe.send_bytes(json.dumps(request).encode())
            return self._answer(on_event, timeout_s)

    def close(self) -> None:
        """End the child; a second call does nothing."""
        self._pipe.close()  # the child ends itself when it sees this
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self._kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        self._said.seek(0)
        self._said.truncate()
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            command, fds = [*self._command, str(theirs.fileno())], [theirs.fileno()]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said, pass_fds=fds
            )
        try:
            self.started = self._answer(None, self._start_timeout_s)
        except BaseException:
            self.close()
            raise

    def _answer(self, on_event: Event | None, limit_s: float | None) -> Any:
        until = math.inf if limit_s is None else time.monotonic() + limit_s
        kind, value = "event", None
        try:
            while kind == "event":
                kind, value = self._received(until)
                if kind == "event" and on_event:
                    on_event(value)
        except BaseException:  # an interrupt, or on_event's own: the next request would be given this one's answer
            self._kill()
            raise
        if kind == "result":
            return value
        if kind == "error":
            raise TunebookError(value)
        if kind == "bug":
            raise RuntimeError(f"{self.name} failed in its own process:\n{clean(value)}")
        if kind == "memory":
            self._kill()
            raise Lost(f"{self.name} needed more than {self._memory_gib:g} GiB of memory.", "memory")
        if kind == "late":
            self._kill()
            raise Lost(f"{self.name} did not finish within {limit_s:g} s.", "time")
        self.close()
        said = f": {words}" if (words := self.last_words()) else ""
        if self.process.returncode == -signal.SIGKILL:
            raise Lost(f"{self.name} was killed, most likely because the memory is full{said}.", "memory")
        raise Lost(f"{self.name} ended with status {self.process.returncode}{said}.", "ended")

    def _received(self, until: float) -> list[Any]:
        try:
            in_time = self._pipe.poll(None if math.isinf(until) else max(0, until - time.monotonic()))
            return json.loads(self._pipe.recv_bytes()) if in_time else ["late", None]
        except (EOFError, OSError):
            return ["lost", None]

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def last_words(self) -> str:
        """The last three lines that the child wrote to its standard error."""
        size = os.fstat(self._said.fileno()).st_size
        text = os.pread(self._said.fileno(), 4000, max(0, size - 4000)).decode("utf-8", "replace")
        return " / ".join([clean(line.strip())[:300] for line in text.splitlines() if line.strip()][-3:])


def run(function: str, request: Any, *, wall_s: float | None, name: str = "", **limits: Any) -> Any:
    """One call of `function(request, event)` in a fresh child; limits: Worker's. Raises what `Worker.ask` raises."""
    with Worker(function, name=name, **limits) as child:
        return child.ask(request, timeout_s=wall_s)


# ---------------------------------------------------------------- in the child


def main(target: str, start: str, memory_gib: str, pipe: str) -> None:
    """A child's whole life: make the handler that `target` names, answer requests until the parent closes the pipe."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection, request, handler = Connection(int(pipe)), json.loads(start), None

    def send(kind: str, value: Any) -> None:
        connection.send_bytes(json.dumps([kind, value]).encode())

    with contextlib.suppress(EOFError, OSError):  # the parent is done
        while True:
            try:
                if handler is None:
                    module, _, name = target.partition(":")
                    handler = getattr(importlib.import_module(module), name)
                    handler = handler(**request) if isinstance(handler, type) else handler
                    send("result", getattr(handler, "started", None))
                    _limit_memory(float(memory_gib))
                else:
                    send("result", handler(request, functools.partial(send, "event")))
            except TunebookError as error:
                send("error", str(error))
            except MemoryError:
                send("memory", None)
            except Exception:
                send("bug", traceback.format_exc())
            request = json.loads(connection.recv_bytes())
    os._exit(0)


def _end_with(parent: int) -> None:
    """End this process, whatever it is doing, soon after the parent."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _limit_memory(gib: float) -> None:
    if gib and sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        with contextlib.suppress(ValueError):  # a lower limit was set from outside
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (used + int(gib * 2**30), hard))
