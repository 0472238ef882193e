"""A run kept on a mounted drive as it is worked on, so that another machine goes on with it.

`TUNEBOOK_KEEP` names the folder (a notebook's `keep_runs_in` sets it); without it nothing is copied. Small files go
there after every step, all of a stage when it is finished, its manifest last; checkpoints go to `checkpoints/` by
`resume.Mirror`. A stage that is asked for and not on this machine is brought back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from helpers import cache, display
from helpers.errors import TunebookError

SMALL = 4_000_000  # bytes; larger files are copied once, when the stage is finished
# What serves this machine alone, or lies in the mirror.
HERE_ONLY = {"checkpoints", "work", "tensorboard"}
UNFINISHED = ("plan.json", "params.yaml", "log.jsonl", "samples.jsonl")  # enough to resume from the mirror
MANIFEST, PLAN = "manifest.json", "plan.json"
_met: set[Path] = set()  # folders that were there: one that is gone was a drive, and is not made on this disk


def home() -> Path | None:
    """The folder that runs are kept in; None when they stay on this machine."""
    named = os.environ.get("TUNEBOOK_KEEP")
    return Path(named).expanduser() if named and not int(os.environ.get("RANK", "0")) else None


def mirror() -> str:
    """Folder for checkpoints, as the parameter `mirror` takes it; "" when runs stay on this machine."""
    return str(kept / "checkpoints") if (kept := home()) else ""


def keep(folder: Path, all_of_it: bool = False) -> None:
    """Copy a stage's small files that have changed, or all of it. A drive that is full or gone is announced, no more.

    Another result that the drive holds under this name is kept beside it as `<stage>.old-N`.
    """
    if not (place := _place(folder)):
        return
    try:
        if (top := place.parent.parent) in _met and not top.is_dir():
            raise FileNotFoundError(2, "the folder is gone; mount the drive again")
        if any((place / name).is_file() and not _same(place, folder, name) for name in (PLAN, MANIFEST)):
            cache.move_aside(place)
        copied = [_copy(file, place / name, all_of_it) for name, file in _files(folder, None if all_of_it else SMALL)]
        _met.update([top] if top.is_dir() else [])
        if all_of_it:
            _copy(folder / MANIFEST, place / MANIFEST)
            display.say(f"{folder.name} is kept in {place}: {display.size(sum(copied))} copied.")
    except OSError as error:
        left = "the stage is finished on this machine alone" if all_of_it else "the work continues"
        display.say(f"{folder.name} could not be kept in {place} ({error.strerror or error}); {left}.")


def bring(folder: Path) -> None:
    """Bring a stage that this machine does not have: all of a finished one, of an unfinished one what resumes it.

    Other work in the folder is left alone. Raises TunebookError when the drive cannot be read.
    """
    place = _place(folder)
    if not place or (folder / MANIFEST).exists():
        return
    try:
        _bring(place, folder)
    except OSError as error:
        raise TunebookError(
            f"Runs are kept in {place.parent.parent}, which cannot be read ({error.strerror or error}); mount it again "
            "and run the cell again, or set keep_runs_in to 'this session' (TUNEBOOK_KEEP to nothing)."
        ) from error


def _bring(place: Path, folder: Path) -> None:
    if not (place / PLAN).is_file():
        return
    if (folder / PLAN).exists() and not _same(place, folder, PLAN):
        return
    if (place / MANIFEST).is_file():
        copied = [_copy(file, folder / name) for name, file in _files(place)]
        _copy(place / MANIFEST, folder / MANIFEST)
        display.say(f"{folder.name} is brought from {place}: {display.size(sum(copied))}.")
    elif not (folder / PLAN).exists():
        for name in UNFINISHED:
            if (place / name).is_file():
                _copy(place / name, folder / name)


def holds(folder: Path) -> bool:
    """Whether the drive has this finished stage."""
    with contextlib.suppress(OSError):
        return bool((place := _place(folder)) and _same(place, folder, MANIFEST))
    return False


def _place(folder: Path) -> Path | None:
    return kept / folder.parent.name / folder.name if (kept := home()) else None


def _same(place: Path, folder: Path, name: str) -> bool:
    here, there = folder / name, place / name
    return here.is_file() and there.is_file() and here.read_bytes() == there.read_bytes()


def _files(folder: Path, most: int | None = None) -> Iterator[tuple[str, Path]]:
    """(name, file) of what another machine needs, the manifest left out; of at most `most` bytes each."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        apart = name.parts[0] in HERE_ONLY or file.name.endswith(".partial") or str(name) == MANIFEST
        if file.is_file() and not file.is_symlink() and not apart and (most is None or file.stat().st_size <= most):
            yield str(name), file


def _copy(source: Path, target: Path, anew: bool = False) -> int:
    """Copy a file, whole or not at all, unless it is there; returns the bytes that were copied.

    anew: a small one is copied in any case, as its size and time may be the same by chance.
    """
    state = source.stat()
    there = target.stat() if target.is_file() and not (anew and state.st_size <= SMALL) else None
    if there and (there.st_size, int(there.st_mtime)) == (state.st_size, int(state.st_mtime)):
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.copy2(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return state.st_size
