"""One candidate at work: every question goes through the cache, and its weights are loaded only when something is not in it."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError
from helpers.evaluate import answer_store, candidates
from helpers.tasks.answers import Answer, Decoding

#: What loading or running a model raises when it cannot: a sentence of ours, damaged files, no memory, a missing library.
TROUBLE = (
    TunebookError,
    OSError,
    RuntimeError,
    ValueError,
    ImportError,
    MemoryError,
    KeyError,
    AttributeError,
    TypeError,
)
WINDOW = 1024  # tokens of a text that loss is measured over at most
KEPT_AT_ONCE = 64  # texts or completions after which the results are written down


class Session:
    """`with Session(candidate, cache_folder) as s: s.answers(...)`. seconds: spent on questions that were not in the cache."""

    def __init__(
        self,
        candidate: candidates.Candidate,
        folder: Path,
        precision: str = "auto",
        end_of_turn: str = "",
        quiet: bool = False,
    ):
        if candidate.trouble:
            raise TunebookError(candidate.trouble)
        self.candidate, self.precision, self.end_of_turn, self.quiet = candidate, precision, end_of_turn, quiet
        self.store = answer_store.Store(folder, candidate.content(precision))
        self._reader: Any = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._reader is not None and hasattr(self._reader, "close"):
            self._reader.close()
        self._reader = None
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def reader(self) -> Any:
        """The loaded model; loads it on first use."""
        if self._reader is None:
            self._reader = candidates.reader(self.candidate, self.precision, self.end_of_turn)
        return self._reader

    def answers(
        self, prompts: Sequence[list[dict[str, str]]], decoding: Decoding, label: str = ""
    ) -> tuple[list[Answer], dict[str, Any]]:
        """(answers in order, {"seconds", "items_per_s", "tokens", "from_cache"}); failed ones are not kept, so a rerun asks again.

        The speed is that of the questions answered now or, when all were in the cache, of the run that answered them.
        """
        keys = [answer_store.key("answer", prompt, decoding.key()) for prompt in prompts]
        found: list[Answer | None] = [Answer(*v) if (v := self.store.get(k)) is not None else None for k in keys]
        missing = [i for i, a in enumerate(found) if a is None]
        speed_key = answer_store.key("speed", sorted(keys))
        if missing:
            bar = self._bar(label or self.candidate.name, len(prompts), len(prompts) - len(missing))
            reader = self.reader
            started = time.perf_counter()

            def done(place: int, answer: Answer) -> None:
                if not answer.failed:
                    self.store.put(keys[missing[place]], [answer.text, answer.tokens, answer.stopped])
                bar.update()

            ids = [reader.encode(prompts[i]) for i in missing]
            for i, answer in zip(missing, reader.generate(ids, decoding, done), strict=True):
                found[i] = answer
            bar.close()
            seconds = time.perf_counter() - started
            self.store.put(
                speed_key, {"seconds": round(seconds, 3), "items_per_s": round(len(missing) / max(seconds, 1e-9), 3)}
            )
        speed = dict(self.store.get(speed_key) or {"seconds": 0.0, "items_per_s": 0.0})
        return found, {**speed, "tokens": sum(a.tokens for a in found), "from_cache": len(prompts) - len(missing)}

    def completion_logprobs(
        self, pairs: Sequence[tuple[list[dict[str, str]], str]], label: str = ""
    ) -> list[tuple[float, int]]:
        """(sum of log-probabilities in nats, tokens) of each completion after its conversation, its end of turn included."""
        keys = [answer_store.key("completion", messages, text) for messages, text in pairs]
        sizes = [len(text) for _, text in pairs]

        def work(batch: list[int]) -> list[tuple[float, int]]:
            rows = [(self.reader.encode(pairs[i][0]), self.reader.tokens(pairs[i][1], end=True)) for i in batch]
            return [(sum(v), len(v)) for v in self.reader.logprobs(rows)]

        return self._kept(keys, sizes, work, label or f"{self.candidate.name}, preference")

    def text_losses(self, texts: Sequence[str], label: str = "") -> list[tuple[float, int]]:
        """(summed cross-entropy in nats, tokens predicted) of each text's first WINDOW tokens. Every token is predicted from those
        before it; the first one is not counted."""
        keys = [answer_store.key("text", text, WINDOW) for text in texts]

        def work(batch: list[int]) -> list[tuple[float, int]]:
            rows = [self.reader.tokens(texts[i])[:WINDOW] for i in batch]
            return [(-sum(v), len(v)) for v in self.reader.logprobs([(ids[:1], ids[1:]) for ids in rows])]

        return self._kept(keys, [len(t) for t in texts], work, label or f"{self.candidate.name}, general text")

    def kept(self, name: Any, make: Any) -> Any:
        """A plain JSON value by name, made by `make(reader)` when it is not in the cache."""
        name = answer_store.key("kept", name)
        if self.store.get(name) is None:
            self.store.put(name, make(self.reader))
        return self.store.get(name)

    def _kept(self, keys: list[str], sizes: list[int], work: Any, label: str) -> list[Any]:
        """Values of all keys; those not known come from `work`, longest first, so that a batch holds texts of about the same size."""
        missing = sorted((i for i, k in enumerate(keys) if self.store.get(k) is None), key=lambda i: -sizes[i])
        bar = self._bar(label, len(keys), len(keys) - len(missing)) if missing else None
        for start in range(0, len(missing), KEPT_AT_ONCE):
            batch = missing[start : start + KEPT_AT_ONCE]
            for i, value in zip(batch, work(batch), strict=True):
                self.store.put(keys[i], list(value))
                bar.update()
        if bar is not None:
            bar.close()
        return [tuple(self.store.get(k)) for k in keys]

    def _bar(self, label: str, total: int, initial: int) -> Any:
        from tqdm import tqdm

        return tqdm(
            desc=label, total=total, initial=initial, mininterval=2, ncols=90, file=sys.stdout, disable=self.quiet
        )
