"""Answers of a Hugging Face model to many prompts: length-sorted batches, shared prefixes read once, finished rows let go.

`HfModel.generate` is what every comparison uses for HF weights; `helpers.gguf.runner` and `helpers.evaluate.remote_model` give
the same three methods for GGUF files and for servers: `encode(messages)`, `generate(prompts, …)`, `logprobs(pairs)`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from helpers.errors import TunebookError
from helpers.model.stop_tokens import end_of_turn, stop_tokens
from helpers.tasks.answers import Answer, Decoding

ROWS = 256  # answers at once at most; finished rows leave, and the fewer the batches, the fewer steps with few rows
CACHE_BYTES = 1 << 30  # keys and values of one batch on a CPU; a quarter of the free memory on a card
SCORE_BYTES = 256 << 20  # attention scores of one layer while a batch of prompts is read
MIN_SHARED = 16  # tokens; below this a prefix is not worth a batch of its own
SCORED_TOKENS = 2048  # padded tokens of a batch whose probabilities are read


class HfModel:
    """A transformers causal model with its tokenizer.

    Fast decoding is used where `shared_prefix.supports` the architecture and the first prompt's logits agree with the
    plain forward pass; else transformers' own `generate`. `self.path_note` says which and why.
    """

    def __init__(self, model: Any, tokenizer: Any):
        from helpers.evaluate import prefix_cache

        self.model, self.tokenizer = model.eval(), tokenizer
        configured = getattr(model, "generation_config", None)
        self.stops = set(stop_tokens(tokenizer, getattr(configured, "eos_token_id", None)))
        self.fast = prefix_cache.supports(model)
        self.path_note = (
            "shared-prefix decoding"
            if self.fast
            else f"transformers.generate ({model.config.model_type} attention is not plain)"
        )
        self._checked, self._packed = False, None

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the conversation, rendered by the tokenizer's own template with the generation prompt."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokens(self, text: str, end: bool = False) -> list[int]:
        """Token ids of plain text, nothing added; with the end of turn after it when `end`."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if end:
            ids = [*ids, end_of_turn(self.tokenizer)]
        return ids

    def close(self) -> None:
        self.model = self._packed = None

    def generate(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, done: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """An answer a prompt, in the prompts' order; `done(index, answer)` is called as soon as one is finished."""
        import torch

        self._room(prompts, decoding)
        answers: list[Answer | None] = [None] * len(prompts)

        def finish(index: int, ids: list[int], stopped: bool) -> None:
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers[index] = Answer(text, len(ids) + stopped, stopped)
            if done:
                done(index, answers[index])

        with torch.inference_mode():
            if prompts and self._trusted(prompts[0]):
                with self._packed:
                    self._generate_fast(prompts, decoding, finish)
            else:
                self._generate_plain(prompts, decoding, finish)
        return answers

    def logprobs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """For each (prompt ids, completion ids) the natural log-probability of every completion token, in order."""
        import torch

        found: list[list[float]] = [[] for _ in pairs]
        with torch.inference_mode():
            if pairs and self._trusted([*pairs[0][0], *pairs[0][1]]):
                with self._packed:
                    for shared, members in groups([p for p, _ in pairs]):
                        self._score(pairs, shared, members, found)
            else:
                self._score(pairs, 0, list(range(len(pairs))), found)
        return found

    def _score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        shared: int,
        members: list[int],
        found: list[list[float]],
    ) -> None:
        """Fill in `found` for `members`, whose prompts share their first `shared` tokens; each keeps one more, which predicts."""
        import contextlib

        import torch

        from helpers.evaluate import prefix_cache

        tails = {i: [*pairs[i][0][shared:], *pairs[i][1]] for i in members}
        order = sorted(members, key=lambda i: -len(tails[i]))
        with prefix_cache.decoding(self.model) if shared else contextlib.nullcontext() as state:
            if shared:
                self._read_prefix(pairs[members[0]][0][:shared])
            for batch in _chunks(order, lambda i: len(tails[i]), SCORED_TOKENS):
                ids, mask = self._pad([tails[i] for i in batch])
                rows, width = ids.shape
                start = max(min(len(pairs[i][0]) for i in batch) - shared - 1, 0)
                keep = torch.arange(start, width, device=ids.device)
                if shared:
                    state.begin(mask, 0)
                    positions = (shared + torch.arange(width, device=ids.device)).expand(rows, -1)
                    logits = self.model(
                        input_ids=ids, position_ids=positions, logits_to_keep=keep, use_cache=False
                    ).logits
                else:
                    logits = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits
                for row, i in enumerate(batch):
                    first, size = len(pairs[i][0]) - shared, len(pairs[i][1])
                    here = logits[row, first - 1 - start : first - 1 - start + size].float().log_softmax(-1)
                    found[i] = here.gather(-1, ids[row, first : first + size, None])[:, 0].tolist()

    # ------------------------------------------------------------ the fast path

    def _generate_fast(self, prompts: Sequence[Sequence[int]], decoding: Decoding, finish: Callable) -> None:
        from helpers.evaluate import prefix_cache

        for shared, members in groups(prompts):
            with prefix_cache.decoding(self.model) as state:
                if shared:
                    self._read_prefix(prompts[members[0]][:shared])
                members = sorted(members, key=lambda i: -len(prompts[i]))
                for batch in _even(
                    members, self._rows(len(prompts[members[0]]) - shared, shared, decoding.max_new_tokens)
                ):
                    self._decode(
                        state,
                        [prompts[i] for i in batch],
                        shared,
                        Draws(decoding, [prompts[i] for i in batch]),
                        lambda row, *a, batch=batch: finish(batch[row], *a),
                    )

    def _decode(self, state: Any, prompts: list[Sequence[int]], shared: int, draws: Draws, finish: Callable) -> None:
        """One batch: read what follows the shared prefix, (rows, longest), then a token a row at a time until all have ended."""
        import torch

        limit, tails = draws.decoding.max_new_tokens, [list(p[shared:]) for p in prompts]
        ids, mask = self._pad(tails)
        rows, width = ids.shape
        state.begin(mask, limit)
        lasts = torch.tensor([len(t) - 1 for t in tails], device=ids.device)
        keep, where = torch.unique(lasts, return_inverse=True)
        positions = (shared + torch.arange(width, device=ids.device)).expand(rows, -1)
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
        logits = logits[torch.arange(rows, device=ids.device), where]
        state.phase, state.used = "answer", width
        alive, written = list(range(rows)), [[] for _ in range(rows)]
        position = torch.tensor([len(p) for p in prompts], device=ids.device)
        for step in range(limit):
            tokens = draws.pick(logits, alive, step)
            stay = []
            for place, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
                if token in self.stops:
                    finish(row, written[row], True)
                    continue
                written[row].append(token)
                if step + 1 == limit:
                    finish(row, written[row], False)
                else:
                    stay.append(place)
            if not stay:
                return
            if len(stay) < len(alive):
                order = state.keep(stay)
                index = torch.tensor(order, device=ids.device)
                tokens, position, alive = tokens[index], position[index], [alive[p] for p in order]
            logits = self.model(input_ids=tokens[:, None], position_ids=position[:, None], use_cache=False).logits[
                :, -1
            ]
            state.used += 1
            position = position + 1

    def _read_prefix(self, ids: Sequence[int]) -> None:
        """Read what all prompts begin with; its keys and values stay in the open `shared_prefix.decoding`."""
        self.model(input_ids=self._tensor([list(ids)]), use_cache=False, logits_to_keep=1)

    def _rows(self, longest: int, shared: int, limit: int) -> int:
        """How many answers at once: as many as their keys and values, and the attention scores of their prompts, have room for."""
        import torch

        config, device = self.model.config.get_text_config(), self.model.device
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        row = (
            2
            * config.num_hidden_layers
            * (config.num_key_value_heads or heads)
            * size
            * self.model.dtype.itemsize
            * (longest + limit)
        )
        room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else CACHE_BYTES
        return max(1, min(ROWS, room // row, SCORE_BYTES // (4 * heads * longest * (longest + shared))))

    def _trusted(self, prompt: Sequence[int]) -> bool:
        """Whether the fast path is right for this model: its logits for one prompt are held against the plain forward pass, once;
        disagreement turns it off, aloud."""
        import torch

        from helpers.evaluate import packed, prefix_cache

        if not self.fast or self._checked:
            return self.fast
        self._checked, self._packed = True, packed.Packed(self.model)
        ids, half = self._tensor([list(prompt)]), len(prompt) // 2
        plain = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        with self._packed, prefix_cache.decoding(self.model) as state:
            if half:
                self._read_prefix(prompt[:half])
            state.begin(torch.ones_like(ids[:, half:]), 0)
            positions = torch.arange(half, len(prompt), device=ids.device)[None]
            fast = (
                self.model(input_ids=ids[:, half:], position_ids=positions, use_cache=False, logits_to_keep=1)
                .logits[0, -1]
                .float()
            )
        kl = torch.nn.functional.kl_div(
            fast.log_softmax(-1), plain.log_softmax(-1), log_target=True, reduction="sum"
        ).item()
        if not kl < 0.02:  # rounding in bf16 stays below 0.005
            self.fast, self._packed, self.path_note = (
                False,
                None,
                f"transformers.generate (fast logits differ, KL {kl:.3g})",
            )
            print(f"Decoding through {self.path_note}")
        return self.fast

    # ------------------------------------------------------------ the plain path

    def _generate_plain(self, prompts: Sequence[Sequence[int]], decoding: Decoding, finish: Callable) -> None:
        import torch

        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        options = {"do_sample": False}
        if decoding.temperature > 0:
            options = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
        pad = self._pad_id()
        for batch in _chunks(order, lambda i: len(prompts[i]) + decoding.max_new_tokens, 16384):
            width = max(len(prompts[i]) for i in batch)
            ids = self._tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in batch])
            mask = self._tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
            torch.manual_seed(decoding.seed)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=decoding.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=sorted(self.stops),
                **options,
            )
            for row, i in enumerate(batch):
                new = out[row, width:].tolist()
                end = next((n for n, token in enumerate(new) if token in self.stops), None)
                finish(i, new[:end] if end is not None else new, end is not None)

    # ------------------------------------------------------------ small parts

    def _room(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, prompts), default=0) + decoding.max_new_tokens
        if limit and longest > limit:
            raise TunebookError(
                f"The longest question with its answer takes {longest} tokens, the model reads {limit}; "
                "shorten the prompts or lower max_new_tokens."
            )
        if any(len(p) == 0 for p in prompts):
            raise TunebookError("A prompt has no tokens; every question needs some text.")

    def _pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.stops)

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple:
        width, pad = max(map(len, rows)), self._pad_id()
        ids = self._tensor([list(r) + [pad] * (width - len(r)) for r in rows])
        return ids, self._tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])

    def _tensor(self, rows: list[list[int]]) -> Any:
        import torch

        return torch.tensor(rows, dtype=torch.long, device=self.model.device)


class Draws:
    """Chooses tokens: the most likely one, or a seeded draw that depends on the prompt and not on its neighbours in the batch."""

    def __init__(self, decoding: Decoding, prompts: Sequence[Sequence[int]]):
        self.decoding, self.uniform = decoding, None
        if decoding.temperature > 0:
            import numpy as np

            self.uniform = np.stack(
                [
                    np.random.default_rng([decoding.seed, zlib.crc32(repr(list(p)).encode())]).random(
                        decoding.max_new_tokens
                    )
                    for p in prompts
                ]
            )

    def pick(self, logits: Any, rows: list[int], step: int) -> Any:
        """logits: (rows, vocab) → token ids (rows,)."""
        import torch

        if self.uniform is None:
            return logits.argmax(-1)
        total = torch.softmax(logits.float() / self.decoding.temperature, -1).double().cumsum(-1)
        draw = torch.tensor(self.uniform[rows, step], device=logits.device)[:, None] * total[:, -1:]
        return torch.searchsorted(total, draw).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def groups(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
    """(length of the shared prefix, indices) of prompts that begin alike; each prompt keeps at least one token of its own.

    Sorted token by token, neighbours share the most; a cut goes where they share less than half of the shorter one.
    Groups of fewer than four are read together under whatever prefix they all have in common.
    """
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    runs: list[list[int]] = []
    for i in order:
        if runs and common(prompts[runs[-1][-1]], prompts[i]) * 2 >= min(len(prompts[runs[-1][-1]]), len(prompts[i])):
            runs[-1].append(i)
        else:
            runs.append([i])
    few = [i for run in runs if len(run) < 4 for i in run]
    for run in [run for run in runs if len(run) >= 4] + ([few] if few else []):
        shared = min(common(prompts[run[0]], prompts[run[-1]]), min(len(prompts[i]) for i in run) - 1)
        yield (shared if shared >= MIN_SHARED and len(run) > 1 else 0), run


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` share from the start."""
    size = min(len(a), len(b))
    return next((n for n in range(size) if a[n] != b[n]), size)


def _even(members: list[int], most: int) -> Iterator[list[int]]:
    """Batches of about the same size, at most `most` each."""
    size = -(-len(members) // -(-len(members) // most))
    for start in range(0, len(members), size):
        yield members[start : start + size]


def _chunks(order: Sequence[int], length: Callable[[int], int], budget: int) -> Iterator[list[int]]:
    """Consecutive indices whose padded size stays within `budget` tokens; at least one each."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * max(length(j) for j in (*batch[:1], i)) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
