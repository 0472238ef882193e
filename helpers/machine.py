"""Where this runs: Colab, Jupyter, papermill or a script; which GPU; which versions; how much memory was used."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from helpers.errors import TunebookError

# The one place for what is published and where. `python ci/stamp.py owner/name COMMIT` writes them here, into the
# notebooks, whose bootstrap fetches that commit and no other, and into the READMEs' badges. Until then the owner is
# a name that nobody can have on GitHub. TAG is "" until the tag exists. pyproject.toml reads the version.
REPOSITORY = "_your_account_/tunebook"
COMMIT = ""
TAG = ""
VERSION = "0.1.0"

# Before torch is loaded: OpenMP threads that spin at every barrier cost 2 to 20 times as much wherever another process
# has a core (seen on 2 cores); a thousand spins cost nothing on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Kernels that oneDNN keeps for products of sizes it has met: every row has its own length, and 1,024 of them (the
# default) came to 1 GiB in a hundred steps of a 135M model, at the same speed.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# On a CPU it asks, whenever it is imported, for a package that would fetch a kernel for inference from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

PROJECT = Path(__file__).resolve().parent.parent
CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "unsloth"),
    *("xllamacpp", "papermill", "ipywidgets", "numpy", "pyarrow"),
)


@dataclass(frozen=True)
class Gpu:
    """The first visible CUDA device. capability: (major, minor); total_gib: its memory in GiB."""

    name: str
    capability: tuple[int, int]
    total_gib: float


def gpu() -> Gpu | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Gpu(properties.name, (properties.major, properties.minor), round(properties.total_memory / 2**30, 1))


def path(text: str | Path) -> Path:
    """A path as a person writes it, `~` included. Raises TunebookError for one that no file can have."""
    try:
        found = Path(text).expanduser()
    except RuntimeError:
        raise TunebookError(f"{str(text)[:80]!r} begins with a user whom this machine does not know.") from None
    if "\0" in str(text) or len(str(found)) > 4000 or any(len(os.fsencode(part)) > 255 for part in found.parts):
        raise TunebookError(f"{str(text)[:80]!r}… cannot be the path of a file; it is too long.")
    return found


def kernel() -> Any:
    """The Jupyter kernel that this code runs in; None outside of notebooks."""
    return getattr(sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None, "kernel", None)


def interactive() -> bool:
    """True when a person is watching: plots and sliders are worth drawing. Not under papermill; ci/pipeline.py sets
    TUNEBOOK_HEADLESS."""
    if os.environ.get("TUNEBOOK_HEADLESS"):
        return False
    found = kernel()
    return "google.colab" in sys.modules or (found is not None and not _papermill(found))


def _papermill(kernel: Any) -> bool:
    """Whether papermill runs this kernel: it cannot ask anybody, and its command or its cell of parameters is found."""
    if getattr(kernel, "_allow_stdin", True):
        return False
    with contextlib.suppress(psutil.Error):
        if any("papermill" in part for part in psutil.Process(os.getppid()).cmdline()):
            return True
    return any(cell.startswith("# Parameters\n") for cell in kernel.shell.user_ns.get("_ih", ()))


def versions() -> dict[str, Any]:
    """Versions, code revision and GPU, as every manifest records them."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    device = gpu() if "torch" in sys.modules else None
    return {"versions": found, "gpu": device.name if device else None, "code_revision": revision()}


def revision() -> str:
    """For people: the commit, "+changes" when tracked files differ from it; the version where there is no git."""
    command = ["git", "--git-dir=.git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        asked = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return f"v{VERSION}"
    return asked.stdout.strip()


def code_hash(notebook: str = "") -> str:
    """What the code is: sha256 over every file of helpers/ that decides a result, and over a notebook's code cells."""
    digest = hashlib.sha256()
    for file in sorted((PROJECT / "helpers").rglob("*.py")):
        digest.update(file.relative_to(PROJECT).as_posix().encode() + b"\0" + file.read_bytes())
    path = PROJECT / "notebooks" / f"{notebook}.ipynb"
    if notebook and path.is_file():
        cells = [c["source"] for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        digest.update(json.dumps(["".join(source) for source in cells]).encode())
    return digest.hexdigest()


def places() -> tuple[Path, ...]:
    """Where a file that is named by a relative path may lie: here, in the project, and in Colab where uploads go."""
    return (Path(), PROJECT, *([Path("/content")] if "google.colab" in sys.modules else []))


def login() -> str:
    """How a token for the hub comes onto this machine, for error messages."""
    if "google.colab" in sys.modules:
        return (
            "add it as HF_TOKEN to Colab's secrets (the key on the left), allow this notebook, run the first cell again"
        )
    return "run `hf auth login`, or set HF_TOKEN"


def memory_gib() -> float:
    """Host memory in all, in GiB: what the system has, or less where a container has a limit."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _container_memory())]) / 2**30


def free_memory_gib() -> float:
    """Host memory that can be had now, in GiB: what the system has and every container around this process allows. The
    page cache counts as free: the kernel gives it up when memory is asked for."""
    room = [psutil.virtual_memory().available, *(max(limit - used, 0) for limit, used in _container_memory())]
    return min(room) / 2**30


def free_gpu_gib() -> float | None:
    """GPU memory that this process can have now, in GiB, within its `set_per_process_memory_fraction`; None without a
    GPU. What torch keeps for itself without using it counts as free."""
    import torch

    if not torch.cuda.is_available():
        return None
    (free, total), used = torch.cuda.mem_get_info(), torch.cuda.memory_allocated()
    share = torch.cuda.get_per_process_memory_fraction()
    return min(free + torch.cuda.memory_reserved() - used, share * total - used) / 2**30


def gpu_held(listed: str | None = None) -> str:
    """Which other processes hold memory of the GPUs; "" when none does or nothing can ask. listed: nvidia-smi's answer,
    lines such as "4242, /usr/bin/python3, 20480 MiB", of a container's neighbours also "[Not Found]" and "[N/A]"."""
    if listed is None:
        command = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
        try:
            listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return ""
    held = []
    for pid, name, mib in re.findall(r"^(\d+), (.*), (?:(\d+) MiB|\S.*)$", listed, re.M):
        if int(pid) != os.getpid():
            memory = f", {int(mib) / 1024:.1f} GiB" if mib else ""
            held.append(f"{Path(name).name or 'a program'} (process {pid}{memory})")
    return ", ".join(held)


def _container_memory() -> Iterator[tuple[int, int]]:
    """(limit, use less page cache) in bytes of every control group around this process with a limit, version 1 or 2."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else ():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        tree = CONTROL_GROUPS / ("memory" if kinds else "")
        group = tree / path.strip("/")  # not there inside most containers, where the tree itself is the group
        for folder in (group, *group.parents):
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # not there, or "max"
                continue
            cached = sum(int(stat.get(f"total_{k}", stat.get(k, 0))) for k in ("active_file", "inactive_file"))
            yield limit, max(used - cached, 0)


def peak_memory_gib() -> float:
    """Highest memory so far in GiB: of the GPU where one was used, else resident memory of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def unwatched() -> bool:
    """Whether what is printed only fills a file: in a notebook that nobody runs by hand."""
    return bool(os.environ.get("TUNEBOOK_HEADLESS")) or (kernel() is not None and not interactive())


def progress(items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
    """`items` with a text progress bar that leaves no line behind; none where nobody watches, for a file keeps them."""
    from tqdm import tqdm

    how: dict[str, Any] = {"mininterval": 2, "ncols": 90, "file": sys.stdout, "disable": unwatched()}
    return iter(tqdm(items, label, total, leave=False, **how))
