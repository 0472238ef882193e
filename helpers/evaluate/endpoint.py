"""Any OpenAI-compatible server as a contender or a judge: several requests at once, each with a time limit and few retries.

A server that stalls, errors or answers nonsense costs the item it failed on, never the run. Keys come from the environment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from helpers.errors import TunebookError
from helpers.evaluate.generate import Answer, Decoding

TIMEOUT_S = 60.0
RETRIES = 2
AT_ONCE = 8
GIVE_UP = 5          # failures in a row after which the server is taken for gone
ANSWER_CHARS = 65536  # an answer longer than this is nonsense and is cut


class Endpoint:
    """url: the base, such as http://127.0.0.1:8080/v1; model: its name there, "" for the first that /models lists."""

    path_note = "OpenAI-compatible endpoint"

    def __init__(self, url: str, model: str = "", key: str = "none", timeout_s: float = TIMEOUT_S, at_once: int = AT_ONCE):
        import openai
        self.url, self.at_once = url, at_once
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=RETRIES)
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        import openai
        try:
            listed = list(self.client.with_options(timeout=15, max_retries=0).models.list().data)
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            raise TunebookError(f"The endpoint {self.url} lists no models ({_short(error)}); start it, check the address, or name the "
                                "model as url#model.") from None
        if not listed:
            raise TunebookError(f"The endpoint {self.url} lists no models; name one as url#model.")
        return listed[0].id

    def close(self) -> None:
        self.client.close()

    def encode(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """The messages as they are: the server renders them."""
        return [dict(m) for m in messages]

    def generate(self, prompts: Sequence[list[dict[str, str]]], decoding: Decoding,
                 done: Callable[[int, Answer], None] | None = None) -> list[Answer]:
        """An answer a conversation; one that failed has `failed` set. Raises TunebookError when the first ones all fail."""
        answers: list[Answer | None] = [None] * len(prompts)
        failures = 0
        with ThreadPoolExecutor(self.at_once) as pool:
            jobs = {pool.submit(self.ask, prompt, decoding): i for i, prompt in enumerate(prompts)}
            for job in as_completed(jobs):
                i = jobs[job]
                if job.cancelled():
                    continue
                answers[i] = job.result()
                failures = failures + 1 if answers[i].failed else 0
                if failures >= GIVE_UP and all(a is None or a.failed for a in answers):
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise TunebookError(f"The endpoint {self.url} failed {failures} times in a row ({answers[i].failed}); "
                                        "check that it serves this model, then run the same command again.")
                if done:
                    done(i, answers[i])
        return answers

    def ask(self, messages: list[dict[str, str]], decoding: Decoding) -> Answer:
        """One request; what goes wrong is in `failed`, in a short sentence without secrets."""
        import openai
        try:
            reply = self.client.chat.completions.create(model=self.model, messages=messages, max_tokens=decoding.max_new_tokens,
                                                        temperature=decoding.temperature, seed=decoding.seed)
            choice = reply.choices[0]
            text = choice.message.content
            if not isinstance(text, str):
                return Answer("", 0, False, "the reply holds no text")
            tokens = reply.usage.completion_tokens if reply.usage else 0
            return Answer(text[:ANSWER_CHARS].strip(), int(tokens or 0), choice.finish_reason == "stop")
        except openai.APITimeoutError:
            return Answer("", 0, False, f"no reply within {self.client.timeout:g} s")
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            return Answer("", 0, False, _short(error))

    def tokens(self, text: str, end: bool = False) -> Any:
        raise TunebookError(f"The endpoint {self.url} gives no probabilities of a given text; loss and preference need the weights or a GGUF.")

    logprobs = tokens


def _short(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    text = " ".join(str(error).split())[:160]
    return f"HTTP {status}: {text}" if status else f"{type(error).__name__}: {text}"
