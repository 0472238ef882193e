"""llama.cpp's OpenAI-compatible server on loopback, in a process of its own that ends with the one that started it.

with server("model-q8_0.gguf") as s:
    openai.OpenAI(base_url=s.url + "/v1", api_key="none")
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers import machine
from helpers.errors import TunebookError
from helpers.gguf import header, llama_structs

READY = "listening "


class Server:
    """A running server. url: "http://127.0.0.1:PORT"; port; process.

    path: a GGUF file; port: 0 for any free one; context: tokens of each of `parallel` conversations; template: a Jinja text in place
    of the file's own; alias: the model name that clients see; temperature: for clients that ask for none (None: llama.cpp's 0.8);
    warmup: run the model once at the start, so that the first answer comes as soon as the next.
    Raises TunebookError when the file or the port is not usable.
    """

    def __init__(
        self,
        path: str | Path,
        port: int = 0,
        context: int = 4096,
        parallel: int = 1,
        threads: int = 0,
        template: str = "",
        alias: str = "",
        temperature: float | None = None,
        warmup: bool = True,
        timeout_s: float = 300,
    ):
        self.path = Path(path)
        header.check(self.path)
        if port:
            _refuse_taken(port)
        settings = {
            "path": str(self.path),
            "port": port,
            "context": context * parallel,
            "parallel": parallel,
            "threads": threads,
            "template": template,
            "alias": alias or self.path.stem,
            "temperature": temperature,
            "warmup": warmup,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.gguf.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=machine.PROJECT,
        )
        try:
            self.process.stdin.write(json.dumps(settings) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended at once: the missing line below says so
        line = self._first_line(timeout_s)
        if not line.startswith(READY):
            self.stop()
            code = self.process.returncode
            why = (
                "it was killed, most likely because the memory is full"
                if code in (-9, 137)
                else line.strip() or f"it ended with status {code}, most likely for want of memory"
            )
            raise TunebookError(
                f"llama.cpp's server did not start with {self.path.name} and a context of {context} tokens: {why}. "
                "Ask for a shorter context, a smaller quantisation or another port."
            )
        self.url = line.removeprefix(READY).strip()
        self.port = int(self.url.rsplit(":", 1)[1])

    def _first_line(self, timeout_s: float) -> str:
        import select

        readable, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        return self.process.stdout.readline() if readable else f"it was not ready after {timeout_s:.0f} s"

    def post(self, where: str, body: dict[str, Any], timeout_s: float = 600) -> dict[str, Any]:
        """POST JSON, read JSON. Raises TunebookError with the server's own message."""
        request = urllib.request.Request(
            self.url + where, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            try:
                text = json.loads(text)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                text = text[:300]
            raise TunebookError(f"llama.cpp's server refused {where} for {self.path.name}: {text.strip()}") from error
        except OSError as error:
            raise TunebookError(
                f"llama.cpp's server for {self.path.name} does not answer ({error}); start it again."
            ) from error

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def stop(self) -> None:
        """End the server; a second call does nothing."""
        if self.process.poll() is None:
            self.process.stdin.close()  # the child waits for this
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()


@contextmanager
def server(path: str | Path, **settings: Any) -> Iterator[Server]:
    """A `Server` that is stopped at the end of the block."""
    running = Server(path, **settings)
    try:
        yield running
    finally:
        running.stop()


def _refuse_taken(port: int) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise TunebookError(
                f"Port {port} on 127.0.0.1 cannot be used ({error.strerror}); choose another, or 0 for any free one."
            ) from None


def _child() -> None:
    """Body of the server process: settings come as one line of JSON, the end of standard input ends it."""
    settings = json.loads(sys.stdin.readline())
    import xllamacpp

    said = os.dup(1)
    os.dup2(2, 1)  # whatever the C++ code prints must not be taken for the address
    p = xllamacpp.CommonParams()
    p.model.path = settings["path"]
    p.hostnames, p.port = ["127.0.0.1"], settings["port"]
    p.n_ctx, p.n_parallel = settings["context"], settings["parallel"]
    p.model_alias = {settings["alias"]}
    p.use_jinja, p.offline, p.ui, p.verbosity = True, True, False, 0
    p.cors_origins = ""  # no web page may read from it
    p.warmup = settings["warmup"]
    if settings["template"]:
        p.chat_template = settings["template"]
    if settings["temperature"] is not None:
        p.sampling.temp = settings["temperature"]
    if (
        settings["threads"] or "OMP_NUM_THREADS" in os.environ
    ):  # llama.cpp does not read it; its own default is the physical cores
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = settings["threads"] or llama_structs.threads()
    try:
        running = xllamacpp.Server(p)
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        os.write(said, f"{' '.join(str(error).split())}\n".encode())
        raise SystemExit(1) from None
    os.write(said, f"{READY}{running.listening_address}\n".encode())
    sys.stdin.read()
    os._exit(0)  # requests that are still running need not end first


if __name__ == "__main__":
    _child()
