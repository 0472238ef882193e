"""Files written whole or not at all, hashes that name contents, and answers from before, kept by content.

    Answers("answers", key(model, precision))         a log of question and answer that survives a kill

A key that leaves out what decides a result gives another result's files one day: put everything into it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from helpers import machine
from helpers.errors import TunebookError

# What decides a model folder's answers; a README or a training log does not.
MODEL_FILES = (
    *(".safetensors", ".gguf", ".model", "config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt"),
    *("vocab.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
)


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Write a whole file or nothing: to a neighbour first, flushed to disk, then renamed over `path`."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """JSON with sorted keys, UTF-8, atomically. NaN and infinity are refused: a score that is not a number is a bug."""
    return write_atomic(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def move_aside(path: Path) -> Path:
    """Rename what stands in `path` to the first free `<name>.old-N` beside it; returns where it is now."""
    names = (path.with_name(f"{path.name}.old-{number}") for number in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """{name: {sha256, bytes}} of named files, eight at once: hashing does not hold Python's lock."""
    with ThreadPoolExecutor(8) as pool:
        hashes = zip(files.items(), pool.map(sha256_file, files.values()), strict=True)
        return {name: {"sha256": found, "bytes": file.stat().st_size} for (name, file), found in hashes}


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the OSError of a full disk or a forbidden place into an error message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TunebookError(
                f"No space left on the disk while writing {path}; free some room and run the same command again, it "
                "resumes where it stopped."
            ) from error
        said = f"{path} cannot be written ({error.strerror or error})"
        raise TunebookError(f"{said}; set TUNEBOOK_RUNS to a folder that can.") from error


# ---------------------------------------------------------------- names by content


def folder() -> Path:
    """`$TUNEBOOK_CACHE`, or `.cache/` in the project."""
    return Path(os.environ.get("TUNEBOOK_CACHE") or machine.PROJECT / ".cache").expanduser()


def key(*parts: Any) -> str:
    """One name for plain JSON values: 32 hexadecimal digits."""
    return hash_json(list(parts))[:32]


def content_hash(path: str | Path, endings: tuple[str, ...] = MODEL_FILES) -> str:
    """sha256 over a file, or over the names and contents of a folder's files with one of these `endings`.

    A file is read again only when its size or time has changed.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(endings))
    states = [(file, file.stat()) for file in files]
    return hash_json([[file.name, _hash_in_state(file, s.st_size, s.st_mtime_ns)] for file, s in states])


@functools.cache
def _hash_in_state(file: Path, size: int, changed_ns: int) -> str:
    return sha256_file(file)


# ---------------------------------------------------------------- answers


class Answers:
    """Questions asked before and their answers, one JSON line each, written when the answer is whole.

    place: a folder, or the name of one in the cache; key: what decides the answers, as `key` makes it. A line torn by
    a kill or with a wrong checksum is as good as never asked. Threads and processes may append to one file; each sees
    its own answers and those from before.
    """

    def __init__(self, place: str | Path, key: str) -> None:
        self.path = (folder() / place if isinstance(place, str) else place) / f"{key[:32]}.jsonl"
        self._values: dict[str, Any] = {}
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        self._turn = threading.Lock()
        for line in lines:
            try:
                record = json.loads(line)
                if record["c"] == _check(record["k"], record["v"]):
                    self._values[record["k"]] = record["v"]
            except (ValueError, TypeError, KeyError):
                continue

    def get(self, key: str) -> Any:
        """What was kept under `key`, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        line = json.dumps({"k": key, "v": value, "c": _check(key, value)}, ensure_ascii=False)
        with writing(self.path), self._turn, open(self.path, "ab") as file:
            file.write(f"\n{line}\n".encode("utf-8", "backslashreplace"))  # the line before may be torn
        self._values[key] = value


def _check(key: str, value: Any) -> int:
    return zlib.crc32(json.dumps([key, value]).encode())
