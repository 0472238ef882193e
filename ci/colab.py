"""What a notebook's bootstrap cell does once the project is found: packages, the hub's token, where runs are kept.

In Colab it installs what the notebook needs and Colab does not have; elsewhere that is set-up's work. Until then only
the standard library and what Colab's kernel holds is imported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from helpers import display, machine, runs
from helpers.errors import TunebookError

LOCK = machine.PROJECT / "ci" / "locks" / "colab.txt"
SESSION, DRIVE = "this session", "Google Drive"
MOUNT = Path("/content/drive")
PACKAGE_S = 0.7  # to install one: pip took 30 s of a server core for the quickstart's 42 (742 MB), download apart
# Groups of ci/lock.py that a notebook needs; what has no group is for all.
GROUPS = {
    "quick": {"documents", "training", "evaluation"},
    "data": {"documents"},
    "sft": {"training"},
    "orpo": {"training"},
    "gguf": set(),
    "eval": {"evaluation"},
}
# Installed when asked for, in the notebooks where that can be.
ASKED = {"data": ("presidio",), "sft": ("unsloth",), "orpo": ("unsloth",)}
# Colab's kernel has these loaded before the first cell, and works with what it has loaded.
KERNELS_OWN = {"urllib3", "charset-normalizer", "jedi"}


def prepare(notebook: str, keep_runs_in: str = SESSION, also_install: str = "") -> None:
    """All of it for a notebook (a stage's name, or "quick"). Raises TunebookError with what to do."""
    if also_install not in ("", *ASKED.get(notebook, ())):
        allowed = " or ".join(map(repr, ("", *ASKED.get(notebook, ()))))
        raise TunebookError(f"also_install is {also_install!r}; in this notebook it takes {allowed}.")
    if "google.colab" in sys.modules:
        install(wanted(LOCK.read_text(), GROUPS[notebook] | {also_install}))
        token()
    keep(keep_runs_in)
    print(ready())


def wanted(lock: str, groups: set[str]) -> list[str]:
    """name==version of the lock's packages that have no group or one of these, less those that are here already."""
    found = []
    for line in lock.splitlines():
        package, _, group = (part.strip() for part in line.partition("#"))
        if package and (not group or groups & set(group.split(", "))) and version(package) != package.split("==")[1]:
            found.append(package)
    return found


def version(package: str) -> str:
    """The version that is installed; "" for none."""
    try:
        return importlib.metadata.version(package.split("==")[0])
    except importlib.metadata.PackageNotFoundError:
        return ""


def install(packages: list[str]) -> None:
    """Install them with pip. Raises TunebookError when that fails, or when an earlier version is imported already: the
    session must then begin anew, and has them."""
    if not packages:
        return
    held = imported(packages)
    takes = f"about {display.duration(PACKAGE_S * len(packages))} and their download"
    print(f"Installing {len(packages)} packages, {takes}: {', '.join(p.replace('==', ' ') for p in packages)}")
    started = time.monotonic()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(packages))
        file.flush()
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "-r", file.name], capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split()[-60:])
        raise TunebookError(f"pip could not install them ({said}); run this cell again when the network is back.")
    print(f"Installed in {display.duration(time.monotonic() - started)}.")
    if held:
        raise TunebookError(
            f"{', '.join(held)} had been imported in this session before its other version was installed; choose "
            "Runtime > Restart session, then run all cells: nothing is installed a second time."
        )


def imported(packages: list[str]) -> list[str]:
    """Those of which another version is installed and loaded in this process, with that version."""
    names = {display_name(p): p for p in packages if version(p) and display_name(p) not in KERNELS_OWN}
    modules = importlib.metadata.packages_distributions() if names else {}
    loaded = {display_name(d) for m in modules if m in sys.modules for d in modules[m]}
    return [f"{name} {version(p)}" for name, p in names.items() if name in loaded]


def display_name(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package.split("==")[0]).lower()


def token() -> None:
    """The hub's token from Colab's secrets into HF_TOKEN, where it is not set; said, never shown."""
    if os.environ.get("HF_TOKEN"):
        return
    from google.colab import userdata

    try:
        os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN").strip()
        print("The hub's token is Colab's secret HF_TOKEN.")
    except Exception as error:  # there is none, this notebook may not read it, or nobody answers
        print(f"No token for the hub ({error}); gated models need one: {machine.login()}.")


def keep(where: str) -> None:
    """Have runs kept in a folder, or in Google Drive, which is mounted for it. Raises TunebookError when it cannot."""
    if where == SESSION:
        if os.environ.get("TUNEBOOK_KEEP_CHOSEN"):
            del os.environ["TUNEBOOK_KEEP"], os.environ["TUNEBOOK_KEEP_CHOSEN"]
        return
    folder = Path(where).expanduser()
    if where == DRIVE:
        if "google.colab" not in sys.modules:
            raise TunebookError(
                f"keep_runs_in is {DRIVE!r}, and only Colab mounts one; write {SESSION!r}, or the path of a folder on "
                "a drive that is mounted here."
            )
        from google.colab import drive

        drive.mount(str(MOUNT))
        folder = MOUNT / "MyDrive" / "tunebook" / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TunebookError(
            f"keep_runs_in is {where!r}, and {folder} cannot be written ({error.strerror}); name another folder, or "
            f"{SESSION!r}."
        ) from None
    os.environ.update(TUNEBOOK_KEEP=str(folder), TUNEBOOK_KEEP_CHOSEN="1")
    there = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "checkpoints")
    print(f"Runs are kept in {folder}; there already: {', '.join(there) or 'none'}.")


def downloads(run: str) -> Any:
    """What to take along of a run: its report, shown inline, its model card and exported files, each to be saved."""
    files, folder = [], runs.folder(run, "gguf")
    with contextlib.suppress(TunebookError):
        first = runs.load(run, "gguf", verify=False).metrics.get("recommended", {}).get("type")
        files = sorted(folder.glob("model-*.gguf"), key=lambda f: (f.stem != f"model-{first}", f.name))
        files += [f for f in (folder / "Modelfile",) if f.is_file()]
    report = runs.run_folder(run) / "report.html"
    files = [f for f in (report, report.with_name("MODEL_CARD.md")) if f.is_file()] + files
    rows = [(f.name, display.size(f.stat().st_size), f) for f in files]
    if not machine.interactive() or not rows:
        return display.shown(rows, ("file", "size", "path")) if rows else display.said(f"Run {run!r} has no file yet.")
    page = ""
    if report.is_file():  # in a frame without rights, so that its styles and scripts stay its own
        text = display.escape(report.read_text(encoding="utf-8"))
        frame = "width:100%;height:34em;border:1px solid rgba(128,128,128,.45);border-radius:8px;background:#fff"
        page = f'<iframe title="Report" sandbox="allow-scripts" style="{frame}" srcdoc="{text}"></iframe>'
    if "google.colab" not in sys.modules:
        return display.Html(page + _links(rows), display.text_table(rows))
    import ipywidgets as w
    from google.colab import files as browser
    from IPython.display import HTML
    from IPython.display import display as show

    shown = w.Output()
    with shown:
        show(HTML(page))
    buttons = []
    for name, size, file in rows:
        button = w.Button(description=f"{name} ({size})", icon="download", layout=w.Layout(width="auto"))
        button.on_click(lambda _, file=file: browser.download(str(file)))
        buttons.append(button)
    return w.VBox([shown, w.HBox(buttons, layout=w.Layout(flex_flow="row wrap"))])


def _links(rows: list[tuple[str, str, Path]]) -> str:
    """Links as Jupyter serves them, from where the notebook lies; the paths for who cannot follow them."""
    session = Path(os.environ.get("JPY_SESSION_NAME") or machine.PROJECT / "notebooks" / "a notebook")
    here = (machine.PROJECT / "notebooks" if not session.is_absolute() else session.parent).resolve()
    lines = "".join(
        f'<li><a download href="{display.escape(os.path.relpath(file, here))}">{display.escape(name)}</a> '
        f"({size}) <small>{display.escape(file)}</small></li>"
        for name, size, file in rows
    )
    return f"<p>To save:</p><ul>{lines}</ul>"


def ready() -> str:
    """What is here, in one line: "Tesla T4, 15 GiB, 12.7 GiB of memory: ready"."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        lines = []
    gpus = [line.rsplit(",", 1) for line in lines if line.count(",")]
    names = [f"{name.strip()}, {int(mib) / 1024:.3g} GiB" for name, mib in gpus if mib.strip().isdigit()]
    here = f"{len(names)} × {names[0]}" if len(names) > 1 else "".join(names) or f"no GPU, {os.cpu_count()} CPU cores"
    return f"{here}, {machine.memory_gib():.3g} GiB of memory: ready"
