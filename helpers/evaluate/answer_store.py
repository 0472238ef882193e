"""Everything a model was asked before, kept by content: a rerun costs nothing, a killed run goes on where it stopped.

One file of JSON lines a model; its name is the hash of the weights, tokenizer and precision. A line is written when its
answer is finished. A line torn by a kill is skipped, its question is asked again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.runs import hash_json, sha256_file

_KNOWN_HASHES: dict[tuple[str, int, int], str] = {}
# What decides a model folder's answers; a README or a training log does not.
_ANSWERING = (
    ".safetensors",
    ".gguf",
    ".model",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "generation_config.json",
)


class Store:
    """Answers of one model. `put` is safe against kills; two processes may append to the same file."""

    def __init__(self, folder: Path, key: str):
        from helpers.storage import disk_error

        self.path = Path(folder) / f"{key[:24]}.jsonl"
        self._values: dict[str, Any] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._torn = bool(lines and lines[-1])
        for line in lines:
            try:
                record = json.loads(line)
                self._values[record["k"]] = record["v"]
            except (ValueError, TypeError, KeyError):
                continue  # torn by a kill, or empty: as good as never asked

    def get(self, key: str) -> Any:
        """What was kept under `key`, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        from helpers.storage import disk_error

        line = json.dumps({"k": key, "v": value}, ensure_ascii=False)
        try:
            with open(self.path, "ab") as file:
                file.write((("\n" if self._torn else "") + line + "\n").encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._torn = False
        self._values[key] = value


def key(*parts: Any) -> str:
    """Hash of plain JSON values."""
    return hash_json(list(parts))


def content(path: Path) -> str:
    """sha256 over a model file, or over the files of a model or adapter folder that decide its answers."""
    path = Path(path)
    files = (
        [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(_ANSWERING))
    )
    return hash_json([[f.name, _hash(f)] for f in files])


def _hash(path: Path) -> str:
    state = path.stat()
    known = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if known not in _KNOWN_HASHES:
        _KNOWN_HASHES[known] = sha256_file(path)
    return _KNOWN_HASHES[known]
