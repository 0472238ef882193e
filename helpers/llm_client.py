"""The one client of OpenAI-compatible servers (vLLM, Ollama, llama.cpp's, a paid one): every question is asked once.

    with Client(Endpoint("http://127.0.0.1:8080/v1", "name"), Answers(folder, "synthetic")) as client:
        for reply in client.ask(Request(messages) for messages in conversations): ...

Questions go out several at a time, broken connections are retried with growing pauses, and an answer is kept the moment
it arrives: a killed job resumes and pays for nothing twice. Kept answers belong to what the server served when they
were given (`Client.served`): another model behind the same address gets none of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from helpers import cache
from helpers.display import say
from helpers.errors import TunebookError

KEY_NAMES = "TUNEBOOK_KEY_NAMES"  # other variables that may hold a key, separated by commas; a recipe cannot set it
REPLY_BYTES = 8 << 20  # a longer reply is nonsense
WINDOW = 16  # questions for each connection that are read ahead
SAME_LOGPROB = 0.05  # the same weights differ by less from one request to the next


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how.

    model: its name there, "" for the first that the server lists. key_name: the environment variable that holds the
    key, "" for none; the key itself is neither printed nor written. timeout_s: for an answer.
    retries: of refused or broken connections, heeding Retry-After.
    """

    base_url: str
    model: str = ""
    key_name: str = "OPENAI_API_KEY"
    concurrency: int = 4
    retries: int = 5
    timeout_s: float = 300.0

    def __str__(self) -> str:
        address = shown_url(self.base_url)
        return f"{self.model!r} at {address}" if self.model else address


def shown_url(text: str) -> str:
    """Addresses as messages may show them: user name and password masked."""
    return re.sub(r"(?<=://)[^/@\s]*@", "***@", text)


def about_tokens(text: str) -> int:
    """Tokens of a text by its bytes: English prose has about 4.5 to a token, code 3, Chinese 4."""
    return round(len(text.encode("utf-8", "surrogatepass")) / 3.5)


@dataclass(frozen=True)
class Request:
    """One question: chat messages, the JSON schema of the answer (None: any text), sampling, tools. `tag` is not
    sent."""

    messages: list[dict[str, Any]]
    schema: dict[str, Any] | None = None
    max_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0
    tag: Any = field(default=None, compare=False)
    tools: list[dict[str, Any]] | None = None

    def body(self, model: str) -> dict[str, Any]:
        """What is sent."""
        sent: dict[str, Any] = {"model": model, "messages": self.messages, "max_tokens": self.max_tokens}
        sent |= {"temperature": self.temperature, "seed": self.seed}
        if self.tools:
            sent["tools"] = self.tools
        if self.schema is not None:
            named = {"name": "answer", "strict": True, "schema": self.schema}
            sent["response_format"] = {"type": "json_schema", "json_schema": named}
        return sent


PROBE = Request([{"role": "user", "content": "Introduce yourself, then count to ten in words."}], None, 24, 0.0)


@dataclass(frozen=True)
class Reply:
    """An answer. value: its JSON where there is a schema. error: why it cannot be used. finished: it ended by itself.
    kept: it was given in an earlier run."""

    request: Request
    text: str
    value: Any
    error: str
    finished: bool
    prompt_tokens: int
    completion_tokens: int
    kept: bool


def openai_client(base_url: str, key: str = "none") -> Any:
    """An `openai.OpenAI` client of an OpenAI-compatible server, for a person at the keyboard: no cache, no retries."""
    import openai

    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=600)


class Client:
    """A connection to one server. answers: where its answers are kept; None keeps them for no longer than a window."""

    def __init__(self, endpoint: Endpoint, answers: cache.Answers | None = None) -> None:
        import openai

        if not re.match(r"https?://[^/]", endpoint.base_url):
            raise TunebookError(f"The endpoint {endpoint} is not a valid address, such as http://127.0.0.1:8080/v1.")
        allowed = os.environ.get(KEY_NAMES, "").split(",")
        usual = endpoint.key_name.endswith(("_API_KEY", "_TOKEN"))
        if endpoint.key_name and not usual and endpoint.key_name not in allowed:
            raise TunebookError(
                f"The key of an endpoint is read from a variable whose name ends in _API_KEY or _TOKEN, and "
                f"{endpoint.key_name[:80]!r} does not; set {KEY_NAMES}={endpoint.key_name[:80]} to allow this one."
            )
        self.endpoint, self.answers = endpoint, answers
        self._openai = openai.OpenAI(
            base_url=endpoint.base_url,
            api_key=os.environ.get(endpoint.key_name) or "none",
            max_retries=endpoint.retries,
            timeout=endpoint.timeout_s,
        )
        self._turn = threading.Lock()
        self._failures, self._answered, self._gone = 0, False, ""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self._openai.close()

    @functools.cached_property
    def entry(self) -> dict[str, Any]:
        """What /models says of the model; only its name where the server does not list it."""
        import openai

        wanted, listed = self.endpoint.model, []
        try:
            listed = [one.model_dump() for one in self._openai.models.list().data]
        except openai.NotFoundError:
            pass
        except Exception as error:
            raise TunebookError(self._said(error)) from None
        if not (wanted or listed):
            raise TunebookError(f"The endpoint {self.endpoint} lists no models; name one as url#model.")
        entry = next((one for one in listed if one["id"] == wanted or not wanted), {"id": wanted})
        return {name: value for name, value in entry.items() if name != "created"}  # often the time of the request

    @property
    def model(self) -> str:
        return self.endpoint.model or self.entry["id"]

    @functools.cached_property
    def served(self) -> str:
        """A name for what the server serves now: its entry in /models and its greedy answer to one question.

        Where the server gives log probabilities they are compared, so that two models of one family differ.
        """
        import openai

        create = functools.partial(self._openai.chat.completions.create, **PROBE.body(self.model))
        record: dict[str, Any] = {"entry": self.entry, "server": self._server()}
        try:
            try:
                choice = create(logprobs=True).choices[0]
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                choice = create().choices[0]
            record["text"] = choice.message.content
            record["logprobs"] = [one.logprob for one in (choice.logprobs and choice.logprobs.content) or []]
        except Exception as error:
            raise TunebookError(self._said(error)) from None
        known = (self.answers and self.answers.get("servers")) or {}
        for name, one in known.items():
            pairs = zip(one["logprobs"], record["logprobs"], strict=False)
            near = all(abs(a - b) < SAME_LOGPROB for a, b in pairs)
            if near and all(one.get(part) == record[part] for part in ("entry", "server", "text")):
                return name
        if known:
            say(f"{self.endpoint} is another model than when its answers were kept: they are not used.")
        name = cache.key(record)[:16]
        if self.answers:
            self.answers.put("servers", {**known, name: record})
        return name

    def _server(self) -> list[Any]:
        """What llama.cpp, Ollama and SGLang say of the file that they serve; nothing from other servers."""
        import httpx

        root, found = self.endpoint.base_url.rstrip("/").removesuffix("/v1"), list[Any]()
        for where in ("/props", "/api/tags", "/get_model_info"):
            with contextlib.suppress(httpx.HTTPError, ValueError, AttributeError, TypeError):
                told = httpx.get(root + where, timeout=5).raise_for_status().json()
                files = [
                    one.get("digest")
                    for one in told.get("models", ())
                    if self.model in (one.get("name"), one.get("model"))
                ]
                found += [told.get("model_path"), told.get("chat_template"), told.get("build_info"), *files]
        return [part for part in found if part]

    # ------------------------------------------------------------ asking

    def ask(self, requests: Iterable[Request], patience: int = 1) -> Iterator[Reply]:
        """Answers in the order of the requests, `concurrency` asked at a time, those that are kept not at all.

        An answer that breaks its schema, or a question that the server refuses for what it is (too long), comes back
        with an error. patience: failures in a row after which the server is taken for gone and asked no more. With 1
        the first failure raises TunebookError; with more, failures are their replies' errors, and only a server that
        never answered at all raises.
        """
        waiting = iter(requests)
        with ThreadPoolExecutor(self.endpoint.concurrency, thread_name_prefix="endpoint") as pool:
            while window := list(itertools.islice(waiting, WINDOW * self.endpoint.concurrency)):
                keys = [self._key(request) for request in window]
                new = {key: one for key, one in zip(keys, window, strict=True) if not self._known(key)}
                ask = functools.partial(self._work, patience=patience)
                given = dict(zip(new, pool.map(ask, new, new.values()), strict=True))
                for key, request in zip(keys, window, strict=True):
                    record = given.get(key) or self._known(key)
                    if record.get("failed") and (patience == 1 or (self._gone and not self._answered)):
                        raise TunebookError(record["error"] if patience == 1 else self._gone)
                    yield _reply(request, record, kept=key not in given)

    def estimate(self, requests: Iterable[Request]) -> Counter[str]:
        """How many questions `ask` would send (new) and not (kept); about how many tokens it sends (tokens_in) and at
        most gets (tokens_out). Sends none of them."""
        found = Counter(new=0, kept=0, tokens_in=0, tokens_out=0)
        for request in requests:
            if self._known(self._key(request)):
                found["kept"] += 1
            else:
                tokens_in = sum(about_tokens(message["content"]) for message in request.messages)
                found.update(new=1, tokens_in=tokens_in, tokens_out=request.max_tokens)
        return found

    def _key(self, request: Request) -> str:
        return cache.key(self.served if self.answers else "", request.body(self.model))

    def _known(self, key: str) -> dict[str, Any]:
        return (self.answers and self.answers.get(key)) or {}

    def _work(self, key: str, request: Request, patience: int) -> dict[str, Any]:
        """In a thread: one question, kept when it was answered."""
        import openai

        if self._gone:
            return {"failed": True, "error": self._gone}
        try:
            reply = self._whole_reply(request)
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            record = {
                "text": _text_of(choice["message"]),
                "finished": choice.get("finish_reason") in ("stop", "tool_calls"),
            }
            record |= {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            record = {"error": f"the server refused the question: {_short(error)}"}
        except Exception as error:  # whatever a server may send: the question fails with it, not the run
            record = {"failed": True, "error": self._said(error)}
        with self._turn:
            self._failures = self._failures + 1 if "failed" in record else 0
            self._answered |= "failed" not in record
            limit = patience + 2 * self.endpoint.concurrency if self._answered and patience > 1 else patience
            if self._failures >= limit:
                self._gone = f"{record['error']} It failed {self._failures} times in a row and is asked no more."
        if self.answers and "failed" not in record:
            self.answers.put(key, record)
        return record

    def _whole_reply(self, request: Request) -> dict[str, Any]:
        """The reply's JSON, read piece by piece: one that trickles or floods in meets a limit too."""
        import openai

        deadline, body = time.monotonic() + self.endpoint.timeout_s, bytearray()
        with self._openai.chat.completions.with_streaming_response.create(**request.body(self.model)) as reply:
            for piece in reply.iter_bytes():
                body += piece
                if time.monotonic() > deadline:
                    raise openai.APITimeoutError(reply.http_request)
                if len(body) > REPLY_BYTES:
                    raise ValueError(f"the reply is longer than {REPLY_BYTES:,} bytes")
        return json.loads(body)

    def _said(self, error: Exception) -> str:
        """What went wrong, and what to do about it."""
        import openai

        who, times, status = self.endpoint, self.endpoint.retries + 1, getattr(error, "status_code", None)
        if status in (401, 403):
            return f"{who} refused the key in ${who.key_name} (status {status}); set it and run again."
        if status == 404:
            return f"{who} was not found ({_short(error)}); check the model's name and the address, which ends in /v1."
        if isinstance(error, openai.APITimeoutError):
            return f"{who} gave no answer within {who.timeout_s:g} s; what was answered is kept."
        if isinstance(error, openai.APIConnectionError):
            return f"{who} does not answer (tried {times} times); start the server and run again."
        if status:
            return f"{who} failed {times} times ({_short(error)}); run again later: what was answered is kept."
        return f"{who} sent what cannot be read ({type(error).__name__}: {_short(error)})."


def _text_of(message: dict[str, Any]) -> str:
    """An answer's text; calls that the server took out of it as JSON text behind it."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    calls = [{**call, "arguments": json.loads(call["arguments"])} for call in calls]
    text = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False) if calls else ""
    return "\n".join(filter(None, [message["content"], text])) if calls else message["content"] + ""


def _short(error: Any) -> str:
    body = error.body if isinstance(getattr(error, "body", None), dict) else {}
    return shown_url(" ".join(str(body.get("message") or error).split())[:300])


def _reply(request: Request, record: dict[str, Any], kept: bool) -> Reply:
    text, finished, value = record.get("text", ""), record.get("finished", False), None
    error = record.get("error", "")
    if request.schema is not None and not error:
        try:
            value = json.loads(text) if finished else None
            error = breaks(value, request.schema) if finished else "the answer was cut off"
        except ValueError as wrong:
            error = f"the answer is not valid JSON ({wrong})"
    tokens = record.get("prompt_tokens", 0), record.get("completion_tokens", 0)
    return Reply(request, text, None if error else value, error, finished, *tokens, kept)


def breaks(value: Any, schema: dict[str, Any]) -> str:
    """How `value` breaks a JSON schema; "" when it keeps it."""
    import jsonschema

    wrong = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(value))
    return "" if wrong is None else f"the answer breaks its schema: {wrong.message[:200]}"
