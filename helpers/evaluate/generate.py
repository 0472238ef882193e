"""Answers of a Hugging Face model to many prompts: sorted batches, shared prefixes read once, finished rows let go.

`HfModel`, `helpers.gguf.runner.GgufModel` and `helpers.evaluate.candidates.RemoteModel` have the same three methods:
`encode(messages)`, `generate(prompts, …)`, `logprobs(pairs)` (not the last one).
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from helpers import machine
from helpers.errors import TunebookError
from helpers.evaluate import prefix_cache
from helpers.model.loading import fast_bf16
from helpers.model.packed_attention import common_length, head_dim
from helpers.model.stop_tokens import end_of_turn, stop_tokens
from helpers.tasks.questions import Answer, Decoding

ROWS = 256  # answers at once at most; finished rows leave, and the fewer the batches, the fewer steps with few rows
CACHE_BYTES = 1 << 30  # keys and values of one batch on a CPU; a quarter of the free memory on a GPU
SCORE_BYTES = 256 << 20  # attention scores of one layer while a batch of prompts is read
MIN_SHARED = 16  # tokens; below this a prefix is not worth a batch of its own
BATCH_TOKENS = 16384  # padded tokens of a batch that transformers' own generate works on
SCORED_TOKENS = 2048  # padded tokens of a batch whose probabilities are read
SAME_KL = 0.02  # of fast and plain logits; rounding in bf16 stays below 0.005
PACKED_ROWS = 64  # what the layout of packed weights is chosen for; 4 to 1,024 rows run as fast in it
PACKED_SHARE = 0.25  # of the free memory that the second copy of the weights may take
Ids = Sequence[int]


class HfModel:
    """A transformers causal model with its tokenizer.

    Fast decoding is used where `prefix_cache.supports` the architecture and the first prompt's logits agree with the
    plain forward pass; else transformers' own `generate`. `self.path_note` says which and why.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model.eval(), tokenizer
        configured = getattr(model.generation_config, "eos_token_id", None)
        self.stops = set(stop_tokens(tokenizer, configured))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.stops)
        self.fast = prefix_cache.supports(model)
        plain = f"transformers.generate ({model.config.model_type} attention is not plain)"
        self.path_note = "shared-prefix decoding" if self.fast else plain
        self._packed: PackedWeights | None = None

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the conversation, rendered by the tokenizer's own template with the generation prompt."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.tokens(text)

    def tokens(self, text: str, end: bool = False) -> list[int]:
        """Token ids of plain text, nothing added; with the end of turn after it when `end`."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, end_of_turn(self.tokenizer)] if end else ids

    def close(self) -> None:
        self.model = self._packed = None

    def generate(
        self, prompts: Sequence[Ids], decoding: Decoding, done: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """An answer a prompt, in the prompts' order; `done(index, answer)` is called as soon as one is finished."""
        self._check_room(prompts, decoding)
        answers: dict[int, Answer] = {}

        def finish(index: int, ids: list[int], stopped: bool) -> None:
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers[index] = Answer(text, len(ids) + stopped, stopped)
            if done:
                done(index, answers[index])

        with self._running(), self._trusted(prompts[0] if prompts else ()) as fast:
            (self._generate_fast if fast else self._generate_plain)(prompts, decoding, finish)
        return [answers[i] for i in range(len(prompts))]

    def logprobs(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[list[float]]:
        """For each (prompt ids, completion ids) the natural log-probability of every completion token, in order."""
        found: list[list[float]] = [[] for _ in pairs]
        with self._running(), self._trusted([*pairs[0][0], *pairs[0][1]] if pairs else ()) as fast:
            for shared, members in groups([p for p, _ in pairs]) if fast else [(0, list(range(len(pairs))))]:
                self._score(pairs, shared, members, found)
        return found

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Without gradients; what torch raises when it cannot run the model (no memory) as a TunebookError."""
        import torch

        try:
            with torch.inference_mode():
                yield
        except RuntimeError as error:
            where = self.model.config._name_or_path or self.model.config.model_type
            raise TunebookError(
                f"The model {where} could not be run ({str(error).strip().splitlines()[0][:300]})."
            ) from error

    def _score(
        self, pairs: Sequence[tuple[Ids, Ids]], shared: int, members: list[int], found: list[list[float]]
    ) -> None:
        """Fill in `found` for `members`, whose prompts share `shared` tokens; each keeps one more, which predicts."""
        import torch

        tails = {i: [*pairs[i][0][shared:], *pairs[i][1]] for i in members}
        order = sorted(members, key=lambda i: -len(tails[i]))
        with prefix_cache.decoding(self.model) if shared else contextlib.nullcontext() as state:
            if shared:
                self._read_prefix(pairs[members[0]][0][:shared])
            for batch in _chunks(order, [len(tails.get(i, ())) for i in range(len(pairs))], SCORED_TOKENS):
                ids, mask = self._pad([tails[i] for i in batch])
                rows, width = ids.shape
                start = max(min(len(pairs[i][0]) for i in batch) - shared - 1, 0)
                keep = torch.arange(start, width, device=ids.device)
                if state is not None:
                    state.begin(mask, 0)
                    mask = None
                positions = (shared + torch.arange(width, device=ids.device)).expand(rows, -1)
                logits = self.model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
                ).logits
                for row, i in enumerate(batch):
                    first, size = len(pairs[i][0]) - shared, len(pairs[i][1])
                    here = logits[row, first - 1 - start : first - 1 - start + size].float().log_softmax(-1)
                    found[i] = here.gather(-1, ids[row, first : first + size, None])[:, 0].tolist()

    # ------------------------------------------------------------ the fast path

    def _generate_fast(self, prompts: Sequence[Ids], decoding: Decoding, finish: Callable) -> None:
        for shared, members in groups(prompts):
            with prefix_cache.decoding(self.model) as state:
                if shared:
                    self._read_prefix(prompts[members[0]][:shared])
                members = sorted(members, key=lambda i: -len(prompts[i]))
                most = self._rows(len(prompts[members[0]]) - shared, shared, decoding.max_new_tokens)
                size = -(-len(members) // -(-len(members) // most))  # batches of about the same size
                for start in range(0, len(members), size):
                    self._decode(state, prompts, members[start : start + size], shared, decoding, finish)

    def _decode(
        self,
        state: prefix_cache.State,
        prompts: Sequence[Ids],
        batch: list[int],
        shared: int,
        decoding: Decoding,
        finish: Callable,
    ) -> None:
        """One batch: read what follows the shared prefix, then a token a row at a time until all have ended."""
        import torch

        limit, draws = decoding.max_new_tokens, Draws(decoding, [prompts[i] for i in batch])
        ids, mask = self._pad([prompts[i][shared:] for i in batch])
        rows, width = ids.shape
        state.begin(mask, limit)
        keep, where = torch.unique(mask.sum(1) - 1, return_inverse=True)
        positions = (shared + torch.arange(width, device=ids.device)).expand(rows, -1)
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
        logits = logits[torch.arange(rows, device=ids.device), where]
        state.used = width
        alive, position = list(range(rows)), shared + mask.sum(1)
        written: list[list[int]] = [[] for _ in range(rows)]
        for step in range(limit):
            tokens = draws.pick(logits, alive, step)
            stay = []
            for place, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
                stopped = token in self.stops
                if not stopped:
                    written[row].append(token)
                if stopped or step + 1 == limit:
                    finish(batch[row], written[row], stopped)
                else:
                    stay.append(place)
            if not stay:
                return
            if len(stay) < len(alive):
                order = state.keep(stay)
                index = torch.tensor(order, device=ids.device)
                tokens, position, alive = tokens[index], position[index], [alive[p] for p in order]
            made = self.model(input_ids=tokens[:, None], position_ids=position[:, None], use_cache=False)
            logits = made.logits[:, -1]
            state.used += 1
            position = position + 1

    def _read_prefix(self, ids: Ids) -> None:
        """Read what all prompts begin with; its keys and values stay in the open `prefix_cache.decoding`."""
        self.model(input_ids=self._pad([ids])[0], use_cache=False, logits_to_keep=1)

    def _rows(self, longest: int, shared: int, limit: int) -> int:
        """How many answers at once: as many as their keys, values and attention scores have room for."""
        import torch

        config, device = self.model.config.get_text_config(), self.model.device
        heads = config.num_attention_heads
        a_token = 2 * config.num_hidden_layers * (config.num_key_value_heads or heads) * head_dim(config)
        room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else CACHE_BYTES
        cached = room // (a_token * self.model.dtype.itemsize * (longest + limit))
        return max(1, min(ROWS, cached, SCORE_BYTES // (4 * heads * longest * (longest + shared))))

    @contextlib.contextmanager
    def _trusted(self, prompt: Ids) -> Iterator[bool]:
        """Whether the fast path may be used, its weights packed for as long as it is.

        Its logits for one prompt are compared with the plain forward pass, once; disagreement turns it off, aloud.
        """
        import torch

        if not self.fast or not prompt:
            yield False
            return
        if self._packed is None:
            self._packed = PackedWeights(self.model)
            ids, half = self._pad([prompt])[0], len(prompt) // 2
            plain = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            with self._packed, prefix_cache.decoding(self.model) as state:
                if half:
                    self._read_prefix(prompt[:half])
                state.begin(torch.ones_like(ids[:, half:]), 0)
                places = torch.arange(half, len(prompt), device=ids.device)[None]
                made = self.model(input_ids=ids[:, half:], position_ids=places, use_cache=False, logits_to_keep=1)
            fast, known = made.logits[0, -1].float().log_softmax(-1), plain.log_softmax(-1)
            kl = torch.nn.functional.kl_div(fast, known, log_target=True, reduction="sum").item()
            self.fast = kl < SAME_KL
        if self.fast:
            with self._packed:
                yield True
            return
        self._packed, self.path_note = None, f"transformers.generate (fast logits differ, KL {kl:.3g})"
        print(f"Decoding through {self.path_note}")
        yield False

    # ------------------------------------------------------------ the plain path

    def _generate_plain(self, prompts: Sequence[Ids], decoding: Decoding, finish: Callable) -> None:
        import torch

        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        options: dict[str, Any] = {"do_sample": False}
        if decoding.temperature > 0:
            options = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
        for batch in _chunks(order, [len(p) + decoding.max_new_tokens for p in prompts], BATCH_TOKENS):
            ids, mask = self._pad([prompts[i] for i in batch], "left")
            torch.manual_seed(decoding.seed)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=decoding.max_new_tokens,
                pad_token_id=self.pad,
                eos_token_id=sorted(self.stops),
                **options,
            )
            for row, i in enumerate(batch):
                new = out[row, ids.shape[1] :].tolist()
                end = next((n for n, token in enumerate(new) if token in self.stops), None)
                finish(i, new[:end], end is not None)

    # ------------------------------------------------------------ small parts

    def _check_room(self, prompts: Sequence[Ids], decoding: Decoding) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, prompts), default=0) + decoding.max_new_tokens
        if limit and longest > limit:
            raise TunebookError(
                f"The longest question with its answer takes {longest} tokens, the model reads {limit}; "
                "shorten the prompts or lower max_new_tokens."
            )
        if not all(map(len, prompts)):
            raise TunebookError("A prompt has no tokens; every question needs some text.")

    def _pad(self, rows: Sequence[Ids], side: str = "right") -> tuple[Any, Any]:
        """(ids, mask) of shape (rows, longest), 0 in the mask where a row is padded."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        padded = pad_sequence(ids, True, self.pad, side)
        mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)
        return padded.to(self.model.device), mask.to(self.model.device)


class Draws:
    """Chooses tokens: the most likely one, or a seeded draw that depends on the prompt and not on its batch."""

    def __init__(self, decoding: Decoding, prompts: Sequence[Ids]):
        import numpy as np

        self.temperature = decoding.temperature
        if decoding.temperature > 0:
            seeds = [[decoding.seed, zlib.crc32(repr(list(p)).encode())] for p in prompts]
            self.uniform = np.stack([np.random.default_rng(s).random(decoding.max_new_tokens) for s in seeds])

    def pick(self, logits: Any, rows: list[int], step: int) -> Any:
        """logits: (rows, vocab) → token ids (rows,)."""
        import torch

        if self.temperature == 0:
            return logits.argmax(-1)
        total = torch.softmax(logits.float() / self.temperature, -1).double().cumsum(-1)
        draw = torch.tensor(self.uniform[rows, step], device=logits.device)[:, None] * total[:, -1:]
        return torch.searchsorted(total, draw).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def groups(prompts: Sequence[Ids]) -> Iterator[tuple[int, list[int]]]:
    """(length of the shared prefix, indices) of prompts that begin alike; each keeps at least one token of its own.

    Sorted token by token, neighbours share the most; a cut goes where they share less than half of the shorter one.
    Groups of fewer than four are read together under whatever prefix they all have in common.
    """
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    runs: list[list[int]] = []
    for i in order:
        pair = [prompts[runs[-1][-1]], prompts[i]] if runs else []
        if pair and common_length(pair) * 2 >= min(map(len, pair)):
            runs[-1].append(i)
        else:
            runs.append([i])
    few = [i for run in runs if len(run) < 4 for i in run]
    for run in [run for run in runs if len(run) >= 4] + ([few] if few else []):
        ends = [prompts[run[0]], prompts[run[-1]]]
        shared = min(common_length(ends), min(len(prompts[i]) for i in run) - 1)
        yield (shared if shared >= MIN_SHARED and len(run) > 1 else 0), run


def _chunks(order: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive indices, the longest first, whose padded size stays within `budget` tokens; at least one each."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class PackedWeights:
    """`with PackedWeights(model):` runs linear layers on a CPU with their weights laid out once for the matrix kernels.

    PyTorch hands a weight to its matrix library as it lies in memory, and the library rearranges it in every call; with
    a few dozen rows that costs a third of the product. Here oneDNN does it once, as PyTorch's compiler for a frozen
    model: 31 instead of 22 GFLOPS on one AVX2 core (64 rows, 1536 x 576). Outside of the block nothing has changed.
    """

    def __init__(self, model: Any):
        import torch

        self.layers: list[tuple[Any, Any]] = []
        layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
        size = sum(m.weight.numel() * m.weight.itemsize for m in layers)
        right = [torch.float32, torch.bfloat16] if fast_bf16() else [torch.float32]
        fits = size <= PACKED_SHARE * 2**30 * machine.free_memory_gib()
        if model.device.type == "cpu" and model.dtype in right and fits and torch.backends.mkldnn.is_available():
            with torch.inference_mode():
                self.layers = [(m, torch.ops.mkldnn._reorder_linear_weight(m.weight, PACKED_ROWS)) for m in layers]

    def __enter__(self) -> None:
        for layer, weight in self.layers:
            layer.forward = functools.partial(_linear, weight, layer.bias)

    def __exit__(self, *_: Any) -> None:
        for layer, _weight in self.layers:
            del layer.forward


def _linear(weight: Any, bias: Any, x: Any) -> Any:
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
