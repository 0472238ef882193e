"""A GGUF model in a process of its own: it may crash alone, its threads don't wait for torch's, and it ends with the
process that started it. `GgufModel` answers and scores; `Server` is llama.cpp's OpenAI-compatible server on loopback.

    with Server("model-q8_0.gguf") as s:
        openai.OpenAI(base_url=s.url + "/v1", api_key=s.key)
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NoReturn, Self

from helpers import worker
from helpers.data.rendering import LITERAL, Chat, openai_form, spelt_out
from helpers.data.turns import RowError
from helpers.errors import TunebookError
from helpers.gguf import gateway, header, libraries
from helpers.tasks.questions import Answer, Decoding

KEY_NAME = "TUNEBOOK_SERVER_KEY"
PARALLEL = 32  # answers at once; on 2 cores 16 gains 15 % less, 64 nothing more
Ids = Sequence[int]


class GgufModel:
    """A GGUF file with the methods of a Hugging Face model in evaluation. Close it.

    Prompts are rendered from the template inside the file by llama.cpp's own Jinja and cut into tokens by its own
    tokenizer: what is judged is the whole chain that a person downloads.

    end_of_turn: text of the token that ends an assistant's turn ("<|im_end|>"). chat: how the run's template shows
    turns. options: `LlamaCpp`'s. Raises TunebookError, with the runtime's last lines when its process ends.
    """

    def __init__(self, path: Path, end_of_turn: str = "", chat: Chat | None = None, **options: Any):
        self.path, self._end = Path(path), end_of_turn
        start = {"path": str(path), "parallel": PARALLEL, **options}
        self._chat = chat
        self._talks = "tokenizer.chat_template" in header.check(path).metadata
        name = f"llama.cpp with {self.path.name}"
        self._child = worker.Worker("helpers.gguf.llama_cpp:LlamaCpp", start=start, name=name)
        self.close = self._child.close

    def ask(self, method: str, *arguments: Any, on_event: worker.Event | None = None) -> Any:
        """What a method of `helpers.gguf.llama_cpp.LlamaCpp` returns."""
        return self._child.ask([method, *arguments], on_event, timeout_s=None)

    def encode(self, messages: Sequence[dict[str, Any]], tools: str | None = None) -> list[int]:
        """Token ids of the conversation with the generation prompt; one BOS where the model has one. tools: JSON text.
        Raises RowError where the template refuses it, TunebookError for a file without one."""
        if not self._talks:
            found = f"{self.path} has no chat template inside, so nobody can know how to ask it a question."
            raise TunebookError(found)
        shown = list(messages)
        if self._chat:
            shown, tools = self._chat.shown({"messages": shown, "tools": tools})
        if self._chat and tools:  # llama.cpp's server writes a tool list anew: other keys, other order
            text = self._chat.text(list(messages), tools)
        else:
            try:
                text = self.ask("apply_template", openai_form(shown), json.loads(tools) if tools else None)
            except TunebookError as error:
                raise RowError("template refused", str(error)) from None
        if self._chat and LITERAL in text:  # control tokens that are text here
            parts = self._chat.parts(text)
            ids = [i for part, special in parts for i in self.ask("tokenize", part, False, special)]
            ids = [self.bos, *ids] if self.bos is not None else ids
        else:
            ids = self.tokenize(text, True)
        return ids[1:] if ids[:2] == [self.bos, self.bos] else ids

    def answered(self, messages: list[dict], tools: str | None, turns: list[dict]) -> list[tuple[Ids, Ids]]:
        """(what comes before, tokens with the end of turn) of each answer in `turns`."""
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("weight", 1)]
        spelt = [spelt_out(turns[i])["content"] for i in places]
        before = [self.encode([*messages, *turns[:i]], tools) for i in places]
        return [(ids, self.tokens(text, end=True)) for ids, text in zip(before, spelt, strict=True)]

    @functools.cached_property
    def bos(self) -> int | None:
        """The BOS that the model wants before a text; None for one without."""
        return next(iter(self.tokenize("", True)), None)

    def tokens(self, text: str, end: bool = False) -> list[int]:
        """Token ids of plain text, with the end of turn after it when `end`."""
        return self.ask("tokenize", text, False, False) + (self.tokenize(self._end) if end and self._end else [])

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of a text in which control tokens count as such; with the model's own BOS when `add_special`."""
        return self.ask("tokenize", text, add_special)

    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        return self.ask("ends")

    def generate(
        self, prompts: Sequence[Ids], decoding: Decoding, done: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """An answer to each prompt, in order; `done(index, answer)` as they come, so that a killed run keeps them."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first
        answers: dict[int, Answer] = {}

        def event(value: Any) -> None:
            place, text, tokens, stopped = value
            answers[order[place]] = Answer(text.strip(), tokens, stopped)
            if done:
                done(order[place], answers[order[place]])

        self.ask("generate", [list(prompts[i]) for i in order], *astuple(decoding), on_event=event)
        return [answers[i] for i in range(len(prompts))]

    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[list[float], bool]]:
        """For each (prompt ids, completion ids) the natural log-probability of every completion token, from the
        runtime's logits, and whether every one was the most likely token."""
        return [self.ask("score", list(prompt), list(completion)) for prompt, completion in pairs]

    def logprobs(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[list[float]]:
        return [values for values, _ in self.score(pairs)]


class Server:
    """A running server, a context manager. url: "http://127.0.0.1:PORT"; key: what clients send; port; process.

    port: 0 for any free one; context: tokens of each of `parallel` conversations; temperature: for clients that ask for
    none. Clients see the file's stem as the model's name. The key is $TUNEBOOK_SERVER_KEY, or a new one each time.
    """

    def __init__(
        self, path: str | Path, port: int = 0, context: int = 4096, parallel: int = 1, temperature: float = 0.0
    ):
        self.path = Path(path)
        header.check(self.path)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            raise TunebookError(
                f"Port {port} on 127.0.0.1 cannot be used ({error.strerror}); choose another, or 0 for any free one."
            ) from None
        settings: dict[str, Any] = {"path": str(self.path), "port": port, "context": context * parallel}
        settings |= {"parallel": parallel, "temperature": temperature}
        self._name = f"llama.cpp's server for {self.path.name}"
        running = "helpers.gguf.runner:Running"
        try:
            self._child = worker.Worker(running, start=settings, name=self._name, start_timeout_s=300)
        except TunebookError as error:
            raise TunebookError(
                f"{error} It was to have a context of {parallel} × {context} tokens; ask for a shorter one, a smaller "
                "quantisation or another port."
            ) from error
        self.process, (self.url, self.key) = self._child.process, self._child.started
        self.port = int(self.url.rsplit(":", 1)[1])
        self.stop = self._child.close  # a second call does nothing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def post(self, where: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST JSON, read JSON. Raises TunebookError with the server's own message."""
        import httpx

        try:
            # plain HTTP on this machine: loading certificates would take 18 ms a request
            headers = {"Authorization": f"Bearer {self.key}"}
            reply = httpx.post(self.url + where, json=body, headers=headers, timeout=600, trust_env=False, verify=False)
        except httpx.HTTPError as error:
            said = f"{error}; {self._child.last_words()}"
            raise TunebookError(f"{self._name} does not answer ({said}); start it again.") from error
        if reply.is_error:
            raise TunebookError(f"{self._name} refused {where}: {reply.text.strip()[:300]}")
        return reply.json()

    def healthy(self) -> bool:
        import httpx

        try:
            return httpx.get(self.url + "/health", timeout=5, trust_env=False, verify=False).is_success
        except httpx.HTTPError:
            return False

    def wait(self) -> NoReturn:
        """Return never while the server runs. Raises TunebookError with its last lines when it ends by itself."""
        status = self.process.wait()
        said = self._child.last_words() or "most likely for want of memory: ask for a shorter context"
        raise TunebookError(f"{self._name} ended with status {status}: {said}.")


class Running:
    """Body of the server's process; `started` is the address and the key, which no command line shows."""

    def __init__(self, path: str, port: int, context: int, parallel: int, temperature: float):
        import xllamacpp

        p = xllamacpp.CommonParams()
        p.model.path, p.model_alias = path, {Path(path).stem}
        key, inner_key = os.environ.get(KEY_NAME) or secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        p.hostnames, p.port, p.api_keys = ["127.0.0.1"], 0, [inner_key]
        p.n_ctx, p.n_parallel, p.sampling.temp = context, parallel, temperature
        p.use_jinja, p.offline, p.ui, p.warmup = True, True, False, False  # the first answer warms it up as well
        p.verbosity = 1  # errors, which the message of a failure quotes
        p.cors_origins = ""  # no web page may read from it
        if "OMP_NUM_THREADS" in os.environ:  # llama.cpp does not read it; its own default is the physical cores
            p.cpuparams.n_threads = p.cpuparams_batch.n_threads = libraries.threads()
        try:
            self._server = xllamacpp.Server(p)
        except (RuntimeError, ValueError, OSError, MemoryError) as error:
            said = os.pread(2, 8000, 0).decode("utf-8", "replace")  # the file that helpers.worker gives it
            raise libraries.failure(f"starting a server for {path}", f"{said}\n{error}") from None
        inner, model = self._server.listening_address, Path(path).stem
        self.started = gateway.start(port, key, inner, inner_key, model, context // parallel), key

    def __call__(self, request: Any, event: worker.Event) -> None:
        """Nothing is asked through the pipe: its end ends the server."""
