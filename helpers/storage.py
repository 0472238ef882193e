"""Files that are written whole or not at all, the hashes that name contents, and locks on a run's stages."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any, TextIO

import psutil

from helpers.errors import TunebookError


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Write a whole file or nothing: to a neighbour first, flushed to disk, then renamed over `path`."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(error, path) from error
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """JSON with sorted keys, UTF-8, atomically. NaN and infinity are refused: a score that is not a number is a bug."""
    return write_atomic(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def disk_error(error: OSError, path: Path) -> Exception:
    """An OSError as an error message when it means a full disk or a forbidden place, else the error itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TunebookError(
            f"No space left on the disk while writing {path}; free some room and run the same command again, it "
            "resumes where it stopped."
        )
    if error.errno in (errno.EACCES, errno.EROFS):
        return TunebookError(f"{path} cannot be written ({error.strerror}); set TUNEBOOK_RUNS to a folder that can.")
    return error


# ---------------------------------------------------------------- locks

_held: dict[Path, TextIO] = {}


def lock(run: Path, stage: str) -> None:
    """Keep other processes off a stage of the run in this folder until `unlock` or the end of this process.

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


def unlock(run: Path, stage: str) -> None:
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
