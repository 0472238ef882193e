"""llama.cpp's OpenAI-compatible server on loopback, in a process of its own that ends with the one that started it.

with Server("model-q8_0.gguf") as s:
    openai.OpenAI(base_url=s.url + "/v1", api_key="none")
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, NoReturn, Self

from helpers import worker
from helpers.errors import TunebookError
from helpers.gguf import header, libraries


class Server:
    """A running server, a context manager. url: "http://127.0.0.1:PORT"; port; process.

    port: 0 for any free one; context: tokens of each of `parallel` conversations; alias: the model name that clients
    see; temperature: for clients that ask for none (None: llama.cpp's 0.8); warmup: run the model once at the start,
    so that the first answer comes as soon as the next.
    """

    def __init__(
        self,
        path: str | Path,
        port: int = 0,
        context: int = 4096,
        parallel: int = 1,
        alias: str = "",
        temperature: float | None = None,
        warmup: bool = True,
    ):
        self.path = Path(path)
        header.check(self.path)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            raise TunebookError(
                f"Port {port} on 127.0.0.1 cannot be used ({error.strerror}); choose another, or 0 for any free one."
            ) from None
        settings = {"path": str(self.path), "port": port, "context": context * parallel, "parallel": parallel}
        settings |= {"alias": alias or self.path.stem, "temperature": temperature, "warmup": warmup}
        name = f"llama.cpp's server for {self.path.name}"
        try:
            self._child = worker.Worker("helpers.gguf.server:Running", start=settings, name=name, start_timeout_s=300)
        except TunebookError as error:
            raise TunebookError(
                f"{error} It was to have a context of {parallel} × {context} tokens; ask for a shorter one, a smaller "
                "quantisation or another port."
            ) from error
        self.process, self.url = self._child.process, self._child.started
        self.port = int(self.url.rsplit(":", 1)[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def post(self, where: str, body: dict[str, Any], timeout_s: float = 600) -> dict[str, Any]:
        """POST JSON, read JSON. Raises TunebookError with the server's own message."""
        import httpx

        try:
            reply = httpx.post(self.url + where, json=body, timeout=timeout_s, trust_env=False)
        except httpx.HTTPError as error:
            raise TunebookError(
                f"llama.cpp's server for {self.path.name} does not answer ({error}; {self._child.last_words()}); "
                "start it again."
            ) from error
        if reply.is_error:
            raise TunebookError(f"llama.cpp's server refused {where} for {self.path.name}: {reply.text.strip()[:300]}")
        return reply.json()

    def healthy(self) -> bool:
        import httpx

        try:
            return httpx.get(self.url + "/health", timeout=5, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def wait(self) -> NoReturn:
        """Return never while the server runs. Raises TunebookError with its last lines when it ends by itself."""
        status = self.process.wait()
        said = self._child.last_words() or "most likely for want of memory: ask for a shorter context"
        raise TunebookError(f"llama.cpp's server for {self.path.name} ended with status {status}: {said}.")

    def stop(self) -> None:
        """End the server; a second call does nothing."""
        self._child.close()


class Running:
    """Body of the server's process; `started` is the address."""

    def __init__(self, path: str, port: int, context: int, parallel: int, alias: str, temperature: Any, warmup: bool):
        import xllamacpp

        p = xllamacpp.CommonParams()
        p.model.path, p.model_alias = path, {alias}
        p.hostnames, p.port = ["127.0.0.1"], port
        p.n_ctx, p.n_parallel, p.warmup = context, parallel, warmup
        p.use_jinja, p.offline, p.ui = True, True, False
        p.verbosity = 1  # errors, which the message of a failure quotes
        p.cors_origins = ""  # no web page may read from it
        if temperature is not None:
            p.sampling.temp = temperature
        if "OMP_NUM_THREADS" in os.environ:  # llama.cpp does not read it; its own default is the physical cores
            p.cpuparams.n_threads = p.cpuparams_batch.n_threads = libraries.threads()
        try:
            self._server = xllamacpp.Server(p)
        except (RuntimeError, ValueError, OSError, MemoryError) as error:
            said = os.pread(2, 8000, 0).decode("utf-8", "replace")  # the file that helpers.worker gives it
            raise libraries.failure(f"starting a server for {path}", f"{said}\n{error}") from None
        self.started = self._server.listening_address

    def __call__(self, request: Any, event: worker.Event) -> None:
        """Nothing is asked through the pipe: its end ends the server."""
