"""One process at a time works on a stage: a locked file in the run's folder, let go when the process ends, however it
ends.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

import psutil

from helpers.errors import TunebookError
from helpers.storage import disk_error

_held: dict[Path, TextIO] = {}


def take(run: Path, stage: str) -> None:
    """Keep other processes off a stage of the run in this folder until `release` or the end of this process.

    Raises TunebookError when another process works on it: two writers would mix their checkpoints.
    """
    path = run / ".locks" / stage
    if path in _held:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - open as long as it is locked
    except OSError as error:
        raise disk_error(error, path) from error
    file.seek(0)
    owner, _, host = file.read().partition(" ")
    if _taken(file, owner, host):
        file.close()
        told = f"Stage {stage!r} of the run {run.name!r} is being worked on by process {owner}"
        raise TunebookError(f"{told}; wait for it, stop it, or use another run name.")
    file.truncate(0)
    file.write(f"{os.getpid()} {socket.gethostname()}")
    file.flush()
    _held[path] = file


def release(run: Path, stage: str) -> None:
    """Let go of a lock that this process holds; nothing happens when it holds none."""
    file = _held.pop(run / ".locks" / stage, None)
    if file is not None:
        file.truncate(0)  # where nothing can be locked, the name alone says that somebody works
        file.close()


def _taken(file: TextIO, owner: str, host: str) -> bool:
    """Lock the file. Where its disk has no locks (some network and mounted drives), go by the process that it names."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        print(f"{file.name} cannot be locked ({error.strerror}); the process that it names is looked for instead.")
    other = host == socket.gethostname() and owner.isdigit() and int(owner) != os.getpid()
    return other and psutil.pid_exists(int(owner))


def _forget() -> None:
    """In a forked worker: the lock is the parent's, and ends with it."""
    while _held:
        _held.popitem()[1].close()


os.register_at_fork(after_in_child=_forget)
