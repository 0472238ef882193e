"""Answers of a Hugging Face model to many prompts: sorted batches, shared prefixes read once, finished rows let go.

`HfModel`, `helpers.gguf.runner.GgufModel` and `helpers.evaluate.candidates.RemoteModel` have the same three methods:
`encode(messages, tools)`, `generate(prompts, …)` and, the last one excepted, `answered` and `logprobs(pairs)`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from helpers import machine
from helpers.data.chat_template import inspect
from helpers.data.labels import Encoder
from helpers.display import percent, say
from helpers.errors import TunebookError
from helpers.evaluate import prefix_cache
from helpers.model.layer_kinds import head_dim
from helpers.model.loading import fast_bf16
from helpers.model.packed_attention import common_length
from helpers.model.stop_tokens import end_of_turn, special_pattern, special_tokens, stop_tokens
from helpers.tasks.extraction import thinking_marks
from helpers.tasks.questions import Answer, Decoding

ROWS = 256  # answers at once at most; finished rows leave, and the fewer the batches, the fewer steps with few rows
BATCH_BYTES = 1 << 30  # keys, values and attention scores of one batch on a CPU; a quarter of a GPU's free memory
MIN_SHARED = 16  # tokens; below this a prefix is not worth a batch of its own
BATCH_TOKENS = 16384  # padded tokens of a batch that transformers' own generate works on
SCORED_TOKENS = 2048  # padded tokens of a batch whose probabilities are read
SAME_KL = 0.02  # of fast and plain logits; rounding in bf16 stays below 0.005
SAME_LOGITS = 0.1  # relative distance of generate's logits from plain ones; rounding stays below 0.03
PACKED_ROWS = 64  # what the layout of packed weights is chosen for; 4 to 1,024 rows run as fast in it
PACKED_SHARE = 0.25  # of the free memory that the second copy of the weights may take
Ids = Sequence[int]


class HfModel:
    """A transformers causal model with its tokenizer.

    fast: answers come from `prefix_cache`, where it supports the architecture and its logits for the first prompt agree
    with the plain forward pass; else from transformers' own `generate`.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self._training = model.training
        self.model, self.tokenizer = model.eval(), tokenizer
        configured = getattr(model.generation_config, "eos_token_id", None)
        self.stops = set(stop_tokens(tokenizer, configured))
        marks = str(thinking_marks(tokenizer))
        self._kept = {text for text in special_tokens(tokenizer) if text in marks}  # control tokens that mark thinking
        self.fast = prefix_cache.supports(model)
        self.fixed = model.device.type == "cuda"  # as in `prefix_cache.Steps`
        self._packed: dict[Any, Callable] | None = None
        self._proven = False
        self._plain: tuple[int, dict[str, Any]] | None = None

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(inspect(self.tokenizer), "last", None, "text")

    @property
    def window(self) -> int:
        """Tokens that the model reads at most; 0 where nobody knows."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0

    def encode(self, messages: Sequence[dict[str, Any]], tools: str | None = None) -> list[int]:
        """Token ids of the conversation with the generation prompt, as training rows are rendered. tools: JSON text.
        Raises RowError where the template refuses it."""
        if not self.tokenizer.chat_template:
            raise TunebookError("Its tokenizer has no chat template, so it cannot be asked a question")
        return self._encoder.chat.prompt(list(messages), tools)

    def answered(self, messages: list[dict], tools: str | None, turns: list[dict]) -> list[tuple[Ids, Ids]]:
        """(what comes before, trained tokens) of each trained run of tokens in the answer `turns`, as training has
        them. Raises RowError where they could not be trained."""
        return self._encoder.answered(messages, tools, turns)

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
        limit = self.window
        longest = max(map(len, prompts)) + decoding.max_new_tokens
        if limit and longest > limit:
            raise TunebookError(
                f"The longest question with its answer takes {longest} tokens, the model reads {limit}; "
                "shorten the prompts or lower max_new_tokens."
            )
        answers: dict[int, Answer] = {}

        def finish(index: int, ids: list[int], stopped: bool) -> None:
            text = self.tokenizer.decode(ids, skip_special_tokens=not self._kept)
            if self._kept:
                text = special_pattern(self.tokenizer).sub(lambda m: m[0] if m[0] in self._kept else "", text)
            answers[index] = Answer(text.strip(), len(ids) + stopped, stopped)
            if done:
                done(index, answers[index])

        with self._running(prompts[0]):
            (self._generate_fast if self.fast else self._generate_plain)(prompts, decoding, finish)
        return [answers[i] for i in range(len(prompts))]

    def logprobs(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[list[float]]:
        """For each (prompt ids, completion ids) the natural log-probability of every completion token, in order."""
        import torch

        found: list[list[float]] = [[] for _ in pairs]
        with self._running([*pairs[0][0], *pairs[0][1]]):
            parts = groups([prompt for prompt, _ in pairs]) if self.fast else [(0, list(range(len(pairs))))]
            for shared, members in parts:
                tails = {i: [*pairs[i][0][shared:], *pairs[i][1]] for i in members}
                with self._behind(pairs[members[0]][0][:shared]) if self.fast else contextlib.nullcontext() as state:
                    for batch in batches({i: len(tail) for i, tail in tails.items()}, SCORED_TOKENS):
                        first = max(min(len(pairs[i][0]) for i in batch) - shared - 1, 0)  # what predicts a completion
                        keep = torch.arange(first, max(len(tails[i]) for i in batch), device=self.model.device)
                        logits = self._read([tails[i] for i in batch], shared, state, keep=keep)
                        for row, i in zip(logits, batch, strict=True):
                            start = len(pairs[i][0]) - shared - 1 - first
                            wanted = torch.tensor(pairs[i][1], dtype=torch.long, device=row.device)[:, None]
                            here = row[start : start + len(wanted)].float().log_softmax(-1)
                            found[i] = here.gather(-1, wanted)[:, 0].tolist()
        return found

    # ------------------------------------------------------------ reading

    @contextlib.contextmanager
    def _running(self, prompt: Ids) -> Iterator[None]:
        """Without gradients, on the fast path with packed weights, which `prompt` has to prove once; what torch raises
        when it cannot run the model (no memory) as a TunebookError."""
        import torch

        try:
            # What inference mode makes cannot go into a backward pass, and a model in training has one to come.
            with torch.inference_mode(not self._training), torch.no_grad(), contextlib.ExitStack() as stack:
                if self.fast and self._packed is None:
                    self._packed = pack(self.model)
                for layer, product in (self._packed or {}).items() if self.fast else ():
                    layer.forward = product
                    stack.callback(delattr, layer, "forward")
                if self.fast and not self._proven:
                    self.fast = self._proven = self._agrees(prompt)
                yield
        except RuntimeError as error:
            where = self.model.config._name_or_path or self.model.config.model_type
            raise TunebookError(
                f"The model {where} could not be run ({str(error).strip().splitlines()[0][:300]})."
            ) from error

    def _agrees(self, prompt: Ids) -> bool:
        """Whether a prompt read in two halves by the fast path has the logits of the plain forward pass."""
        import torch

        half = len(prompt) // 2
        plain = self._read([prompt])
        with self._behind(prompt[:half]) as state:
            fast = self._read([prompt[half:]], half, state)
        found, known = (logits[0, -1].float().log_softmax(-1) for logits in (fast, plain))
        kl = torch.nn.functional.kl_div(found, known, log_target=True, reduction="sum").item()
        if not kl < SAME_KL:
            say(f"Decoding through transformers.generate: fast logits differ (KL {kl:.3g})")
        return kl < SAME_KL

    def _batched(self, prompts: Sequence[Ids]) -> tuple[int, dict[str, Any]]:
        """(tokens of a batch, options) with which `generate` has the plain forward pass's logits for a second token:
        some classes take no padding (RWKV), others go wrong in their cache (MiniMax)."""
        short, long = min(prompts, key=len), max(prompts, key=len)
        how = {"min_new_tokens": 2, "max_new_tokens": 2, "do_sample": False, "output_logits": True}
        for tokens, more in ((BATCH_TOKENS, {}), (1, {}), (1, {"use_cache": False})):
            ids, mask = self._pad([short, long][: 1 + (tokens > 1)], "left")
            made = self.model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **how, **more)
            known = self._read([[*short, made.sequences[0, -2].item()]])[0, -1].float()
            apart = (made.logits[1][0].float() - known).std().item() / known.std().item()
            if apart < SAME_LOGITS:
                break
            way = "in padded batches" if tokens > 1 else "without its cache" if more else "with its cache"
            say(f"Decoding {way} gives other logits than the plain forward pass (by {percent(apart)}).")
        return tokens, more

    @contextlib.contextmanager
    def _behind(self, prefix: Ids) -> Iterator[prefix_cache.State]:
        """What is read inside stands behind this prefix."""
        with prefix_cache.decoding(self.model) as state:
            if prefix:
                self._read([prefix])
            yield state

    def _read(self, rows: Sequence[Ids], shared: int = 0, state: Any = None, limit: int = 0, keep: Any = 1) -> Any:
        """Logits at the places `keep` of rows behind the `shared` tokens of a `prefix_cache.State`, in which `limit`
        more tokens may follow; of whole rows without one."""
        import torch

        ids, mask = self._pad(rows)
        if state:
            state.begin(mask, limit)
        places = (shared + torch.arange(ids.shape[1], device=ids.device)).expand(len(rows), -1)
        made = self.model(ids, attention_mask=mask, position_ids=places, logits_to_keep=keep, use_cache=False)
        return made.logits

    def _pad(self, rows: Sequence[Ids], side: str = "right") -> tuple[Any, Any]:
        """(ids, mask) of shape (rows, longest), 0 in the mask where a row is padded."""
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt").to(self.model.device)
        return padded["input_ids"], padded["attention_mask"]

    # ------------------------------------------------------------ answering

    def _generate_fast(self, prompts: Sequence[Ids], decoding: Decoding, finish: Callable) -> None:
        for shared, members in groups(prompts):
            costs = {i: self._cost(len(prompts[i]) - shared, shared, decoding.max_new_tokens) for i in members}
            with self._behind(prompts[members[0]][:shared]) as state:
                for batch in batches(costs, 1.0):
                    self._decode(state, {i: prompts[i] for i in batch}, shared, decoding, finish)

    def _cost(self, length: int, shared: int, limit: int) -> float:
        """The share of a batch's room that an answer takes: its keys and values, and one layer's attention scores."""
        import torch

        config, device = self.model.config.get_text_config(), self.model.device
        heads = config.num_attention_heads
        numbers = 2 * config.num_hidden_layers * (config.num_key_value_heads or heads) * head_dim(config)
        needed = self.model.dtype.itemsize * numbers * (length + limit) + 4 * heads * length * (length + shared)
        room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else BATCH_BYTES
        return max(1 / ROWS, needed / room)

    def _decode(self, state: Any, prompts: dict[int, Ids], shared: int, decoding: Decoding, finish: Callable) -> None:
        """One batch: read what follows the shared prefix, then a token a row at a time until all have ended."""
        import torch

        device, limit = self.model.device, decoding.max_new_tokens
        tails = [prompt[shared:] for prompt in prompts.values()]
        ends = torch.tensor([len(tail) - 1 for tail in tails], device=device)
        keep, where = torch.unique(ends, return_inverse=True)
        logits = self._read(tails, shared, state, limit, keep)[torch.arange(len(tails), device=device), where]
        state.used = max(map(len, tails))
        # A row's draws depend on its prompt and the seed, whatever batch it is in; numbers hash alike in every process.
        draws = [torch.Generator(device).manual_seed(hash((decoding.seed, *prompt))) for prompt in prompts.values()]
        rows: list[tuple[int, list[int], Any]] = [(i, [], one) for i, one in zip(prompts, draws, strict=True)]
        following, over = prefix_cache.Steps(self.model, state, self.fixed), set[int]()
        for step in range(limit):
            if decoding.temperature > 0:
                chances = torch.softmax(logits.float() / decoding.temperature, -1)
                both = zip(chances, rows, strict=True)
                tokens = torch.cat([torch.multinomial(chance, 1, generator=row[2]) for chance, row in both])
            else:
                tokens = logits.argmax(-1)
            stay = []
            for place, ((i, written, _), token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
                if i in over:
                    continue
                stopped = token in self.stops
                if not stopped:
                    written.append(token)
                if stopped or step + 1 == limit:
                    over.add(i)
                    finish(i, written, stopped)
                else:
                    stay.append(place)
            if not stay:
                break
            # A graph is for so many rows: those that have ended go when they are most of them.
            if len(stay) < (len(rows) / 4 if following.fixed else len(rows)):
                order = state.keep(stay)
                tokens, rows = tokens[order], [rows[place] for place in order]
            logits = following(tokens)
        self.fixed = following.fixed

    def _generate_plain(self, prompts: Sequence[Ids], decoding: Decoding, finish: Callable) -> None:
        import torch

        tokens, more = self._plain = self._plain or self._batched(prompts)
        limit, options = decoding.max_new_tokens, {"do_sample": False, "eos_token_id": sorted(self.stops)} | more
        if decoding.temperature > 0:
            options |= {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
        for batch in batches({i: len(prompt) + limit for i, prompt in enumerate(prompts)}, tokens):
            ids, mask = self._pad([prompts[i] for i in batch], "left")
            torch.manual_seed(decoding.seed)
            out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, **options)
            for i, row in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in self.stops), None)
                finish(i, row[:end], end is not None)


def groups(prompts: Sequence[Ids]) -> Iterator[tuple[int, list[int]]]:
    """(length of the shared prefix, indices) of prompts that begin alike; each keeps at least one token of its own.

    Sorted token by token, neighbours share the most; a cut goes where they share less than half of the shorter one.
    Groups of fewer than four are read together under whatever prefix they all have in common.
    """
    runs: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):
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


def batches(sizes: Mapping[int, float], budget: float) -> Iterator[list[int]]:
    """Indices, the largest first, in batches within `budget` when padded to the largest; at least one each."""
    order = sorted(sizes, key=lambda i: -sizes[i])
    while order:
        count = max(1, int(budget / sizes[order[0]]))
        yield order[:count]
        order = order[count:]


def pack(model: Any) -> dict[Any, Callable]:
    """Linear layer → its product with weights laid out once for a CPU's matrix kernels; none where it gains nothing.

    PyTorch hands a weight to its matrix library as it lies in memory, and the library rearranges it in every call; with
    a few dozen rows that costs a third of the product. Here oneDNN does it once, as PyTorch's compiler for a frozen
    model: 31 instead of 22 GFLOPS on one AVX2 core (64 rows, 1536 x 576).
    """
    import torch

    def product(layer: Any) -> Callable:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, PACKED_ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")

    # A head whose loss is fused while it trains has a product of its own, and keeps it.
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and "forward" not in vars(m)]
    size = sum(m.weight.numel() * m.weight.itemsize for m in layers)
    fits = size <= PACKED_SHARE * 2**30 * machine.free_memory_gib() and torch.backends.mkldnn.is_available()
    right = model.dtype == torch.float32 or (model.dtype == torch.bfloat16 and fast_bf16())
    return {layer: product(layer) for layer in layers} if model.device.type == "cpu" and right and fits else {}
