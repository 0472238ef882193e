"""Serve an exported model on this machine: llama.cpp's OpenAI-compatible server, on loopback only.

    python -m helpers.serve myrun                 the recommended GGUF of the run `myrun`
    python -m helpers.serve model-q4_k_m.gguf --port 8080 --context 4096

In a notebook `serve.start("myrun")` gives a running server with its `url` and ends with the kernel; any OpenAI client works
against `url + "/v1"`. The process itself is `helpers.gguf.server`; here is what a person needs around it.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import runs
from helpers.errors import TunebookError

if TYPE_CHECKING:
    from helpers.gguf.server import Server

_running: dict[tuple, Server] = {}


def start(
    what: str | Path,
    port: int = 0,
    context: int = 0,
    parallel: int = 1,
    alias: str = "",
    type: str = "",
    temperature: float = 0.0,
) -> Server:
    """Start a server and wait until it is healthy; the same call again gives the server that already runs.

    what: a GGUF file, a folder with one, or the name of a run. port: 0 takes a free one. context: tokens of each of `parallel`
    conversations at once; 0 takes the model's, at most 4096. alias: the model's name for clients. type: of a run with several
    files, the one to serve ("q4_k_m"). temperature: for clients that ask for none; 0 is how the scores were measured.

    Raises TunebookError when the file is missing or damaged, the port is taken, or the memory would not be enough.
    """
    from helpers.gguf.server import Server

    path = find(what, type)
    context, need = plan(path, context, parallel)
    key = (path.resolve(), path.stat().st_mtime_ns, port, context, parallel, alias, temperature)
    known = _running.get(key)
    if known is not None and known.process.poll() is None and known.healthy():
        return known
    try:
        server = Server(
            path, port=port, context=context, parallel=parallel, alias=alias or path.stem, temperature=temperature
        )
    except OSError as error:
        raise TunebookError(
            f"The server's process could not be started ({error.strerror}), most likely for want of memory; "
            f"{path.name} needs about {need:.1f} GiB."
        ) from error
    _running[key] = server
    atexit.register(server.stop)
    return server


def stop_all() -> None:
    """End every server that `start` began here."""
    while _running:
        _running.popitem()[1].stop()


def client(server: Server | str) -> Any:
    """An `openai.OpenAI` client of a server, or of any OpenAI-compatible URL ending in /v1."""
    import openai

    url = server if isinstance(server, str) else server.url + "/v1"
    return openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=0, timeout=600)


def find(what: str | Path, type: str = "") -> Path:
    """The GGUF file meant by a path, a folder or a run's name. Raises TunebookError that lists what could have been meant."""
    path = Path(what).expanduser()
    if path.is_file() or path.suffix == ".gguf":
        if not path.is_file():
            raise TunebookError(f"There is no GGUF file {path}; run 04_gguf_export, or correct the path.")
        return path
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1 and type:
            files = [f for f in files if f.stem.endswith(type)]
        if len(files) != 1:
            found = ", ".join(f.name for f in sorted(path.glob("*.gguf"))) or "no GGUF file"
            raise TunebookError(f"The folder {path} holds {found}; name one file.")
        return files[0]
    manifest = runs.load(str(what), "gguf", verify=False)
    types = {
        name.removeprefix("model-").removesuffix(".gguf"): manifest.path / name
        for name in manifest.data["artifacts"]
        if name.startswith("model-") and name.endswith(".gguf")
    }
    wanted = (
        type
        or recommended(manifest)
        or next((k for k in ("q8_0", "q4_k_m", "f16") if k in types), next(iter(types), ""))
    )
    if wanted not in types:
        raise TunebookError(
            f"The run {what!r} exported no {wanted or 'GGUF file'}; it has {', '.join(types) or 'none'}. "
            "Name one of them, or run 04_gguf_export with that type."
        )
    if not types[wanted].is_file():
        raise TunebookError(f"{types[wanted]} is missing; run 04_gguf_export for the run {what!r} again.")
    return types[wanted]


def recommended(manifest: runs.Manifest) -> str:
    """The quantisation that the export's fidelity report recommends, or ""."""
    return (manifest.metrics.get("recommended") or {}).get("type", "")


def plan(path: Path, context: int = 0, parallel: int = 1, available_gib: float | None = None) -> tuple[int, float]:
    """Context in tokens and the memory in GiB that serving will take: weights, and 16-bit keys and values of the whole context.

    Raises TunebookError for a damaged file, a context the model cannot have, or more memory than is free.
    """
    from helpers.gguf import header

    summary = header.check(path)
    meta = summary.metadata
    arch = meta.get("general.architecture", "llama")
    longest = int(meta.get(f"{arch}.context_length") or 4096)
    if context > longest:
        raise TunebookError(
            f"A context of {context} tokens is longer than the {longest} that {path.name} was made for; ask for less."
        )
    context = context or min(longest, 4096)
    heads = int(_first(meta.get(f"{arch}.attention.head_count")) or 1)
    kv_heads = int(_first(meta.get(f"{arch}.attention.head_count_kv")) or heads)
    width = int(meta.get(f"{arch}.embedding_length") or 0) // heads
    per_token = (
        int(meta.get(f"{arch}.attention.key_length") or width)
        + int(meta.get(f"{arch}.attention.value_length") or width)
    ) * kv_heads
    cache = 2 * per_token * int(meta.get(f"{arch}.block_count") or 0) * context * parallel
    need = (summary.bytes + cache) / 2**30 + 0.2  # 0.2 GiB: compute buffers and the process itself, measured on SmolLM2
    free = _available_gib() if available_gib is None else available_gib
    if need > free:
        fits = int((free - 0.2 - summary.bytes / 2**30) / max(cache / 2**30 / context, 1e-12))
        advice = f"a context of {fits} tokens would fit" if fits >= 256 else "take a smaller quantisation"
        raise TunebookError(
            f"Serving {path.name} with {parallel} × {context} tokens needs {need:.1f} GiB and {free:.1f} GiB are free; {advice}."
        )
    return context, need


def _first(value: Any) -> Any:
    return max(value) if isinstance(value, list) and value else value


def _available_gib() -> float:
    """Memory that can be had now: what the system has left, or what the container's limit leaves."""
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),):
        try:
            free = min(free, max(int(Path(limit).read_text()) - int(Path(used).read_text()), 0))
        except (OSError, ValueError):
            continue
    return free / 2**30


def describe(server: Server) -> str:
    """What other programs need to use a running server."""
    url = f"{server.url}/v1"
    model = json.dumps(server.path.stem)
    return (
        f"{server.path.name} is served at {url}\n"
        f"  Python      openai.OpenAI(base_url={url!r}, api_key='none').chat.completions.create(model={model}, messages=[…])\n"
        f"  Open WebUI  Settings > Connections > OpenAI API: URL {url}, key none\n"
        f"              or OPENAI_API_BASE_URL={url} OPENAI_API_KEY=none open-webui serve --host 127.0.0.1 --port 3000\n"
        f"  health      {server.url}/health"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.serve", description="Serve a GGUF file or a run's export on this machine."
    )
    parser.add_argument("what", help="a GGUF file, a folder that holds one, or the name of a run")
    parser.add_argument("--port", type=int, default=8080, help="port on 127.0.0.1; 0 takes a free one (default 8080)")
    parser.add_argument(
        "--context", type=int, default=0, help="tokens of a conversation; 0 takes the model's, at most 4096"
    )
    parser.add_argument("--parallel", type=int, default=1, help="conversations at once")
    parser.add_argument("--type", default="", help="of a run with several files, the one to serve, such as q4_k_m")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="for clients that ask for none; 0 is how the scores were measured",
    )
    options = parser.parse_args(arguments)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell that starts it in the background hands interrupts down ignored
    try:
        server = start(
            options.what,
            options.port,
            options.context,
            options.parallel,
            type=options.type,
            temperature=options.temperature,
        )
        print(describe(server), "Ctrl-C ends it.", sep="\n", flush=True)
        status = server.process.wait()
        print(
            f"The server ended by itself with status {status}, most likely for want of memory; ask for a shorter context.",
            file=sys.stderr,
        )
        return 1
    except TunebookError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        stop_all()


if __name__ == "__main__":
    raise SystemExit(main())
