"""Tokenised files kept for the next run, under a key of everything that decides them: rows, tokenizer, template, code, settings.

A key that leaves one of them out trains on another tokenizer's ids one day. Old entries are removed, oldest first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers import cache

KEEP_BYTES = 4 * 2**30


def root() -> Path:
    return cache.folder() / "data"


def code_hash() -> str:
    """sha256 of the source files of this package, and the versions of what they tokenise and write with."""
    import importlib.metadata

    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    for package in ("transformers", "tokenizers", "pyarrow", "jinja2"):
        digest.update(f"{package}={importlib.metadata.version(package)}".encode())
    return digest.hexdigest()


def key(ids: Iterable[str], **parts: Any) -> str:
    """One name for the rows (their ids, in order) and every other part, given as plain JSON values."""
    digest = hashlib.sha256()
    for one in ids:
        digest.update(one.encode() + b"\n")
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def get(name: str, folder: Path) -> dict[str, Any] | None:
    """Copy an entry's files into `folder` and return what was noted with it; None when there is no whole entry."""
    entry = root() / name
    try:
        noted = json.loads((entry / "entry.json").read_text())
        for file, size in noted["files"].items():
            if (entry / file).stat().st_size != size:
                return None
        for file in noted["files"]:
            partial = folder / f".{file}.{os.getpid()}.partial"
            shutil.copyfile(entry / file, partial)
            os.replace(partial, folder / file)
        os.utime(entry / "entry.json")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return noted["note"]


def put(name: str, folder: Path, files: Iterable[str], note: dict[str, Any]) -> None:
    """Keep copies of `files` and a note under `name`; a cache that cannot be written is said, and nothing else."""
    entry, made = root() / name, root() / f".{name}.{os.getpid()}"
    try:
        made.mkdir(parents=True, exist_ok=True)
        sizes = {}
        for file in files:
            shutil.copyfile(folder / file, made / file)
            sizes[file] = (made / file).stat().st_size
        (made / "entry.json").write_text(json.dumps({"files": sizes, "note": note}))
        shutil.rmtree(entry, ignore_errors=True)
        made.rename(entry)
        _prune()
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        print(f"The cache in {root()} could not be written ({error.strerror}); the run goes on without it.")


def _prune() -> None:
    entries = sorted((file.stat().st_mtime, file.parent) for file in root().glob("*/entry.json"))
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for _, entry in entries}
    total = sum(sizes.values())
    for _, entry in entries[:-1]:
        if total <= KEEP_BYTES:
            return
        total -= sizes[entry]
        shutil.rmtree(entry, ignore_errors=True)
