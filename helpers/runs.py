"""Run folders: one folder a stage, finished only when its manifest is there, and trusted only while it still matches.

    runs/<run>/<stage>/   params.yaml   metrics.json   executed.ipynb   artifacts...   manifest.json (last, atomically)

A stage looks at its folder with `stage`, begins to write with `Stage.begin` and ends with `Stage.finish`. Later stages
read it with `load`, which refuses a folder that is unfinished or whose files no longer have the hashes written down.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil
import yaml

from helpers import display, drive, machine
from helpers.cache import hash_json, listed, move_aside, sha256_file, write_atomic, write_json, writing
from helpers.errors import TunebookError
from helpers.parameter import check_run
from helpers.params import Params

SCHEMA_VERSION = 2
OWN_HASH = "content_hash"  # of the manifest's other fields: one that was edited or damaged proves nothing
INHERITED = ("model", "template_hash", "tokenizer_hash")
FOLDERS = {
    "data": "01_data_prep",
    "sft": "02_qlora_sft",
    "orpo": "03_orpo_alignment",
    "gguf": "04_gguf_export",
    "eval": "05_evaluation",
}
# Which finished stages a stage reads. "?" marks one that is read when it is there.
PARENTS = {
    "data": (),
    "sft": ("data",),
    "orpo": ("data", "sft"),
    "gguf": ("data", "sft?", "orpo?"),
    "eval": ("data", "sft?", "orpo?", "gguf?"),
}
# Files that are not part of what a stage promises: they change after it ends, or serve only to resume it.
UNHASHED = ("manifest.json", "plan.json", "executed.ipynb", "checkpoints/", "tensorboard/", "work/", "shown/")


def root() -> Path:
    """The folder that holds all runs: `$TUNEBOOK_RUNS`, or `runs/` in the project."""
    return Path(os.environ.get("TUNEBOOK_RUNS") or machine.PROJECT / "runs")


def run_folder(run: str) -> Path:
    """`runs/<run>`. Raises TunebookError for a name that would leave the runs folder."""
    return root() / check_run(run)


def folder(run: str, stage: str) -> Path:
    """`runs/<run>/<stage folder>`."""
    return run_folder(run) / FOLDERS[stage]


# ---------------------------------------------------------------- manifests


@dataclass(repr=False)
class Manifest(display.Shown):
    """What a finished stage wrote down about itself. data: the parsed manifest.json; sha256: the file's hash."""

    path: Path
    data: dict[str, Any]
    sha256: str = ""

    @property
    def metrics(self) -> dict[str, Any]:
        return self.data["metrics"]

    @property
    def params(self) -> dict[str, Any]:
        return self.data["params"]

    def artifact(self, name: str) -> Path:
        """Path of a file or folder of this stage. Raises TunebookError when it isn't there."""
        path = self.path / name
        if not path.exists():
            raise TunebookError(f"{path} is missing; run the {self.data['stage']} stage again to make it.")
        return path

    def verified(self, name: str) -> Path:
        """Path of a file of this stage. Raises TunebookError when it is not what the stage wrote."""
        if problem := _altered(self, [name]):
            raise TunebookError(
                f"Stage {self.data['stage']!r} {problem}; {_remedy(self.data['run'], self.data['stage'])}."
            )
        return self.path / name

    def _shown(self) -> display.Html:
        about = self.data
        rows = [("stage", about["stage"]), ("folder", self.path), ("took", display.duration(about["wall_s"]))]
        rows += [("peak memory", f"{about['peak_memory_gib']} GiB"), ("files", len(about["artifacts"]))]
        return display.shown(rows)


def load(run: str, stage: str, verify: bool = True) -> Manifest:
    """A finished stage of a run. Raises TunebookError when it is missing, unfinished, failed or changed since."""
    path = folder(run, stage)
    try:
        drive.bring(path)
        content = (path / "manifest.json").read_bytes()
        manifest = Manifest(path, json.loads(content), hashlib.sha256(content).hexdigest())
        state = (manifest.data["status"], manifest.data["schema_version"])
        problem = "" if state == ("finished", SCHEMA_VERSION) else f"has a manifest of status and schema {state}"
        if not problem and manifest.data.get(OWN_HASH) != _own_hash(manifest.data):
            problem = f"has a manifest in {path} that was changed after it was written"
        if verify and not problem:
            problem = _altered(manifest)
    except FileNotFoundError:
        problem = f"did not finish (no manifest in {path})" if path.is_dir() else "has not been run yet"
    except (ValueError, TypeError, KeyError, RecursionError):
        problem = f"has a damaged manifest in {path}"
    except OSError as error:
        problem = f"cannot be read ({path}: {error.strerror})"
    if problem:
        raise TunebookError(f"Stage {stage!r} of the run {run!r} {problem}; {_remedy(run, stage)}.")
    return manifest


def write_manifest(folder: Path, data: dict[str, Any]) -> None:
    """Write a stage's manifest.json with the hash of its own content."""
    write_json(folder / "manifest.json", data | {OWN_HASH: _own_hash(json.loads(json.dumps(data)))})


def _own_hash(data: dict[str, Any]) -> str:
    return hash_json({name: value for name, value in data.items() if name != OWN_HASH})


def _altered(manifest: Manifest, names: Iterable[str] = ()) -> str:
    for name in names or manifest.data["artifacts"]:
        known, file = manifest.data["artifacts"][name], manifest.path / name
        if not file.is_file() or file.stat().st_size != known["bytes"] or sha256_file(file) != known["sha256"]:
            return f"did not write {file} as it stands there (missing or altered)"
    return ""


def _remedy(run: str, stage: str) -> str:
    return f"run notebook {FOLDERS[stage]} again (bash ci/run.sh --run {run} --from {FOLDERS[stage][:2]})"


# ---------------------------------------------------------------- a stage at work


@dataclass
class Stage:
    """A stage's folder. Files put under `path` after `begin` become artifacts when `finish` writes the manifest.
    done: its manifest when it is finished already (`_done` says with what); note: what a reader is told then. resumed:
    `begin` found what an earlier run of the same parameters and parents left unfinished."""

    name: str
    params: Params
    path: Path
    parents: dict[str, Manifest]
    done: Manifest | None = None
    note: str = ""
    begun: bool = False
    resumed: bool = False
    _started: float = field(default_factory=time.monotonic)
    _code: str = ""
    _plan: dict[str, Any] = field(default_factory=dict)
    _opened: int = field(default_factory=time.time_ns)

    def finished_meanwhile(self) -> bool:
        """Whether another process has finished this very work since the stage was opened; then `done` holds it."""
        file = self.path / "manifest.json"
        if not self.begun and file.is_file() and file.stat().st_mtime_ns > self._opened:
            self.done, self.note = _done(self.name, self.params, self._plan)
        return self.done is not None

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._started

    def moved(self) -> str:
        """Which parameters were changed, by a slider say, since the stage was opened, and what to do; "" for none."""
        now, opened = self.params.as_dict(), self._plan["params"]
        changed = [name for name, value in opened.items() if now[name] != value]
        told = f"{', '.join(changed)} changed ({', '.join(f'{opened[n]!r} → {now[n]!r}' for n in changed)})"
        return f"{told} after stage {self.name!r} was opened; run the cell that opens it again." if changed else ""

    def check(self) -> None:
        """Raises TunebookError when a parameter was changed since the stage was opened."""
        if told := self.moved():
            raise TunebookError(told)

    def begin(self) -> bool:
        """Start the work: lock the folder, keep aside what is there unless it is resumed. False when already begun."""
        self.check()
        if int(os.environ.get("RANK", "0")):  # torchrun: the first process has begun the work for all
            return False
        lock(self.params.run, self.name)
        if self.begun:  # a step that failed let go of the lock, and another process may have had it
            if not _unfinished(self.path, self._plan):
                unlock(self.params.run, self.name)
                raise TunebookError(f"Another process has worked in {self.path}; run the notebook from its first cell.")
            return False
        self.params.freeze()
        self._started, self._code = time.monotonic(), machine.code_hash(FOLDERS[self.name])
        self.resumed = self.params.resumes and _unfinished(self.path, self._plan)
        if not self.resumed:
            set_aside(self.path)
        write_json(self.path / "plan.json", self._plan)
        values = yaml.safe_dump(self._plan["params"], sort_keys=False, allow_unicode=True)
        write_atomic(self.path / "params.yaml", f"# Parameters as they were used, for `papermill -f`.\n{values}")
        if self.resumed:
            display.say(f"Resuming the unfinished stage in {self.path}")
        self.begun = True
        return True

    def finish(self, metrics: dict[str, Any], **about: Any) -> Manifest:
        """Hash every file, write metrics.json, then manifest.json last. The parents must still be what they were.
        metrics: plain JSON numbers and strings; NaN is refused. about: what else the manifest holds. The base model
        (name, path, revision, origin), its template_hash and tokenizer_hash are the parents' unless they are given."""
        for stage, parent in self.parents.items():
            file = parent.path / "manifest.json"
            if not file.is_file() or sha256_file(file) != parent.sha256:
                raise TunebookError(
                    f"Stage {stage!r} was rerun while {self.name!r} worked on its results; run {self.name!r} again."
                )
        write_json(self.path / "metrics.json", metrics)
        files = [p for p in sorted(self.path.rglob("*")) if p.is_file() and not p.is_symlink()]
        made = {p.relative_to(self.path).as_posix(): p for p in files if not p.name.endswith(".partial")}
        artifacts = listed({name: file for name, file in made.items() if not name.startswith(UNHASHED)})
        lineage = [about, *(parent.data for parent in reversed(self.parents.values()))]
        inherited = {key: next((d[key] for d in lineage if d.get(key)), None) for key in INHERITED}
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "stage": self.name,
            "run": self.params.run,
            "status": "finished",
            "params": self._plan["params"],
            "metrics": metrics,
            "parents": {s: {"folder": p.path.name, "manifest_sha256": p.sha256} for s, p in self.parents.items()},
            "artifacts": artifacts,
            "wall_s": round(self.seconds, 1),
            "peak_memory_gib": machine.peak_memory_gib(),
            "resumed": self.resumed,
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "code_hash": self._code,
            **machine.versions(),
            **about,
            **inherited,
        }
        write_manifest(self.path, manifest)
        drive.keep(self.path, all_of_it=True)
        unlock(self.params.run, self.name)
        return load(self.params.run, self.name, verify=False)


def stage(name: str, params: Params) -> Stage:
    """Look at a stage's folder; nothing is written until `Stage.begin`. Raises TunebookError for a parent that is not
    there or was made with another chat template than its own, and, where there is work to do, for a changed one."""
    for wanted in (name, *PARENTS[name]):
        drive.bring(folder(params.run, wanted.rstrip("?")))
    parents = {parent: load(params.run, parent, verify=False) for parent in parents_of(name, params)}
    _check_lineage(params.run, parents)
    plan = {"params": params.as_dict(), "parents": {s: m.sha256 for s, m in parents.items()}}
    done, note = _done(name, params, plan)
    for parent in parents if done is None else ():  # what is only shown again reads none of their files
        load(params.run, parent)
    return Stage(name, params, folder(params.run, name), parents, done, note, _plan=plan)


def parents_of(name: str, params: Params) -> list[str]:
    """The stages that a stage with these parameters reads; of those that it can do without, the finished ones."""
    # Preference training may begin from the base, or from an adapter of the user's.
    needed = [p for p in PARENTS[name] if p != "sft" or getattr(params, "start_from", "sft") == "sft"]
    there = (p for p in needed if p[-1] != "?" or (folder(params.run, p[:-1]) / "manifest.json").is_file())
    return [parent.rstrip("?") for parent in there]


def _done(name: str, params: Params, plan: dict[str, Any]) -> tuple[Manifest | None, str]:
    """(the stage's manifest when it is finished with these very parameters, parents and code, what to say of it). Where
    a person is watching, parameters that the notebook leaves at their default and the code may differ: looking must not
    train anew what a command or a recipe made."""
    with contextlib.suppress(TunebookError):
        manifest, now = load(params.run, name), plan["params"]
        made = {parent: about["manifest_sha256"] for parent, about in manifest.data["parents"].items()}
        differ = [n for n, value in now.items() if manifest.params.get(n) != value]
        code = manifest.data.get("code_hash") == machine.code_hash(FOLDERS[name])
        near = machine.interactive() and not set(differ) & set(params.changed())
        if not params.again and made == plan["parents"] and (near or (code and manifest.params == now)):
            at, anew = display.clock(manifest.data["finished_at"]), "trains" if name in ("sft", "orpo") else "runs it"
            said = f"{FOLDERS[name]}: done {at}, shown from disk; `again = True` {anew} anew."
            values = ", ".join(f"{n} = {manifest.params[n]!r}" for n in differ if n in manifest.params)
            said += f" Made with {values}, which this notebook leaves at the default." if values else ""
            return manifest, said + ("" if code else " Made by an earlier version of the code.")
    return None, ""


def _check_lineage(run: str, parents: dict[str, Manifest]) -> None:
    """Every parent must have been made from the other parents as they stand now."""
    for stage, manifest in parents.items():
        for ancestor, known in manifest.data["parents"].items():
            if ancestor in parents and parents[ancestor].sha256 != known["manifest_sha256"]:
                told = f"Stage {stage!r} of the run {run!r} was made from an earlier {ancestor!r}"
                raise TunebookError(f"{told}; {_remedy(run, stage)}.")
    hashes = {s: m.data["template_hash"][:12] for s, m in parents.items() if m.data.get("template_hash")}
    if len(set(hashes.values())) > 1:
        said = ", ".join(f"{s}: {h}" for s, h in hashes.items())
        raise TunebookError(
            f"The stages of the run {run!r} were made with different chat templates ({said}); run them again from 01."
        )


def _unfinished(path: Path, plan: dict[str, Any]) -> bool:
    """Whether an earlier run of the same plan stopped in this folder."""
    try:
        return not (path / "manifest.json").exists() and json.loads((path / "plan.json").read_text()) == plan
    except (OSError, ValueError):
        return False


def set_aside(path: Path) -> None:
    """Keep what stands in `path` under a free neighbouring name. An empty folder is just used."""
    if path.exists() and any(path.iterdir()):
        display.say(f"{path.name} stood here already; it is kept as {move_aside(path)}")


# ---------------------------------------------------------------- locks

_held: dict[Path, TextIO] = {}


def lock(run: str, stage: str) -> None:
    """Keep other processes off a stage until `unlock` or the end of this process: two would mix their checkpoints.
    Raises TunebookError when another process works on it."""
    if (path := run_folder(run) / ".locks" / stage) in _held:
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - open as long as it is locked
    if owner := _taken_by(file, fcntl.LOCK_EX):
        file.close()
        told = f"Stage {stage!r} of the run {run!r} is being worked on by {owner}"
        raise TunebookError(f"{told}; wait for it, stop it, or use another run name.")
    file.truncate(0)
    file.write(f"{os.getpid()} {socket.gethostname()}")
    file.flush()
    _held[path] = file


def worker(run: str, stage: str) -> str:
    """The other process that works on a stage just now ("process 42"), "" when there is none."""
    path = run_folder(run) / ".locks" / stage
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        return "" if path in _held else _taken_by(file, fcntl.LOCK_SH)
    return ""


def _taken_by(file: TextIO, kind: int) -> str:
    """Lock a stage's file; "" when that worked, else the process that holds it."""
    file.seek(0)
    owner, _, host = file.read().partition(" ")
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        taken = False
    except BlockingIOError:
        taken = True
    except OSError as error:  # some network and mounted drives have no locks
        if kind == fcntl.LOCK_EX:
            why = f"{file.name} cannot be locked ({error.strerror})"
            display.say(f"{why}; the process that it names is looked for instead.")
        other = host == socket.gethostname() and owner.isdigit() and int(owner) != os.getpid()
        taken = other and psutil.pid_exists(int(owner))
    return f"process {owner}" if taken else ""


def unlock(run: str, stage: str) -> None:
    """Let go of a lock that this process holds; nothing happens when it holds none."""
    file = _held.pop(run_folder(run) / ".locks" / stage, None)
    if file is not None:
        with file:
            file.truncate(0)  # where nothing can be locked, the name alone says that somebody works


def _forget() -> None:
    """In a forked worker: the lock is the parent's, and ends with it."""
    while _held:
        _held.popitem()[1].close()


os.register_at_fork(after_in_child=_forget)
