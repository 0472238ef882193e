"""Files that are written whole or not at all, and the hashes that name contents."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

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
