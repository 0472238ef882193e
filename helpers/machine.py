"""Where this runs: Colab, Jupyter, papermill or a script; which GPU; which versions; how much memory was used."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

# The one place for the published repository and the tag that Colab fetches; `python ci/stamp.py` writes both into the notebooks.
REPOSITORY = "tunebook/tunebook"
TAG = "v0.1.0"

# Before torch is loaded: OpenMP threads that spin at every barrier cost 2 to 20 times as much wherever another process has a core
# (seen on 2 cores); a thousand spins cost nothing on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Kernels that oneDNN keeps for products of sizes it has met: every row has its own length, and 1,024 of them (the default) came
# to 1 GiB in a hundred steps of a 135M model, at the same speed.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# On a CPU it asks, whenever it is imported, for a package that would fetch a kernel for inference from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "datasets",
    "accelerate",
    "unsloth",
    "xllamacpp",
    "papermill",
    "ipywidgets",
    "numpy",
    "pyarrow",
)
T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """The first visible CUDA device. capability: (major, minor); total_gib: memory of the card in GiB."""

    name: str
    capability: tuple[int, int]
    total_gib: float


def gpu() -> Gpu | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Gpu(properties.name, (properties.major, properties.minor), round(properties.total_memory / 2**30, 1))


def where() -> str:
    """ "colab", "papermill", "jupyter" or "script"."""
    if os.environ.get("TUNEBOOK_HEADLESS"):
        return "papermill"
    if "google.colab" in sys.modules:
        return "colab"
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return "jupyter" if shell is not None and hasattr(shell, "kernel") else "script"


def interactive() -> bool:
    """True when a person is watching: live plots and sliders are worth drawing. ci/pipeline.py sets TUNEBOOK_HEADLESS."""
    return where() in ("colab", "jupyter")


def versions() -> dict[str, Any]:
    """Versions, code revision and card, as every manifest records them."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    card = gpu() if "torch" in sys.modules else None
    return {
        "versions": {"python": sys.version.split()[0], **found},
        "gpu": card.name if card else None,
        "code_revision": revision(),
    }


def revision() -> str:
    """Commit of the code, with "+changes" when tracked files differ from it; the release tag where there is no git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != PROJECT:
            return TAG
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return TAG


def describe() -> dict[str, Any]:
    """What a reader wants to know first: place, card or cores, memory, versions."""
    card = gpu()
    return {
        "running in": where(),
        "GPU": f"{card.name}, {card.total_gib} GiB, sm{card.capability[0]}{card.capability[1]}" if card else "none",
        "CPU cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory, GiB": total_memory_gib(),
        **versions()["versions"],
    }


def total_memory_gib() -> float:
    """Main memory in GiB: the machine's, or less where this process's container may not have it all."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ):  # control groups, version 2 and 1
        try:
            found = min(found, int(Path(file).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return round(found / 2**30, 1)


def peak_memory_gib() -> float:
    """Highest memory so far in GiB: of the GPU where one was used, else resident memory of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """`items` with a text progress bar that is written at most every two seconds, so that notebooks stay small."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=label, total=total, mininterval=2, dynamic_ncols=False, ncols=90, file=sys.stdout))
