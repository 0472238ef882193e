"""Many questions to an OpenAI-compatible server (vLLM, Ollama, llama.cpp's, a paid one), asked once each.

Answers are held to a JSON schema, asked with bounded concurrency and retried with growing pauses. Each is written to a
journal the moment it arrives, so that a killed job goes on where it stopped and pays for no answer twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError

CHARS_PER_TOKEN = 3.5  # English prose has about 4.5 to a token, code 3, Chinese 1.5


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how.

    base_url: such as "http://127.0.0.1:8080/v1". key_name: the environment variable that holds the key, "" for none;
    the key itself is neither printed nor written. price_in, price_out: per million tokens, 0 for a server of one's own.
    timeout_s: for one answer. retries: of refused or broken connections, with doubling pauses that heed Retry-After.
    """

    base_url: str
    model: str
    key_name: str = "OPENAI_API_KEY"
    concurrency: int = 4
    retries: int = 5
    timeout_s: float = 300.0
    price_in: float = 0.0
    price_out: float = 0.0

    def client(self) -> Any:
        import openai

        if not self.base_url.startswith(("http://", "https://")):
            raise TunebookError(
                f"The endpoint {self.base_url!r} is no address; it takes one such as http://127.0.0.1:8080/v1."
            )
        key = os.environ.get(self.key_name, "") if self.key_name else ""
        return openai.OpenAI(
            base_url=self.base_url, api_key=key or "none", max_retries=self.retries, timeout=self.timeout_s
        )


@dataclass(frozen=True)
class Request:
    """One question: chat messages, the JSON schema of the answer, sampling. `tag` is the caller's own and is not sent."""

    messages: list[dict[str, str]]
    schema: dict[str, Any]
    max_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0
    tag: Any = field(default=None, compare=False)

    def body(self, endpoint: Endpoint) -> dict[str, Any]:
        return {
            "model": endpoint.model,
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": self.schema},
            },
        }

    def key(self, endpoint: Endpoint) -> str:
        """Hash of what is sent: the same question to the same model has the same key in any run."""
        return hashlib.sha256(
            json.dumps(self.body(endpoint), sort_keys=True).encode("utf-8", "surrogatepass")
        ).hexdigest()[:32]


@dataclass(frozen=True)
class Reply:
    """An answer: `value` is the parsed JSON, or None with `error` saying why; tokens as the server counted them."""

    request: Request
    value: Any
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    from_journal: bool = False


class Journal:
    """Answers on disk, one JSON line each, appended and synced as they arrive; a torn last line is ignored."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._offsets: dict[str, int] = {}
        self._turn = threading.Lock()
        self._file = self.path.open("a+b")
        self._lock()
        self._file.seek(0)
        at = 0
        for line in self._file:
            if line.endswith(b"\n"):
                with contextlib.suppress(
                    ValueError, KeyError, TypeError
                ):  # half a line of a killed run: it is asked again
                    self._offsets[json.loads(line)["key"]] = at
            at += len(line)
        if at and not line.endswith(b"\n"):
            self._file.write(b"\n")

    def _lock(self) -> None:
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: no second process is expected there
            return
        except OSError:
            self._file.close()
            raise TunebookError(
                f"Another process is writing {self.path}; wait for it to end, or name another folder."
            ) from None

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, key: str) -> dict[str, Any]:
        with self._turn:
            self._file.seek(self._offsets[key])
            return json.loads(self._file.readline())

    def write(self, key: str, record: dict[str, Any]) -> None:
        """Called by the threads that ask, so that an answer is on disk before anything else happens."""
        with self._turn:
            at = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps({"key": key, **record}, ensure_ascii=True).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._offsets[key] = at

    def close(self) -> None:
        self._file.close()


def ask_all(endpoint: Endpoint, requests: Iterable[Request], journal: Journal) -> Iterator[Reply]:
    """Answers in the order of the requests, `endpoint.concurrency` asked at a time, those in the journal not at all.

    An answer that breaks the schema comes back with an error; a question that the server refuses for what it is (too
    long) likewise. Raises TunebookError when the server cannot be reached, knows no such model or refuses the key:
    what was answered until then is in the journal.
    """
    client = endpoint.client()
    pool = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="endpoint")
    waiting: deque[tuple[Request, str, Future | None]] = deque()
    asked: dict[str, Future] = {}  # a question asked twice in one run is sent once

    failed = threading.Event()  # after a failure that stops the job nothing more is asked

    def work(request: Request, key: str) -> None:
        if failed.is_set():
            return
        try:
            _ask(client, endpoint, request, key, journal)
        except BaseException:
            failed.set()
            raise

    def head() -> Reply:
        request, key, future = waiting.popleft()
        if future is not None:
            future.result()
            asked.pop(key, None)
        return _reply(request, journal.read(key), from_journal=future is None)

    try:
        for request in requests:
            key = request.key(endpoint)
            future = asked.get(key)
            if future is None and key not in journal:
                future = asked[key] = pool.submit(work, request, key)
            waiting.append((request, key, future))
            if len(waiting) >= 4 * endpoint.concurrency:
                yield head()
        while waiting:
            yield head()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # what is under way has been paid for: it is journalled
        client.close()


def _ask(client: Any, endpoint: Endpoint, request: Request, key: str, journal: Journal) -> None:
    import openai

    where = f"{endpoint.model!r} at {endpoint.base_url}"
    try:
        done = client.chat.completions.create(**request.body(endpoint))
    except (openai.AuthenticationError, openai.PermissionDeniedError) as err:
        raise TunebookError(
            f"{where} refused the key in ${endpoint.key_name} (status {err.status_code}); set it and run again."
        ) from None
    except openai.NotFoundError as err:
        raise TunebookError(
            f"{where} was not found ({_said(err)}); check the model's name and the address, which ends in /v1."
        ) from None
    except (openai.BadRequestError, openai.UnprocessableEntityError) as err:
        journal.write(key, {"content": "", "error": f"the server refused the question: {_said(err)}"})
        return
    except openai.APIConnectionError as err:  # a timeout is one
        raise TunebookError(
            f"{where} does not answer ({type(err).__name__}, tried {endpoint.retries + 1} times); start the server and run again: "
            "what was answered is kept."
        ) from None
    except openai.APIStatusError as err:
        raise TunebookError(
            f"{where} failed {endpoint.retries + 1} times ({_said(err)}); run again later: what was answered is kept."
        ) from None
    choice = done.choices[0] if done.choices else None
    usage = done.usage
    finish = choice.finish_reason if choice else "no answer"
    record = {
        "content": (choice.message.content or "") if choice else "",
        "error": "" if finish == "stop" else f"the answer was cut off ({finish})",
        "prompt_tokens": usage.prompt_tokens if usage else 0,
        "completion_tokens": usage.completion_tokens if usage else 0,
    }
    journal.write(key, record)


def _said(err: Any) -> str:
    body = err.body if isinstance(err.body, dict) else {}
    return str(body.get("message") or err)[:300]


def _reply(request: Request, record: dict[str, Any], from_journal: bool) -> Reply:
    value, error = None, record.get("error", "")
    if not error:
        try:
            value = json.loads(record["content"])
            error = breaks(value, request.schema)
        except ValueError as err:
            error = f"the answer is no JSON ({err})"
    counts = {name: int(record.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
    return Reply(request, None if error else value, error, from_journal=from_journal, **counts)


def breaks(value: Any, schema: dict[str, Any], where: str = "the answer") -> str:
    """How `value` breaks a schema of objects, arrays, strings, numbers and enums; "" when it keeps it."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        return f"{where} is no {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {value!r}"
    if kind == "object":
        for name in schema.get("required", []):
            if name not in value:
                return f"{where} lacks {name!r}"
        parts = ((name, part, schema.get("properties", {}).get(name, {})) for name, part in value.items())
        return next((why for name, part, inner in parts if (why := breaks(part, inner, repr(name)))), "")
    if kind == "array":
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} items"
        return next((why for part in value if (why := breaks(part, schema.get("items", {}), "an item"))), "")
    if kind in ("integer", "number") and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return f"{where} is {value}"
    return ""


@dataclass(frozen=True)
class Estimate:
    """What a job will cost at most, before the first question. Tokens are guessed at 3.5 characters each without a tokenizer."""

    requests: int
    in_journal: int
    prompt_tokens: int
    completion_tokens: int
    cost: float

    def __str__(self) -> str:
        return (
            f"{self.requests:,} questions to ask ({self.in_journal:,} already answered), about {self.prompt_tokens:,} tokens in and "
            f"at most {self.completion_tokens:,} out: at most {self.cost:,.2f} at the endpoint's prices"
        )


def estimate(
    endpoint: Endpoint, requests: Iterable[Request], journal: Journal | None = None, tokenizer: Any = None
) -> Estimate:
    """Count what `ask_all` would ask. Sends nothing."""
    asked = known = prompt = completion = 0
    for request in requests:
        if journal is not None and request.key(endpoint) in journal:
            known += 1
            continue
        text = "\n".join(message["content"] for message in request.messages)
        prompt += len(tokenizer(text)["input_ids"]) if tokenizer is not None else round(len(text) / CHARS_PER_TOKEN)
        completion += request.max_tokens
        asked += 1
    return Estimate(
        asked, known, prompt, completion, (prompt * endpoint.price_in + completion * endpoint.price_out) / 1e6
    )
