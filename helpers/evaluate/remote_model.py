"""Any OpenAI-compatible server as a candidate or a judge: several requests at once, each with a time limit and few retries.

A server that stalls, errors or answers nonsense costs the item it failed on, never the run. Keys come from the environment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from helpers.errors import TunebookError
from helpers.tasks.answers import Answer, Decoding

TIMEOUT_S = 60.0  # of one request, and of reading its reply
RETRIES = 2
AT_ONCE = 8
GIVE_UP = (
    5  # failures in a row after which a server that never answered is taken for gone; one that did gets two rounds more
)
ANSWER_CHARS = 65536  # an answer longer than this is nonsense and is cut
REPLY_BYTES = 8 << 20


class Endpoint:
    """url: the base, such as http://127.0.0.1:8080/v1; model: its name there, "" for the first that /models lists."""

    path_note = "OpenAI-compatible endpoint"

    def __init__(
        self, url: str, model: str = "", key: str = "none", timeout_s: float = TIMEOUT_S, at_once: int = AT_ONCE
    ):
        import openai

        self.url, self.at_once, self.timeout_s = url, at_once, timeout_s
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=RETRIES)
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        import openai

        try:
            listed = list(self.client.with_options(timeout=15, max_retries=0).models.list().data)
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            raise TunebookError(
                f"The endpoint {self.url} lists no models ({_short(error)}); start it, check the address, or name the "
                "model as url#model."
            ) from None
        if not listed:
            raise TunebookError(f"The endpoint {self.url} lists no models; name one as url#model.")
        return listed[0].id

    def close(self) -> None:
        self.client.close()

    def encode(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """The messages as they are: the server renders them."""
        return [dict(m) for m in messages]

    def generate(
        self,
        prompts: Sequence[list[dict[str, str]]],
        decoding: Decoding,
        done: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """An answer a conversation; one that failed has `failed` set. A server that keeps failing is asked no more: the rest fails with
        that reason or, where nothing was ever answered, TunebookError is raised."""
        answers: list[Answer | None] = [None] * len(prompts)
        failures, gone = 0, ""

        def ask(prompt: list[dict[str, str]]) -> Answer:
            return Answer("", 0, False, gone) if gone else self.ask(prompt, decoding)

        with ThreadPoolExecutor(self.at_once) as pool:
            jobs = {pool.submit(ask, prompt): i for i, prompt in enumerate(prompts)}
            for job in as_completed(jobs):
                i = jobs[job]
                answers[i] = job.result()
                failures = failures + 1 if answers[i].failed else 0
                patience = GIVE_UP if all(a is None or a.failed for a in answers) else GIVE_UP + 2 * self.at_once
                if failures >= patience and not gone:
                    gone = f"the server failed {failures} times in a row and was asked no more ({answers[i].failed})"
                if done:
                    done(i, answers[i])
        if gone and all(a.failed for a in answers):
            raise TunebookError(
                f"The endpoint {self.url} answered nothing: {gone}. Check that it serves this model, then run this again."
            )
        return answers

    def ask(self, messages: list[dict[str, str]], decoding: Decoding) -> Answer:
        """One request; what goes wrong is in `failed`, in a short sentence without secrets."""
        import httpx
        import openai

        try:
            reply = self._reply(
                model=self.model,
                messages=messages,
                max_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                seed=decoding.seed,
            )
            choice = reply["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                return Answer("", 0, False, "the reply holds no text")
            tokens = (reply.get("usage") or {}).get("completion_tokens")
            return Answer(text[:ANSWER_CHARS].strip(), int(tokens or 0), choice.get("finish_reason") == "stop")
        except (openai.APITimeoutError, httpx.TimeoutException):
            return Answer("", 0, False, f"no whole reply within {self.timeout_s:g} s")
        except (
            openai.OpenAIError,
            httpx.HTTPError,
            ValueError,
            TypeError,
            AttributeError,
            IndexError,
            KeyError,
        ) as error:
            return Answer("", 0, False, _short(error))

    def _reply(self, **asked: Any) -> Any:
        """The reply as plain JSON, read piece by piece: a server that sends a byte now and then, or never stops, meets a limit too."""
        import openai

        deadline, body = time.monotonic() + self.timeout_s, bytearray()
        with self.client.chat.completions.with_streaming_response.create(**asked) as reply:
            for piece in reply.iter_bytes():
                body += piece
                if time.monotonic() > deadline:
                    raise openai.APITimeoutError(reply.http_request)
                if len(body) > REPLY_BYTES:
                    raise ValueError(f"the reply is longer than {REPLY_BYTES:,} bytes")
        return json.loads(body)

    def tokens(self, text: str, end: bool = False) -> Any:
        raise TunebookError(
            f"The endpoint {self.url} gives no probabilities of a given text; loss and preference need the weights or a GGUF."
        )

    logprobs = tokens


def _short(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    text = " ".join(str(error).split())[:160]
    return f"HTTP {status}: {text}" if status else f"{type(error).__name__}: {text}"
