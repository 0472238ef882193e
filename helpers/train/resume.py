"""Checkpoints that are whole or not there, resuming from the newest whole one, and their copies on a mirror.

The trainer writes `checkpoints/checkpoint-N`; when all of it is on disk, `seal` writes `complete.json` into it with the
hash of every file. A folder without a matching seal was cut off by a kill or a full disk and is never loaded. A seal
also names the data, the template and the settings that it belongs to, so that another job's checkpoint is refused.
A mirror keeps them under `<mirror>/<run>/<stage>/<identity>/`: no two jobs share a folder there.
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

from helpers import cache, machine, runs
from helpers.display import say
from helpers.errors import TunebookError
from helpers.model.loading import template_hash, tokenizer_hash

SEAL = "complete.json"
# What may differ between the run that wrote a checkpoint and the one that resumes from it.
FREE = ("mirror", "loggers", "keep_checkpoints", "plan_for", "cpu_offload", "shard_weights")
MIRRORED = 3  # newest checkpoints kept on a mirror
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = re.compile(
    "(?i)no space left|quota exceeded|file too large|os error (27|28|122)|streamwriter failed writing|iostream error"
)


def identity(params: Any, data: Any, tokenizer: Any) -> dict[str, Any]:
    """What a checkpoint belongs to: the settings, and hashes of the data files, the template and the tokenizer."""
    files = {n: a["sha256"] for n, a in data.data["artifacts"].items() if n.endswith(".parquet")}
    hashes = (runs.hash_json(files), template_hash(tokenizer), tokenizer_hash(tokenizer))
    settings = {k: v for k, v in params.as_dict().items() if k not in FREE}
    return settings | dict(zip(("the data", "the chat template", "the tokenizer"), hashes, strict=True))


def seal(folder: Path, of: dict[str, Any]) -> None:
    """Write the completeness marker of a checkpoint, last: the hash and size of every file, flushed to disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL)
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    known = cache.listed({file.relative_to(folder).as_posix(): file for file in files})
    runs.write_json(folder / SEAL, {"files": known, "of": of})


def sealed(folder: Path) -> dict[str, Any] | None:
    """The seal of a whole checkpoint, or None when it is missing or any file is missing, cut off or altered.

    Raises TunebookError when the folder cannot be read: that proves nothing about what is in it.
    """
    try:
        found = json.loads((folder / SEAL).read_text())
        if cache.listed({name: folder / name for name in found["files"]}) != found["files"]:
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise TunebookError(
            f"{folder} cannot be read ({error.strerror or error}); it is left as it is. Make it readable and run the "
            "same command again, or set resume to 'never' to start over."
        ) from error
    return found


def numbered(folder: Path) -> list[Path]:
    """checkpoint-N folders, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when a checkpoint was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint: max_steps, the steps of the whole run, among much else."""
    return json.loads((checkpoint / "trainer_state.json").read_text())


def newest(folder: Path, of: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint in `folder`; cut-off ones are removed and said so.

    Raises TunebookError when it was written for other data, another template or other settings.
    """
    for checkpoint in numbered(folder):
        found = sealed(checkpoint)
        if found is None:
            say(f"{checkpoint.name} was cut off while it was written; it is removed and the one before it is used.")
            shutil.rmtree(checkpoint)
            continue
        differ = [what for what in of if found.get("of", {}).get(what) != of[what]]
        if differ:
            raise TunebookError(
                f"{checkpoint} was written before {', '.join(differ)} changed, so the run cannot be resumed; put it "
                "back, or set resume to 'never' to start over. To train an adapter further, name it in start_from."
            )
        return checkpoint
    return None


class Mirror:
    """This job's folder on a mounted drive. Only whole checkpoints with the job's own seal are ever deleted there."""

    def __init__(self, root: str, stage: runs.Stage, of: dict[str, Any]) -> None:
        place = machine.path(root) / stage.params.run / runs.FOLDERS[stage.name]
        self.folder, self.of = place / runs.hash_json(of)[:12], of

    def check(self) -> None:
        """Raises TunebookError when nothing can be written there."""
        try:
            runs.write_atomic(self.folder / ".writable", "").unlink()
        except (OSError, TunebookError) as error:
            raise TunebookError(
                f"mirror is set and {self.folder} cannot be written ({error}); mount the drive, name another folder, "
                "or leave mirror empty."
            ) from error

    def put(self, checkpoint: Path, log: Path) -> None:
        """Copy a sealed checkpoint and the log; the seal goes last, so that a cut-off copy is never used.

        A mirror that is full or gone is announced and does not end the training.
        """
        place = self.folder / checkpoint.name
        try:
            if not self.folder.is_dir():  # a drive that was unmounted: what is copied to its place stays on this disk
                raise FileNotFoundError("the folder is gone; mount the drive again")
            shutil.copytree(checkpoint, place, ignore=shutil.ignore_patterns(SEAL), dirs_exist_ok=True)
            runs.write_atomic(place / SEAL, (checkpoint / SEAL).read_bytes())
            shutil.copy2(log, self.folder)
            for old in [p for p in numbered(self.folder) if self._ours(p)][MIRRORED:]:
                shutil.rmtree(old)
        except (OSError, TunebookError) as error:
            say(f"{checkpoint.name} could not be copied to the mirror {self.folder} ({error}); training continues.")

    def fetch(self, checkpoints: Path) -> Path | None:
        """Bring the newest whole checkpoint and the log back; None when the mirror holds none of this job."""
        for checkpoint in numbered(self.folder):
            if self._ours(checkpoint):
                shutil.copytree(checkpoint, checkpoints / checkpoint.name, dirs_exist_ok=True)
                shutil.copy2(self.folder / "log.jsonl", checkpoints.parent)
                say(f"{checkpoint.name} is brought back from {self.folder}.")
                return checkpoints / checkpoint.name
        return None

    def _ours(self, checkpoint: Path) -> bool:
        found = sealed(checkpoint)
        return found is not None and found.get("of") == self.of


@contextlib.contextmanager
def disk_full_is_a_message(folder: Path) -> Iterator[None]:
    """Turn what libraries raise on a full disk, a quota or a file-size limit into a message.

    The checkpoint that was being written has no seal and is removed.
    """
    try:
        yield
    except Exception as error:  # every library wraps the system's error in its own; anything else is raised again
        cause: BaseException | None = error
        while cause and getattr(cause, "errno", 0) not in FULL and not FULL_WORDS.search(str(cause)):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        for checkpoint in numbered(folder)[:1]:
            if not (checkpoint / SEAL).exists():
                shutil.rmtree(checkpoint, ignore_errors=True)
        raise TunebookError(
            f"No space left on the disk while writing to {folder}; free some room and run the same command again, it "
            "resumes from the last whole checkpoint."
        ) from error
