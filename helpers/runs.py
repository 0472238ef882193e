"""Run folders: one folder a stage, finished only when its manifest is there, and trusted only when it still matches.

    runs/<run>/<stage>/   params.yaml   metrics.json   executed.ipynb   artifacts...   manifest.json (last, atomically)

A stage opens its folder with `open_stage`, works in `Stage.path` and ends with `Stage.finish`. Later stages read it with
`load`, which refuses a folder that is unfinished or whose files no longer have the hashes that were written down.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import machine
from helpers.errors import TunebookError

SCHEMA_VERSION = 1
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
    "orpo": ("data", "sft?"),
    "gguf": ("data", "sft?", "orpo?"),
    "eval": ("data", "sft?", "orpo?", "gguf?"),
}
# Files that are not part of what a stage promises: they change after it ends, or serve only to resume it.
UNHASHED = ("manifest.json", "plan.json", "executed.ipynb", "checkpoints/", "tensorboard/", "work/", "shown/")


def root() -> Path:
    """The folder that holds all runs: `$TUNEBOOK_RUNS`, or `runs/` in the project."""
    return Path(os.environ.get("TUNEBOOK_RUNS") or machine.PROJECT / "runs")


def folder(run: str, stage: str) -> Path:
    """`runs/<run>/<stage folder>`. Raises TunebookError for a name that would leave the runs folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", run):
        raise TunebookError(f"The run name {run!r} is not usable as a folder; use letters, digits, '.', '_' and '-'.")
    return root() / run / FOLDERS[stage]


# ---------------------------------------------------------------- atomic files and hashes


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Write a whole file or nothing: to a neighbour first, flushed to disk, then renamed over `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(error, path) from error
    return path


def disk_error(error: OSError, path: Path) -> Exception:
    """An OSError as a sentence when it means a full disk or a forbidden place, else the error itself."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TunebookError(
            f"No space left on the disk while writing {path}; free some room and run the same command "
            "again, it goes on where it stopped."
        )
    if error.errno in (errno.EACCES, errno.EROFS):
        return TunebookError(f"{path} cannot be written ({error.strerror}); set TUNEBOOK_RUNS to a folder that can.")
    return error


def write_json(path: str | Path, value: Any) -> Path:
    """JSON with sorted keys, UTF-8, atomically. NaN and infinity are refused: a score that is not a number is a bug."""
    return write_atomic(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# ---------------------------------------------------------------- manifests


@dataclass(repr=False)
class Manifest:
    """What a finished stage wrote down about itself; `data` is the parsed manifest.json."""

    path: Path
    data: dict[str, Any]

    @property
    def sha256(self) -> str:
        return sha256_file(self.path / "manifest.json")

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

    def __repr__(self) -> str:
        d = self.data
        return f"{d['stage']}: {d['wall_s']} s, peak memory {d['peak_memory_gib']} GiB, {len(d['artifacts'])} files in {self.path}"

    def _repr_html_(self) -> str:
        from helpers.display import table

        d = self.data
        return table(
            [
                ("stage", d["stage"]),
                ("folder", self.path),
                ("seconds", d["wall_s"]),
                ("peak memory, GiB", d["peak_memory_gib"]),
                ("files", len(d["artifacts"])),
            ]
        )


def load(run: str, stage: str, verify: bool = True) -> Manifest:
    """A finished stage of a run. Raises TunebookError when it is missing, unfinished, failed or changed since."""
    path = folder(run, stage)
    again = (
        f"run notebook {FOLDERS[stage]} for the run {run!r} (bash ci/run.sh --run {run} --from {FOLDERS[stage][:2]})"
    )
    if not path.is_dir():
        raise TunebookError(f"Stage {stage!r} of the run {run!r} has not been run yet; {again} first.")
    try:
        data = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        raise TunebookError(
            f"Stage {stage!r} of the run {run!r} did not finish (no manifest in {path}); {again} again."
        ) from None
    except ValueError:
        raise TunebookError(f"{path / 'manifest.json'} is damaged; {again} again.") from None
    if data.get("schema_version") != SCHEMA_VERSION or data.get("status") != "finished":
        raise TunebookError(
            f"Stage {stage!r} of the run {run!r} has no usable manifest (status {data.get('status')!r}, schema "
            f"{data.get('schema_version')!r}, expected 'finished', {SCHEMA_VERSION}); {again} again."
        )
    if verify:
        for name, known in data["artifacts"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != known["bytes"] or sha256_file(file) != known["sha256"]:
                raise TunebookError(
                    f"{file} is not the file that stage {stage!r} wrote (missing or altered); {again} again."
                )
    return Manifest(path, data)


def finished(run: str, verify: bool = False) -> dict[str, Manifest]:
    """The finished stages of a run, in order."""
    return {stage: load(run, stage, verify) for stage in FOLDERS if (folder(run, stage) / "manifest.json").is_file()}


# ---------------------------------------------------------------- a stage at work


@dataclass
class Stage:
    """A stage's open folder. Files put under `path` become artifacts when `finish` writes the manifest."""

    name: str
    params: Any
    path: Path
    parents: dict[str, Manifest]
    resumed: bool
    started: float = field(default_factory=time.time)
    done: Manifest | None = None
    begun: bool = False

    @property
    def shown(self) -> Path:
        """Folder of what the steps showed, for a notebook that is opened again."""
        return self.path / "shown"

    def begin(self) -> bool:
        """Start the work: lock the folder, keep aside what stands there unless it is resumed. False when it was begun already."""
        if self.begun:
            return False
        lock(self.params.run, self.name)
        if self.path.exists() and not self.resumed:
            _set_aside(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.path) from error
        write_json(self.path / "plan.json", _plan(self.params, self.parents))
        write_atomic(self.path / "params.yaml", _yaml(self.params))
        if self.resumed:
            print(f"Resuming the unfinished stage in {self.path}")
        self.started, self.begun = time.time(), True
        return True

    def finish(
        self,
        metrics: dict[str, Any],
        template_hash: str | None = None,
        tokenizer_hash: str | None = None,
        model: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Manifest:
        """Hash every file, write metrics.json, then manifest.json last. The parents must still be what they were.

        metrics: plain JSON numbers and strings; NaN is refused. model: name, path, revision, origin of the base model.
        """
        for stage, parent in self.parents.items():
            current = parent.path / "manifest.json"
            if not current.is_file() or sha256_file(current) != parent.data["_sha256"]:
                raise TunebookError(
                    f"Stage {stage!r} was rerun while {self.name!r} was working on its results; run {self.name!r} again."
                )
        write_json(self.path / "metrics.json", metrics)
        artifacts = {}
        for file in sorted(p for p in self.path.rglob("*") if p.is_file()):
            name = file.relative_to(self.path).as_posix()
            if not name.startswith(UNHASHED) and not file.name.endswith(".partial") and not file.is_symlink():
                artifacts[name] = {"sha256": sha256_file(file), "bytes": file.stat().st_size}
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "stage": self.name,
            "run": self.params.run,
            "status": "finished",
            "params": self.params.as_dict(),
            "metrics": metrics,
            "model": model or self._inherited("model"),
            "template_hash": template_hash or self._inherited("template_hash"),
            "tokenizer_hash": tokenizer_hash or self._inherited("tokenizer_hash"),
            "parents": {
                s: {"folder": p.path.name, "manifest_sha256": p.data["_sha256"]} for s, p in self.parents.items()
            },
            "artifacts": artifacts,
            "wall_s": round(time.time() - self.started, 1),
            "peak_memory_gib": machine.peak_memory_gib(),
            "resumed": self.resumed,
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **machine.versions(),
            **(extra or {}),
        }
        write_json(self.path / "manifest.json", manifest)
        unlock(self.params.run, self.name)
        return Manifest(self.path, manifest)

    def _inherited(self, key: str) -> Any:
        for parent in reversed(self.parents.values()):
            if parent.data.get(key):
                return parent.data[key]
        return None


def stage(name: str, params: Any, needs: tuple[str, ...] | None = None) -> Stage:
    """Look at the folder of stage `name` for the run `params.run`; nothing is written until `Stage.begin`.

    Parents are loaded and verified (`needs` replaces the table above, e.g. ("data", "sft")). `Stage.done` is the manifest
    when the stage is finished with the same parameters, parents and code already; `Stage.resumed` says that an earlier run of
    the same parameters and parents left it unfinished. Raises TunebookError for a parent that is missing or changed, or that
    was made with another chat template than its own parent.
    """
    path = folder(params.run, name)
    parents = {}
    for parent in needs if needs is not None else PARENTS[name]:
        if parent.endswith("?") and not (folder(params.run, parent[:-1]) / "manifest.json").is_file():
            continue
        parents[parent.rstrip("?")] = load(params.run, parent.rstrip("?"))
    for manifest in parents.values():
        manifest.data["_sha256"] = manifest.sha256
    _check_lineage(params.run, parents)
    resumed = path.exists() and not (path / "manifest.json").exists() and _plan_of(path) == _plan(params, parents)
    return Stage(name, params, path, parents, resumed, done=is_done(name, params))


def open_stage(name: str, params: Any, needs: tuple[str, ...] | None = None) -> Stage:
    """`stage`, begun at once even where it is finished: what stands there is kept aside and the work starts anew."""
    opened = stage(name, params, needs)
    opened.done = None
    opened.begin()
    return opened


def _plan(params: Any, parents: dict[str, Manifest]) -> dict[str, Any]:
    return {"params": params.as_dict(), "parents": {s: m.data["_sha256"] for s, m in parents.items()}}


_locks: dict[Path, Any] = {}


def lock(run: str, stage: str) -> None:
    """Keep other processes off a stage's folder until `unlock` or the end of this process, however it comes.

    Raises TunebookError when another process works on it: two writers would mix their checkpoints.
    """
    import fcntl

    path = root() / run / ".locks" / stage
    unlock(run, stage)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise TunebookError(
            f"Stage {stage!r} of the run {run!r} is being worked on by process {owner}; wait for it, stop it, "
            "or use another run name."
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _locks[path] = file


def unlock(run: str, stage: str) -> None:
    """Let go of a lock that this process holds; nothing happens when it holds none."""
    file = _locks.pop(root() / run / ".locks" / stage, None)
    if file is not None:
        file.close()


def is_done(stage: str, params: Any) -> Manifest | None:
    """The stage's manifest when it is finished with these very parameters, parents and code, else None."""
    try:
        manifest = load(params.run, stage)
        known = manifest.data["parents"]
        current = {
            s: (folder(params.run, s) / "manifest.json")
            for s in FOLDERS
            if f"{s}?" in PARENTS[stage] or s in PARENTS[stage]
        }
        current = {s: f for s, f in current.items() if f.is_file()}
        fresh = manifest.data["code_revision"] == machine.revision() and all(
            s in known and sha256_file(f) == known[s]["manifest_sha256"] for s, f in current.items()
        )
    except TunebookError:
        return None
    same = manifest.params == params.as_dict() and fresh
    return manifest if same else None


def _check_lineage(run: str, parents: dict[str, Manifest]) -> None:
    """Every parent must have been made from the other parents as they stand now."""
    for stage, manifest in parents.items():
        for ancestor, known in manifest.data["parents"].items():
            if ancestor in parents and parents[ancestor].data["_sha256"] != known["manifest_sha256"]:
                raise TunebookError(
                    f"Stage {stage!r} of the run {run!r} was made from an earlier {ancestor!r}; run notebook "
                    f"{FOLDERS[stage]} again (bash ci/run.sh --run {run} --from {FOLDERS[stage][:2]})."
                )
    hashes = {s: m.data["template_hash"] for s, m in parents.items() if m.data.get("template_hash")}
    if len(set(hashes.values())) > 1:
        raise TunebookError(
            f"The stages of the run {run!r} were made with different chat templates ("
            + ", ".join(f"{s}: {h[:12]}" for s, h in hashes.items())
            + "); run them again from 01."
        )


def _yaml(params: Any) -> str:
    import yaml

    return "# Every parameter of this stage as it was used; `papermill -f` takes this file.\n" + yaml.safe_dump(
        params.as_dict(), sort_keys=False, allow_unicode=True
    )


def _plan_of(path: Path) -> Any:
    try:
        return json.loads((path / "plan.json").read_text())
    except (OSError, ValueError):
        return None


def _set_aside(path: Path) -> None:
    """Keep what stands in `path` under a free neighbouring name. An empty folder is just used."""
    if not any(path.iterdir()):
        return
    number = 1
    while (old := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(old)
    print(f"{path.name} stood here already; it is kept as {old}")
