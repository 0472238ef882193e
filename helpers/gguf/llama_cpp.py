"""The real llama.cpp, as users run it: token ids, logits and batched answers of a GGUF file, through its C library.

A crash in it ends the process that calls it; `helpers.gguf.runner.GgufModel` gives the same in a process of its own.
"""

from __future__ import annotations

import ctypes as c
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import worker
from helpers.errors import TunebookError
from helpers.gguf import header, libraries
from helpers.gguf.libraries import Block
from helpers.gguf.runner import Server
from helpers.model.packed_attention import common_length

if TYPE_CHECKING:
    import numpy as np

BATCH = 512  # tokens a decode call takes
CHUNK = 128  # of them when the logits of all are wanted
Entry = tuple[int, int, int, bool]  # token, position, sequence, logits wanted
LAYOUT = (-1, 0, 0, 1, 0, 0)  # load_mode; vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc
OTHER_LAYOUT = "The installed xllamacpp has another layout of its parameters than the pinned one."
POINTER, INTS = c.c_void_p, c.POINTER(c.c_int32)


class Batch(c.Structure):
    """`llama_batch`: tokens with their positions, sequences and whether logits are wanted."""

    _fields_ = [
        *(("n_tokens", c.c_int32), ("token", INTS), ("embd", POINTER), ("pos", INTS), ("n_seq_id", INTS)),
        *(("seq_id", c.POINTER(INTS)), ("logits", c.POINTER(c.c_int8))),
    ]


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "llama_model_default_params": (Block,),
    "llama_context_default_params": (Block,),
    "llama_model_load_from_file": (POINTER, c.c_char_p, Block),
    "llama_init_from_model": (POINTER, POINTER, Block),
    "llama_model_free": (None, POINTER),
    "llama_free": (None, POINTER),
    "llama_set_n_threads": (None, POINTER, c.c_int32, c.c_int32),
    "llama_model_get_vocab": (POINTER, POINTER),
    "llama_vocab_n_tokens": (c.c_int32, POINTER),
    "llama_vocab_is_eog": (c.c_bool, POINTER, c.c_int32),
    "llama_tokenize": (c.c_int32, POINTER, c.c_char_p, c.c_int32, INTS, c.c_int32, c.c_bool, c.c_bool),
    "llama_detokenize": (c.c_int32, POINTER, INTS, c.c_int32, c.c_char_p, c.c_int32, c.c_bool, c.c_bool),
    "llama_batch_init": (Batch, c.c_int32, c.c_int32, c.c_int32),
    "llama_batch_free": (None, Batch),
    "llama_decode": (c.c_int32, POINTER, Batch),
    "llama_get_logits_ith": (c.POINTER(c.c_float), POINTER, c.c_int32),
    "llama_get_memory": (POINTER, POINTER),
    "llama_memory_clear": (None, POINTER, c.c_bool),
    "llama_memory_seq_rm": (c.c_bool, POINTER, c.c_int32, c.c_int32, c.c_int32),
    "llama_memory_seq_cp": (None, POINTER, c.c_int32, c.c_int32, c.c_int32, c.c_int32),
}


@lru_cache(maxsize=1)
def library() -> Any:
    """libllama, loaded once a process."""
    return libraries.load(libraries.for_running(), SIGNATURES)


class LlamaCpp(ExitStack):
    """A GGUF file loaded by llama.cpp; `close` frees it. parallel: answers generated at once; threads: 0 for all cores;
    only_vocabulary: without the weights, which the file need not hold; of those that it announces, names and shapes are
    checked and the graph is built. Raises TunebookError for a file that is missing, damaged or not understood."""

    def __init__(self, path: str | Path, parallel: int = 8, only_vocabulary: bool = False, threads: int = 0):
        super().__init__()
        self.path, self.parallel, self.context = Path(path), parallel, 0
        self.threads = threads or libraries.threads()
        header.check(self.path)
        self.lib = library()
        params = self.lib.llama_model_default_params()
        planned = only_vocabulary and bool(header.check(self.path).tensors)
        if only_vocabulary:
            # the flags come last, after pointers that are null by default: the first non-zero word there is theirs,
            # vocab_only its first byte, no_alloc its fifth; how the file is read stands before the pointers
            words = struct.unpack_from("<16Q", bytes(params.bytes))
            flags = 8 * next(i for i, word in enumerate(words) if i >= 6 and word)
            if (struct.unpack_from("<i", bytes(params.bytes), 24)[0], *params.bytes[flags : flags + 5]) != LAYOUT:
                raise TunebookError(OTHER_LAYOUT)
            struct.pack_into("<i", params.bytes, 24, 0)  # not mapped into memory
            params.bytes[flags + 4 * planned] = 1
        libraries.heard.clear()
        self._model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        no = "it cannot load the file; export it again, or use a newer llama.cpp"
        unfit = "it has no place for a model of this form; choose another base, or set outputs='adapter,merged'"
        self._require(self._model, unfit if planned else no)
        self.callback(self.lib.llama_model_free, self._model)
        self.vocab = self.lib.llama_model_get_vocab(self._model)
        self.n_vocab = self.lib.llama_vocab_n_tokens(self.vocab)
        self._ctx: Any = None
        self._server: Server | None = None
        self._batch = self.lib.llama_batch_init(BATCH, 0, 1)
        self.callback(self.lib.llama_batch_free, self._batch)
        self.callback(self._free_context)
        if planned:
            self.context = 256
            self._ctx = self.lib.llama_init_from_model(self._model, self._context_params())
            self._require(self._ctx, unfit)

    def __call__(self, request: list[Any], event: worker.Event) -> Any:
        """As a handler of helpers.worker: a request is the name of a method and its arguments."""
        method, *arguments = request
        if method != "generate":
            return getattr(self, method)(*arguments)
        for finished in self.generate(*arguments):
            event(finished)
        return None

    def _require(self, good: Any, what: str) -> None:
        if not good:
            said = " / ".join(libraries.heard) or "no message"
            raise TunebookError(f"llama.cpp with {self.path.name}: {what}. It said: {said}.")

    # ------------------------------------------------------------ text

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

    def ends(self) -> list[int]:
        """All tokens at which llama.cpp stops by itself."""
        return [i for i in range(self.n_vocab) if self.lib.llama_vocab_is_eog(self.vocab, i)]

    def apply_template(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """The prompt that llama.cpp's server renders from the template in the file with its own Jinja engine."""
        if self._server is None:
            self._server = self.enter_context(Server(self.path, context=256))
        body: dict[str, Any] = {"messages": messages, "add_generation_prompt": True}
        return self._server.post("/apply-template", body | ({"tools": tools} if tools else {}))["prompt"]

    # ------------------------------------------------------------ logits

    def _room(self, tokens: int) -> None:
        """An empty context of `tokens` at least, which all sequences share."""
        if self._ctx is None or tokens > self.context:
            self._free_context()
            self.context = max(-(-tokens // 256), 1) * 256
            self._ctx = self.lib.llama_init_from_model(self._model, self._context_params())
            self._require(self._ctx, f"no memory for a context of {self.context} tokens")
            self.lib.llama_set_n_threads(self._ctx, self.threads, self.threads)
            self._memory = self.lib.llama_get_memory(self._ctx)
        self.lib.llama_memory_clear(self._memory, True)

    def _context_params(self) -> Block:
        """Defaults with a few fields set, which are found by their documented defaults."""
        block = self.lib.llama_context_default_params()
        head = struct.unpack_from("<4I", bytes(block.bytes))  # n_ctx, n_batch, n_ubatch, n_seq_max
        # embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified and their defaults, on a multiple of 8
        at = next((i for i in range(64, 256, 8) if bytes(block.bytes[i : i + 6]) == b"\0\1\1\1\1\0"), None)
        if head != (512, 2048, 512, 1) or at is None:
            raise TunebookError(OTHER_LAYOUT)
        struct.pack_into("<4I", block.bytes, 0, self.context, BATCH, BATCH, self.parallel + 1)  # one for the prefix
        block.bytes[at + 5] = 1
        return block

    def _free_context(self) -> None:
        if self._ctx:
            self.lib.llama_free(self._ctx)
        self._ctx = None

    def _decode(self, entries: Sequence[Entry]) -> None:
        """Run tokens through the model."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self.lib.llama_decode(self._ctx, batch)
        self._require(not status, f"it stopped with status {status}" + " (its context is full)" * (status == 1))

    def _logits(self, index: int, count: int = 1) -> np.ndarray:
        """Logits of `count` neighbours in the batch, which llama.cpp keeps in one piece: (count, vocab)."""
        import numpy as np

        pointer = self.lib.llama_get_logits_ith(self._ctx, index)
        self._require(pointer, "no logits came")
        return np.ctypeslib.as_array(pointer, (count, self.n_vocab)).copy()

    def iter_logits(self, token_ids: Sequence[int], first: int = 0) -> Iterator[np.ndarray]:
        """Logits after each token from place `first` on, float32 (tokens, vocab), in pieces."""
        self._room(len(token_ids))
        for start in range(0, len(token_ids), CHUNK):
            piece = token_ids[start : start + CHUNK]
            self._decode([(token, start + i, 0, start + i >= first) for i, token in enumerate(piece)])
            if (before := max(first - start, 0)) < len(piece):
                yield self._logits(before, len(piece) - before)

    def score(self, prompt: list[int], completion: list[int]) -> tuple[list[float], bool]:
        """The natural log-probability of every completion token, and whether each was the most likely one."""
        import numpy as np
        from scipy.special import log_softmax

        ids, first, greedy = prompt + completion, max(len(prompt) - 1, 0), True
        values: list[float] = []
        for logits in self.iter_logits(ids[:-1], first):
            target = ids[first + 1 + len(values) :][: len(logits)]
            nats = log_softmax(logits.astype(np.float64), axis=1)
            greedy &= nats.argmax(1).tolist() == target
            values += nats[np.arange(len(target)), target].tolist()
        return values, greedy

    def compare(self, rows: list[list[int]], kept: str) -> list[tuple[float, float, float]]:
        """Of every token after the first in `rows`: the divergence of its prediction from the reference's in nats, by
        how much the reference likes its own first choice better than the one here, and its log-probability here.

        kept: a .npy file with the reference's log-probabilities, float32 (tokens, vocabulary).
        """
        import numpy as np
        from scipy.special import log_softmax

        reference = np.load(kept, mmap_mode="r")
        found: list[tuple[float, float, float]] = []
        for row in rows:
            following = iter(row[1:])
            for logits in self.iter_logits(row[:-1]):
                # a padded vocabulary may differ in rows that no text reaches
                width, each = min(reference.shape[1], logits.shape[1]), np.arange(len(logits))
                theirs = np.asarray(reference[len(found) : len(found) + len(logits), :width])
                mine, target = log_softmax(logits[:, :width], axis=1), list(islice(following, len(logits)))
                divergence = np.einsum("tv,tv->t", np.exp(theirs), theirs - mine)
                lost = theirs.max(1) - theirs[each, mine.argmax(1)]
                found += zip(divergence.tolist(), lost.tolist(), mine[each, target].tolist(), strict=True)
        return found

    # ------------------------------------------------------------ answers

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 17,
        stop: Sequence[str] = (),
    ) -> Iterator[tuple[int, str, int, bool]]:
        """(index, text, tokens generated, whether it ended by itself) of prompts (token ids) as they are finished,
        `parallel` at a time, to their end, a stop text or `max_tokens`.

        The tokens that all prompts begin with are computed once and shared, so that a long common system prompt costs
        next to nothing. temperature 0: greedy; above, a draw depends on the seed and the prompt, not on its
        neighbours.
        """
        import numpy as np

        rows = [list(p) for p in prompts]
        if not rows:
            return
        draws = [np.random.default_rng([seed, zlib.crc32(repr(row).encode())]) for row in rows]
        shared = min(common_length(rows), min(map(len, rows)) - 1) if len(rows) > 1 else 0  # short of the shortest
        free = list(range(min(self.parallel, len(rows))))
        self._room(shared + len(free) * (max(map(len, rows)) + max_tokens - shared))
        # what all prompts begin with, in the spare sequence
        self._run([(token, i, self.parallel, False) for i, token in enumerate(rows[0][:shared])])
        active: dict[int, tuple[int, list[int]]] = {}  # sequence -> index of its prompt, answer so far
        entries: list[Entry] = []  # what is to be computed next, the answers under way first
        queue = iter(range(len(rows)))
        while True:
            while free and (index := next(queue, None)) is not None:
                active[slot := free.pop()] = (index, [])
                self.lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
                self.lib.llama_memory_seq_cp(self._memory, self.parallel, slot, -1, -1)
                last = len(rows[index]) - 1
                entries += [(rows[index][i], i, slot, i == last) for i in range(shared, last + 1)]
            if not active:
                return
            piece, entries = entries[:BATCH], entries[BATCH:]
            going: list[Entry] = []
            for slot, logits in self._run(piece):
                index, out = active[slot]
                out.append(_choose(logits, temperature, draws[index]))
                ended = self.lib.llama_vocab_is_eog(self.vocab, out[-1])
                full = ended or len(out) >= max_tokens
                text = self.detokenize(out[: len(out) - ended]) if full or stop else ""
                cut = min((text.index(s) for s in stop if s in text), default=None)
                if full or cut is not None:
                    yield index, text[:cut], len(out), ended or cut is not None
                    del active[slot]
                    free.append(slot)
                    self.lib.llama_memory_seq_rm(self._memory, slot, -1, -1)  # attention reads what is kept
                else:
                    going.append((out[-1], len(rows[index]) + len(out) - 1, slot, True))
            entries = going + entries

    def _run(self, entries: Sequence[Entry]) -> list[tuple[int, np.ndarray]]:
        """(sequence, logits) of the tokens whose logits are wanted."""
        found = []
        for start in range(0, len(entries), BATCH):
            piece = entries[start : start + BATCH]
            self._decode(piece)
            found += [(sequence, self._logits(i)[0]) for i, (_, _, sequence, wanted) in enumerate(piece) if wanted]
        return found


def _choose(logits: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    """A token, the most likely one at temperature 0."""
    import numpy as np

    if temperature <= 0:
        return int(logits.argmax())
    scaled = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return int(random.choice(len(logits), p=scaled / scaled.sum()))
