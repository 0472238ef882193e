"""Serve an exported model on this machine: llama.cpp's OpenAI-compatible server, on loopback only.

    python -m helpers.serve myrun                 the recommended GGUF of the run `myrun`
    python -m helpers.serve model-q4_k_m.gguf --port 8080 --context 4096

In a notebook `serve.start("myrun")` gives a running server with its `url` and ends with the kernel; any OpenAI client
works against `url + "/v1"`. The process itself is `helpers.gguf.runner.Server`; here is what a person needs around it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from helpers import llm_client, machine, runs
from helpers.__main__ import main as tunebook
from helpers.display import say
from helpers.errors import TunebookError
from helpers.gguf import header
from helpers.gguf.runner import Server

_running: dict[tuple[Any, ...], Server] = {}


def start(
    what: str | Path, port: int = 0, context: int = 0, parallel: int = 1, type: str = "", temperature: float = 0.0
) -> Server:
    """Start a server and wait until it is healthy; the same call again gives the server that already runs.

    what: a GGUF file, a folder with one, or the name of a run. port: 0 takes a free one. context: tokens of each of
    `parallel` conversations at once; 0 takes the model's, at most 4096. type: of a run with several files, the one to
    serve ("q4_k_m"). temperature: for clients that ask for none; 0 is how the scores were measured.
    """
    bounds = {"port": (port, 0, 65535), "context": (context, 0, 1 << 20), "parallel": (parallel, 1, 64)}
    for name, (value, low, high) in (bounds | {"temperature": (temperature, 0, 2)}).items():
        if not low <= value <= high:
            raise TunebookError(f"{name} is {value}; it takes a number from {low} to {high}.")
    path = find(what, type)
    context, _ = plan(path, context, parallel)
    key = (path.resolve(), path.stat().st_mtime_ns, port, context, parallel, temperature)
    if key not in _running or not _running[key].healthy():
        _running[key] = Server(path, port=port, context=context, parallel=parallel, temperature=temperature)
    return _running[key]


def stop_all() -> None:
    """End every server that `start` began here."""
    while _running:
        _running.popitem()[1].stop()


def client(server: Server | str) -> Any:
    """An `openai.OpenAI` client of a server, or of any OpenAI-compatible URL ending in /v1 that wants no key."""
    where = (server, "none") if isinstance(server, str) else (server.url + "/v1", server.key)
    return llm_client.openai_client(*where)


def find(what: str | Path, type: str = "") -> Path:
    """The GGUF file meant by a path, a folder or a run's name. Raises TunebookError with what could be meant."""
    path = machine.path(what)
    if path.suffix == ".gguf" or path.is_file():
        return path
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        meant = [f for f in files if f.stem.endswith(type)] if len(files) > 1 else files
        if len(meant) != 1:
            found = ", ".join(f.name for f in files) or "no GGUF file"
            raise TunebookError(f"The folder {path} holds {found}; name one file.")
        return meant[0]
    manifest = runs.load(str(what), "gguf", verify=False)
    names = [n for n in manifest.data["artifacts"] if n.startswith("model-") and n.endswith(".gguf")]
    types = {name.removeprefix("model-").removesuffix(".gguf"): manifest.path / name for name in names}
    wanted = type or manifest.metrics.get("recommended", {}).get("type") or next(iter(types), "GGUF file")
    if wanted not in types:
        found = f"The run {what!r} exported no {wanted}; it has {', '.join(types) or 'none'}"
        raise TunebookError(f"{found}. Name one of them, or run 04_gguf_export with that type.")
    return manifest.verified(types[wanted].name)


def plan(path: Path, context: int = 0, parallel: int = 1) -> tuple[int, float]:
    """Context in tokens and the memory in GiB that serving takes: weights, and 16-bit keys and values of the context.

    Raises TunebookError for a damaged file, a context the model cannot have, or more memory than is free.
    """
    summary = header.check(path)

    def of(name: str, default: int) -> int:
        """A number of the architecture; where layers differ, the largest."""
        value = summary.metadata.get(f"{summary.metadata.get('general.architecture')}.{name}")
        return int(max(value) if isinstance(value, list) else value or default)

    longest = of("context_length", 4096)
    if context > longest:
        found = f"context is {context} tokens, longer than the {longest} that {path.name} was made for"
        raise TunebookError(f"{found}; ask for less.")
    context = context or min(longest, 4096)
    heads = of("attention.head_count", 1)
    width = of("embedding_length", 0) // heads
    row = of("attention.key_length", width) + of("attention.value_length", width)
    per_token = 2 * row * of("attention.head_count_kv", heads) * of("block_count", 0) * parallel / 2**30
    fixed = summary.bytes / 2**30 + 0.2  # 0.2 GiB: compute buffers and the process itself, measured on SmolLM2
    need, free = fixed + per_token * context, machine.free_memory_gib()
    if need > free:
        fits = int((free - fixed) / max(per_token, 1e-12))
        advice = f"a context of {fits} tokens would fit" if fits >= 256 else "take a smaller quantisation"
        found = (
            f"Serving {path.name} with {parallel} × {context} tokens needs {need:.1f} GiB and {free:.1f} GiB are free"
        )
        raise TunebookError(f"{found}; {advice}.")
    return context, need


def talks(server: Server | str) -> bool:
    """Whether the served model has a chat template; one without completes text. Of an address nothing is known."""
    return isinstance(server, str) or "tokenizer.chat_template" in header.check(server.path).metadata


def describe(server: Server) -> str:
    """What other programs need to use a running server."""
    url, key, model = f"{server.url}/v1", server.key, json.dumps(server.path.stem)
    chats = talks(server)
    create = f"openai.OpenAI(base_url={url!r}, api_key={key!r}).{'chat.' * chats}completions.create"
    return (
        f"{server.path.name} is served at {url}\n"
        f"  key         {key}\n"
        f"  Python      {create}(model={model}, {'messages=[…]' if chats else 'prompt=…'})\n"
        f"  Open WebUI  Settings > Connections > OpenAI API: URL {url}, key {key}\n"
        f"              or OPENAI_API_BASE_URL={url} OPENAI_API_KEY={key} open-webui serve --host 127.0.0.1\n"
        f"  health      {server.url}/health"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tunebook serve", description="Serve a GGUF file or a run's export here.")
    add = parser.add_argument
    add("what", help="a GGUF file, a folder that holds one, or the name of a run")
    add("--port", type=int, default=8080, help="port on 127.0.0.1; 0 takes a free one (default 8080)")
    add("--context", type=int, default=0, help="tokens of a conversation; 0 takes the model's, at most 4096")
    add("--parallel", type=int, default=1, help="conversations at once")
    add("--type", default="", help="of a run with several files, the one to serve, such as q4_k_m")
    add("--temperature", type=float, default=0.0, help="for clients that ask for none; 0 as the scores were measured")
    given = vars(parser.parse_args(arguments))
    # a shell that starts it in the background hands interrupts down ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        server = start(**given)
        say(describe(server), "Ctrl-C ends it.")
        server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        stop_all()


if __name__ == "__main__":
    sys.exit(tunebook(["serve", *sys.argv[1:]]))
