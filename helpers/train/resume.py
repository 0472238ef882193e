"""Checkpoints that are whole or not there, and going on from the newest whole one.

The trainer writes `checkpoints/checkpoint-N`; when everything is on disk, `seal` writes `complete.json` into it with the
hash of every file. A folder without a matching seal was cut off by a kill or a full disk and is never loaded. A seal also
names the data, the template and the settings that it belongs to, so that another job's checkpoint is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers import runs
from helpers.errors import TunebookError

SEAL = "complete.json"
# What may differ between the run that wrote a checkpoint and the one that goes on with it.
FREE = ("resume", "mirror", "loggers", "keep_checkpoints", "plan_for")


def identity(params: Any, data: Any, tokenizer: Any) -> dict[str, Any]:
    """What a checkpoint belongs to: hashes of the data files, the template and the tokenizer, and the settings."""
    from helpers.model.loading import template_hash, tokenizer_hash

    files = {n: a["sha256"] for n, a in data.data["artifacts"].items() if n.endswith(".parquet")}
    return {
        "data": runs.hash_json(files),
        "template": template_hash(tokenizer),
        "tokenizer": tokenizer_hash(tokenizer),
        "settings": {k: v for k, v in params.as_dict().items() if k not in FREE},
    }


def seal(folder: Path, of: dict[str, Any]) -> None:
    """Write the completeness marker of a checkpoint, last: the hash and size of every file, flushed to disk."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        files[file.relative_to(folder).as_posix()] = {"sha256": runs.sha256_file(file), "bytes": file.stat().st_size}
    runs.write_json(folder / SEAL, {"files": files, **of})


def opened(folder: Path) -> dict[str, Any] | None:
    """The seal of a whole checkpoint, or None when it is missing or any file is cut off or altered."""
    try:
        seal_of = json.loads((folder / SEAL).read_text())
        for name, known in seal_of["files"].items():
            file = folder / name
            if file.stat().st_size != known["bytes"] or runs.sha256_file(file) != known["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seal_of


def numbered(folder: Path) -> list[Path]:
    """checkpoint-N folders, newest first."""
    found = [
        (int(m[1]), p)
        for p in folder.glob("checkpoint-*")
        if (m := re.fullmatch(r"checkpoint-(\d+)", p.name)) and p.is_dir()
    ]
    return [p for _, p in sorted(found, reverse=True)]


def newest(folder: Path, of: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint in `folder`; cut-off ones are removed and said so.

    Raises TunebookError when it was written for other data, another template or other settings.
    """
    for checkpoint in numbered(folder):
        seal_of = opened(checkpoint)
        if seal_of is None:
            print(f"{checkpoint.name} was cut off while it was written; it is removed and the one before it is used.")
            shutil.rmtree(checkpoint)
            continue
        for what, name in (("data", "The data"), ("template", "The chat template"), ("tokenizer", "The tokenizer")):
            if seal_of.get(what) != of[what]:
                raise TunebookError(
                    f"{name} changed since {checkpoint} was written, so it cannot be gone on with; set resume to 'never' to "
                    "start over with what is there now, or put the earlier one back."
                )
        differ = sorted(k for k in of["settings"] if seal_of.get("settings", {}).get(k) != of["settings"][k])
        if differ:
            raise TunebookError(
                f"{checkpoint} was written with another {', '.join(differ)}; set resume to 'never' to start over, or put the "
                "earlier values back. To train an adapter further with new settings, name it in start_from."
            )
        return checkpoint
    return None


def total_steps(checkpoint: Path) -> int:
    """Optimizer steps of the whole run that a checkpoint belongs to."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text())["max_steps"])


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when a checkpoint was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def must_go_on(stage: Any) -> None:
    """With resume "must": refuse a stage folder that was opened afresh, and put the unfinished one back where it was."""
    if stage.resumed:
        return
    old = sorted(stage.path.parent.glob(f"{stage.path.name}.old-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
    old = [p for p in old if not (p / "manifest.json").exists()]
    if not old:
        raise TunebookError(
            f"resume is 'must' and {stage.path} holds no unfinished run to go on with; set resume to 'auto' to begin one."
        )
    before, now = (json.loads((p / "plan.json").read_text()) for p in (old[-1], stage.path))
    differ = [k for k in now["params"] if before["params"].get(k) != now["params"][k]]
    why = (
        f"its parameters differ ({', '.join(differ)})"
        if differ
        else f"the {' and '.join(now['parents'])} stage changed since"
    )
    shutil.rmtree(stage.path)
    old[-1].rename(stage.path)
    raise TunebookError(
        f"resume is 'must' and the unfinished run in {stage.path} cannot be gone on with: {why}. Put it back as it was, or "
        "set resume to 'never' to start over."
    )


def mirror(source: Path, target: Path) -> None:
    """Copy a file or a sealed checkpoint to a mounted folder; a checkpoint's seal goes last, so a cut-off copy is not used."""
    if source.is_file():
        runs.write_atomic(target / source.name, source.read_bytes())
        return
    place = target / source.name
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(source, place, ignore=shutil.ignore_patterns(SEAL))
    runs.write_atomic(place / SEAL, (source / SEAL).read_bytes())
    for old in numbered(target)[3:]:
        shutil.rmtree(old)


def fetch(target: Path, folder: Path, of: dict[str, Any]) -> Path | None:
    """Bring the newest whole checkpoint of a mirror into an empty `folder`; None when the mirror holds none of this job."""
    for checkpoint in numbered(target):
        seal_of = opened(checkpoint)
        if seal_of is not None and all(seal_of.get(k) == of[k] for k in of):
            place = folder / checkpoint.name
            shutil.copytree(checkpoint, place)
            for name in ("log.jsonl",):
                if (target / name).is_file():
                    shutil.copy2(target / name, folder.parent / name)
            print(f"{checkpoint.name} is brought back from {target}.")
            return place
    return None


@contextlib.contextmanager
def disk_full_is_a_sentence(folder: Path) -> Iterator[None]:
    """Turn what libraries raise on a full disk into a sentence; the checkpoint that was being written has no seal."""
    try:
        yield
    except Exception as error:  # every library wraps the system's error in its own; anything else is raised again
        if not is_disk_full(error):
            raise
        for checkpoint in numbered(folder)[:1]:
            if not (checkpoint / SEAL).exists():
                shutil.rmtree(checkpoint, ignore_errors=True)
        raise TunebookError(
            f"No space left on the disk while writing to {folder}; free some room and run the same command again, it goes on "
            "from the last whole checkpoint."
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what it was raised from, says that the disk (or a quota or a file-size limit) is full."""
    words = ("no space left", "disk quota exceeded", "file too large", "os error 28", "os error 27", "os error 122")
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if (
            any(w in str(error).lower() for w in words)
            or "PytorchStreamWriter failed writing" in str(error)
            or "iostream error" in str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
