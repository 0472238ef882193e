"""The real llama.cpp, as users run it: token ids, logits and batched answers of a GGUF file, through its C library.

A crash in it ends the process that calls it; `helpers.gguf.runner` gives the same in a process of its own.
"""

from __future__ import annotations

import ctypes as c
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from helpers.errors import TunebookError
from helpers.gguf import header, libraries
from helpers.gguf.server import Server

if TYPE_CHECKING:
    import numpy as np

BATCH = 512  # tokens a decode call takes


@dataclass
class Completion:
    """One generated continuation. token_ids leaves out the token that ended it; finish: "stop" or "length"."""

    text: str
    token_ids: list[int]
    finish: str


@dataclass
class _Row:
    """A prompt that is being answered in one sequence of the batch."""

    index: int
    waiting: list[int]
    position: int
    out: list[int] = field(default_factory=list)


class Vocabulary:
    """The tokenizer of a GGUF file, as llama.cpp runs it; the weights, if there are any, are not read.

    Raises TunebookError for a file that is missing, damaged or not understood. A context manager; `close` frees it.
    """

    _only_vocabulary = True

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header.check(self.path)
        self.lib = lib = libraries.library(libraries.for_running())
        lib.log.clear()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.model_params(self._only_vocabulary))
        if not self._model:
            raise TunebookError(
                f"llama.cpp cannot load {path}: {lib.said()}. Export it again, or use a newer llama.cpp."
            )
        self.vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab = lib.llama_vocab_n_tokens(self.vocab)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model. A second call does nothing."""
        if self._model:
            self.lib.llama_model_free(self._model)
            self._model = None

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`. add_special: with the model's own BOS; parse_special: "<|im_end|>" is one token."""
        data = text.encode()
        size = len(data) + 8  # more than one token a byte there cannot be
        ids = (c.c_int32 * size)()
        found = self.lib.llama_tokenize(self.vocab, data, len(data), ids, size, add_special, parse_special)
        return list(ids[: max(found, 0)])

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        array, found = (c.c_int32 * max(len(ids), 1))(*ids), -(64 + 32 * len(ids))
        while found < 0:  # that many bytes are needed
            buffer = c.create_string_buffer(-found)
            found = self.lib.llama_detokenize(self.vocab, array, len(ids), buffer, len(buffer), False, False)
        return buffer.raw[:found].decode("utf-8", "replace")

    def is_end(self, token_id: int) -> bool:
        """Whether llama.cpp stops at this token by itself."""
        return self.lib.llama_vocab_is_eog(self.vocab, token_id)

    def end_ids(self) -> list[int]:
        """All tokens at which llama.cpp stops by itself."""
        return [i for i in range(self.n_vocab) if self.is_end(i)]


class LlamaCpp(Vocabulary):
    """A GGUF file loaded by llama.cpp; a context manager.

    context: most tokens that all sequences may share, 0 for as many as are needed; parallel: answers generated at once;
    adapter: a GGUF adapter applied to it. Raises TunebookError for a file that is missing, damaged or not understood.
    """

    _only_vocabulary = False

    def __init__(self, path: str | Path, context: int = 0, parallel: int = 8, adapter: Path | None = None):
        super().__init__(path)
        self._limit, self.parallel, self.context = context, parallel, 0
        self._ctx: Any = None
        self._server: Server | None = None
        self._batch = _Arrays(BATCH)
        self._adapter = None
        if adapter:
            header.check(adapter)
            self._adapter = self.lib.llama_adapter_lora_init(self._model, str(adapter).encode())
            self._require(self._adapter, f"the adapter {adapter} does not fit; name the base it was trained on")

    def _require(self, good: Any, what: str) -> None:
        if not good:
            raise TunebookError(f"llama.cpp with {self.path.name}: {what}. It said: {self.lib.said()}.")

    def _room(self, tokens: int) -> None:
        """A context of `tokens` at least; what was in a smaller one is gone."""
        if tokens <= self.context:
            return
        if self._limit and tokens > self._limit:
            raise TunebookError(
                f"{tokens} tokens with what is to be answered does not fit the context of {self._limit}; ask for more."
            )
        if self._ctx:
            self.lib.llama_free(self._ctx)
        lib, self.context = self.lib, self._limit or -(-tokens // 256) * 256
        params = lib.context_params(self.context, BATCH, self.parallel + 1)  # one more: the shared prefix
        self._ctx = lib.llama_init_from_model(self._model, params)
        self._require(self._ctx, f"no memory for a context of {self.context} tokens; ask for a shorter one")
        taken = lib.llama_n_ctx_seq(self._ctx) == lib.llama_n_ctx(self._ctx)
        taken &= lib.llama_n_seq_max(self._ctx) == self.parallel + 1
        self._require(taken, f"{lib.path} did not take the context parameters; use the library that set-up fetches")
        lib.llama_set_n_threads(self._ctx, libraries.threads(), libraries.threads())
        if self._adapter:
            lora = (c.c_void_p * 1)(self._adapter)
            status = lib.llama_set_adapters_lora(self._ctx, lora, 1, (c.c_float * 1)(1.0))
            self._require(not status, "the adapter does not fit; name the base it was trained on")
        self._memory = lib.llama_get_memory(self._ctx)

    def close(self) -> None:
        """Free everything. A second call does nothing."""
        if self._server is not None:
            self._server.stop()
            self._server = None
        if self._ctx:
            self.lib.llama_free(self._ctx)
            self._ctx = None
        super().close()

    @property
    def chat_template(self) -> str:
        """The Jinja template inside the file; "" when it has none."""
        found = self.lib.llama_model_chat_template(self._model, None)
        return found.decode() if found else ""

    def apply_template(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """The prompt that llama.cpp's server renders from the template in the file with its own Jinja engine."""
        if self._server is None:
            self._server = Server(self.path, context=256, warmup=False)
        body: dict[str, Any] = {"messages": messages, "add_generation_prompt": True}
        return self._server.post("/apply-template", body | ({"tools": tools} if tools else {}))["prompt"]

    # ------------------------------------------------------------ logits

    def iter_logits(self, token_ids: Sequence[int], chunk: int = 128) -> Iterator[np.ndarray]:
        """Logits after each token, float32 (tokens, vocab), in pieces of up to `chunk` rows (at most BATCH)."""
        self._room(len(token_ids))
        self.lib.llama_memory_clear(self._memory, True)
        for start in range(0, len(token_ids), chunk):
            piece = token_ids[start : start + chunk]
            self._decode([(token, start + i, 0, True) for i, token in enumerate(piece)])
            yield self._rows(0, len(piece))

    def score(self, prompt: list[int], completion: list[int]) -> tuple[list[float], bool]:
        """The natural log-probability of every completion token, and whether each was the most likely one."""
        import numpy as np

        ids, first, at, greedy = prompt + completion, max(len(prompt) - 1, 0), 0, True
        values: list[float] = []
        for logits in self.iter_logits(ids[:-1]):
            rows: np.ndarray = logits[max(first - at, 0) :].astype(np.float64)
            target = np.array(ids[max(first, at) + 1 : at + len(logits) + 1], dtype=np.int64)
            if len(target):
                top = rows.max(-1)
                chosen = rows[np.arange(len(target)), target]
                values += (chosen - top - np.log(np.exp(rows - top[:, None]).sum(-1))).tolist()
                greedy &= bool((rows.argmax(-1) == target).all())
            at += len(logits)
        return values, greedy

    def _rows(self, index: int, count: int = 1) -> np.ndarray:
        """Logits of `count` neighbours in the batch, which llama.cpp keeps in one piece: (count, vocab)."""
        import numpy as np

        pointer = self.lib.llama_get_logits_ith(self._ctx, index)
        self._require(pointer, "no logits came")
        return np.ctypeslib.as_array(pointer, (count, self.n_vocab)).copy()

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Run (token, position, sequence, logits wanted) through the model."""
        status = self.lib.llama_decode(self._ctx, self._batch.fill(entries))
        self._require(not status, f"it stopped with status {status}" + " (its context is full)" * (status == 1))

    # ------------------------------------------------------------ answers

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 17,
        done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Completions of prompts (token ids), `parallel` at a time, to their end, a stop text or `max_tokens`.

        The tokens that all prompts begin with are computed once and shared, so that a long common system prompt costs
        next to nothing. temperature 0: greedy; above, a draw depends on the seed and the prompt, not on its
        neighbours. done(index, completion) is called as each is finished.
        """
        import numpy as np

        rows = [list(p) for p in prompts]
        draws = [np.random.default_rng([seed, zlib.crc32(repr(row).encode())]) for row in rows]
        answers: dict[int, Completion] = {}
        shared = _common_length(rows)
        longest, most = max(map(len, rows), default=0) + max_tokens, min(self.parallel, len(rows))
        wanted = shared + most * (longest - shared)
        self._room(max(longest, min(wanted, self._limit or wanted)))
        self.lib.llama_memory_clear(self._memory, True)
        for start in range(0, shared, BATCH):  # what all prompts begin with, in the spare sequence
            piece = rows[0][start : min(start + BATCH, shared)]
            self._decode([(token, start + i, self.parallel, False) for i, token in enumerate(piece)])
        free = list(range(max(1, min(most, (self.context - shared) // (longest - shared)))))
        active: dict[int, _Row] = {}
        queue = iter(range(len(rows)))
        while True:
            while free and (index := next(queue, None)) is not None:
                slot = free.pop()
                self.lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
                self.lib.llama_memory_seq_cp(self._memory, self.parallel, slot, -1, -1)
                active[slot] = _Row(index, rows[index][shared:], shared)
            if not active:
                return [answers[i] for i in range(len(rows))]
            for slot, logits in self._step(active):
                current = active[slot]
                current.waiting = [_choose(logits, temperature, draws[current.index])]
                if completion := self._ended(current, max_tokens, stop):
                    answers[current.index] = completion
                    if done:
                        done(current.index, completion)
                    del active[slot]
                    free.append(slot)
                    self.lib.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def _step(self, active: dict[int, _Row]) -> list[tuple[int, np.ndarray]]:
        """One batch over all active rows, generating rows first; logits of those that are through their prompt."""
        entries: list[tuple[int, int, int, bool]] = []
        ready: list[tuple[int, int]] = []
        for slot, row in sorted(active.items(), key=lambda item: len(item[1].waiting)):
            taken = row.waiting[: BATCH - len(entries)]
            row.waiting = row.waiting[len(taken) :]
            last = not row.waiting and bool(taken)
            entries += [(token, row.position + i, slot, last and i == len(taken) - 1) for i, token in enumerate(taken)]
            row.position += len(taken)
            if last:
                ready.append((slot, len(entries) - 1))
        self._decode(entries)
        return [(slot, self._rows(at)[0]) for slot, at in ready]

    def _ended(self, row: _Row, max_tokens: int, stop: Sequence[str]) -> Completion | None:
        token = row.waiting[0]
        if self.is_end(token):
            return Completion(self.detokenize(row.out), row.out, "stop")
        row.out.append(token)
        if stop:
            text = self.detokenize(row.out)
            cut = min((at for s in stop if (at := text.find(s)) >= 0), default=-1)
            if cut >= 0:
                return Completion(text[:cut], row.out, "stop")
        if len(row.out) >= max_tokens:
            return Completion(self.detokenize(row.out), row.out, "length")
        return None


def _common_length(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with, always short of the shortest; 0 for a row alone."""
    if len(rows) < 2:
        return 0
    same = [a == b for a, b in zip(min(rows), max(rows), strict=False)]  # what these two share, all do
    return min([*(i for i, equal in enumerate(same) if not equal), *(len(r) - 1 for r in rows)])


def _choose(logits: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    import numpy as np

    if temperature <= 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / temperature
    probabilities = np.exp(scaled, dtype=np.float64)
    return int(random.choice(len(logits), p=probabilities / probabilities.sum()))


class _Arrays:
    """The arrays behind a `llama_batch`, made once and filled again for each call."""

    def __init__(self, size: int):
        self.token, self.pos, self.count = (c.c_int32 * size)(), (c.c_int32 * size)(), (c.c_int32 * size)(*[1] * size)
        self.seq = [(c.c_int32 * 1)() for _ in range(size)]
        self.seq_pointers = (c.POINTER(c.c_int32) * size)(*[c.cast(s, c.POINTER(c.c_int32)) for s in self.seq])
        self.wanted = (c.c_int8 * size)()

    def fill(self, entries: list[tuple[int, int, int, bool]]) -> libraries.Batch:
        for i, (token, position, sequence, wanted) in enumerate(entries):
            self.token[i], self.pos[i], self.seq[i][0], self.wanted[i] = token, position, sequence, wanted
        return libraries.Batch(len(entries), self.token, None, self.pos, self.count, self.seq_pointers, self.wanted)
