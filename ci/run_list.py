"""The runs on this machine and the stage folders that were set aside: listed, brought back, removed.

tunebook runs                                       every run, its stages, what was set aside and how large it is
tunebook runs restore RUN/02_qlora_sft.old-1        back in its place; what stands there is set aside
tunebook runs remove RUN RUN/02_qlora_sft.old-1     whole runs, or stage folders, set aside or not
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from helpers import display, runs
from helpers.errors import TunebookError

STAGE_FOLDER = re.compile(rf"({'|'.join(runs.FOLDERS.values())})(\.old-\d+)?")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tunebook runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=("list", "restore", "remove"), default="list")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a run, RUN/STAGE or RUN/STAGE.old-N, as listed")
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    given = parser.parse_intermixed_args(arguments)
    if given.action != "list" and not given.names:
        raise TunebookError(f"tunebook runs {given.action} needs a name out of what `tunebook runs` lists.")
    if given.action == "list":
        display.say(listing(given.names))
    elif given.action == "restore":
        for found in [_found(name) for name in given.names]:
            display.say(restore(found))
        display.say(listing(sorted({name.partition("/")[0] for name in given.names})))
    else:
        _remove([_found(name) for name in given.names], given.yes)
    return 0


def listing(names: list[str]) -> str:
    """A table of the runs of these names, default all: a line for each stage folder."""
    there = sorted(p for p in runs.root().glob("*/") if any(STAGE_FOLDER.fullmatch(f.name) for f in p.glob("*/")))
    chosen = [_found(name) for name in names] or there
    rows = []
    for run in chosen:
        for folder in sorted((f for f in run.glob("*/") if STAGE_FOLDER.fullmatch(f.name)), key=_order):
            rows.append((f"{run.name}/{folder.name}", *_state(folder), display.size(_bytes(folder))))
    if not rows:
        return f"There are no runs in {runs.root()}."
    aside = [row[0] for row in rows if ".old-" in row[0]]
    text = display.text_table(rows, ("folder", "state", "finished", "size"))
    if aside:
        text += f"\n\n{len(aside)} set aside: tunebook runs restore {aside[0]} brings it back, remove deletes it."
    return text


def restore(folder: Path) -> str:
    """Put a folder that was set aside back in its place; what stands there is set aside. Returns what was done."""
    found = STAGE_FOLDER.fullmatch(folder.name)
    if not found or not found[2]:
        raise TunebookError(f"{folder} was not set aside; name a folder RUN/STAGE.old-N out of `tunebook runs`.")
    run, stage = folder.parent.name, _stage(folder)
    runs.lock(run, stage)
    try:
        runs.set_aside(place := runs.folder(run, stage))
        if place.exists():
            place.rmdir()  # an empty one is not kept
        folder.rename(place)
    finally:
        runs.unlock(run, stage)
    return f"{folder.name} is {place} again."


def _remove(folders: list[Path], sure: bool) -> None:
    for folder in folders:
        stages = [_stage(folder)] if STAGE_FOLDER.fullmatch(folder.name) else list(runs.FOLDERS)
        run = folder.parent.name if len(stages) == 1 else folder.name
        for stage in () if ".old-" in folder.name else stages:
            if other := runs.worker(run, stage):
                raise TunebookError(f"{folder} is being worked on by {other}; stop it first.")
        what = f"{folder} ({display.size(_bytes(folder))})"
        if not sure and (not sys.stdin.isatty() or input(f"Remove {what} for good? [y/N] ").strip().lower() != "y"):
            raise TunebookError(f"{what} was not removed; say y, or --yes where nobody is asked.")
        shutil.rmtree(folder)
        display.say(f"Removed {what}.")


def _found(name: str) -> Path:
    """The folder of a run, or of a stage in it. Raises TunebookError for anything else and for what is not there."""
    run, _, stage = name.removeprefix(f"{runs.root()}/").strip("/").partition("/")
    folder = runs.run_folder(run) / stage
    if stage and not STAGE_FOLDER.fullmatch(stage):
        raise TunebookError(
            f"{name[:200]!r} names no stage's folder; write RUN/{runs.FOLDERS['sft']}.old-1, as listed."
        )
    if folder.is_symlink() or not folder.is_dir():
        raise TunebookError(f"There is no {folder}; `tunebook runs` lists what there is.")
    return folder


def _stage(folder: Path) -> str:
    return next(stage for stage, name in runs.FOLDERS.items() if name == folder.name.split(".")[0])


def _order(folder: Path) -> tuple[str, int]:
    name, _, number = folder.name.partition(".old-")
    return name, int(number or 0)


def _state(folder: Path) -> tuple[str, str]:
    """(how far it came, when it was finished)."""
    run, stage = folder.parent.name, _stage(folder)
    aside = "set aside, " if ".old-" in folder.name else ""
    if not aside and (other := runs.worker(run, stage)):
        return f"{other} works on it", ""
    file = folder / "manifest.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        finished = re.sub("^(at|on) |(?<=\\d) at(?= )", "", display.clock(about["finished_at"]))
        known = [(parent, about["parents"][parent]["manifest_sha256"]) for parent in about["parents"]]
    except (OSError, ValueError, TypeError, KeyError):
        return f"{aside}{'damaged' if file.exists() else 'unfinished'}", ""
    parents = {runs.folder(run, parent) / "manifest.json": sha256 for parent, sha256 in known}
    earlier = [f.parent.name for f, sha256 in parents.items() if not f.is_file() or runs.sha256_file(f) != sha256]
    return f"{aside}finished" + (f", from an earlier {earlier[0]}" if earlier else ""), finished


def _bytes(folder: Path) -> int:
    return sum(f.lstat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())
