"""Batched decoding that reads a shared prompt prefix once, instead of once a row.

Questions of one data set begin alike: the same system prompt, often the same schema. Expanding its keys and values to
every row makes decoding wait for memory. Here the prefix stays a single copy, (1, heads, prefix, dim); its scores are
one matrix product for the whole batch, and the softmax runs over prefix and suffix together, so the result is exact
(compare cascade attention, Juravsky et al. 2024, https://arxiv.org/abs/2402.05099).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from helpers.display import say
from helpers.model.packed_attention import causal_sdpa, choose, repeat_heads, visible

NAME = "tunebook_shared_prefix"
HORIZON = 128  # tokens that one graph of a decoding step is for: so many columns at most are looked at in vain
SAME = 0.02  # relative distance of a step's logits from its graph's
# Keys and values of another shape or of another layer; such models decode through transformers instead.
UNSUPPORTED = ("kv_lora_rank", "linear_attn_config", "is_encoder_decoder", "num_kv_shared_layers", "global_head_dim")


def supports(model: Any) -> bool:
    """Whether every layer of `model` is plain attention with rotary positions, over the whole context or a window."""
    config = model.config.get_text_config()
    known = choose(None, model.config).packed and not any(getattr(config, name, None) for name in UNSUPPORTED)
    return bool(known and getattr(config, "rope_parameters", None))


@dataclass
class State:
    """Keys and values of one batch. prefix: layer → (keys, values) of shape (1, kv_heads, prefix, dim); suffix: layer →
    (keys, values) of shape (rows, kv_heads, capacity, dim), of which the first `used` columns are filled.
    allowed: bool (rows, width + capacity), the columns that are not padding, prefix first, None while the prefix is
    read; places: their positions; width: of the prefix. at: in a CUDA graph, whose arrays keep their sizes, the column
    that is filled next, int64 (1,) on the GPU, and reach the columns that are looked at."""

    prefix: dict[int, tuple] = field(default_factory=dict)
    suffix: dict[int, tuple] = field(default_factory=dict)
    width: int = 0
    used: int = 0
    allowed: Any = None
    places: Any = None
    at: Any = None
    reach: int = 0

    def begin(self, mask: Any, answer: int) -> None:
        """A new batch. mask: (rows, width), 0 where a prompt is padded on the right; answer: tokens that may follow."""
        from torch.nn.functional import pad

        self.used, self.suffix, self.at = 0, {}, None
        self.width = max((keys.shape[2] for keys, _ in self.prefix.values()), default=0)
        self.allowed = pad(mask.bool(), (self.width, answer), value=True)
        self.places = self.allowed.cumsum(1) - 1

    def newest(self, tokens: int = 1) -> Any:
        """Positions (rows, tokens) of the `tokens` newest columns."""
        if self.at is not None:
            return self.places.index_select(1, self.at + self.width)
        return self.places[:, self.width + self.used :][:, :tokens]

    def keep(self, stay: list[int]) -> list[int]:
        """Let go of all rows but `stay` (ascending): the last of them move into the places of the finished ones, so
        that little is copied. Returns which old row each new place holds."""
        count, order = len(stay), list(range(len(stay)))
        holes, movers = sorted(set(order) - set(stay)), [place for place in stay if place >= count]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        for kept in [self.allowed, self.places, *itertools.chain(*self.suffix.values())] if holes else ():
            kept[holes] = kept[movers]
        self.allowed, self.places = self.allowed[:count], self.places[:count]
        self.suffix = {layer: (keys[:count], values[:count]) for layer, (keys, values) in self.suffix.items()}
        return order


class Steps:
    """A token more for every row of a batch at each call: tokens (rows,) → logits (rows, vocab), to be used before the
    next. fixed: with arrays of fixed sizes, of which a GPU makes a CUDA graph, since it computes the step of a small
    model in less time than its kernels are launched in; off again where a step cannot be captured."""

    def __init__(self, model: Any, state: State, fixed: bool) -> None:
        self.model, self.state, self.fixed, self.graph = model, state, fixed, None
        self.tokens: Any = None

    def __call__(self, tokens: Any) -> Any:
        state = self.state
        if self.fixed and (state.at is None or state.used == state.reach or len(tokens) != len(self.tokens)):
            logits = self._begin(tokens)
        elif self.graph:
            self.tokens.copy_(tokens)
            self.graph.replay()
            logits = self.logits
        else:
            logits = self._run(tokens)
        state.used += 1
        return logits

    def _begin(self, tokens: Any) -> Any:
        """This step, kernel by kernel, and the graph of those that follow."""
        import torch

        state, self.tokens, self.graph = self.state, tokens.clone(), None
        state.at = torch.tensor([state.used], device=tokens.device)
        state.reach = min(state.used + HORIZON, state.allowed.shape[1] - state.width)
        logits = self._run(self.tokens)
        if tokens.is_cuda and state.reach > state.used + 1:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self.logits = self._run(self.tokens)
                state.at.fill_(state.used)
                graph.replay()  # the step once more
                if not (self.logits - logits).norm() <= SAME * logits.norm():
                    raise RuntimeError("a graph gives other logits than its kernels")
                self.graph = graph
            except RuntimeError as error:
                say(f"Decoding without CUDA graphs: {str(error.__context__ or error).strip().splitlines()[0][:200]}")
                self.fixed, state.at = False, None
        return logits

    def _run(self, tokens: Any) -> Any:
        logits = self.model(tokens[:, None], position_ids=self.state.newest(), use_cache=False).logits[:, -1]
        if self.state.at is not None:
            self.state.at += 1
        return logits


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[State]:
    """Routes the model's attention through a `State`, and puts it back afterwards."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    state = State()
    AttentionInterface.register(NAME, functools.partial(attention, state))
    AttentionMaskInterface.register(NAME, lambda *a, **k: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield state
    finally:
        model.set_attn_implementation(before)


def attention(state, module, query, key, value, mask=None, scaling=None, sliding_window=None, **_):
    """Attention for transformers' AttentionInterface. query: (rows, heads, tokens, dim); key, value: (rows, kv_heads,
    tokens, dim) of the new tokens only. Returns (rows, tokens, heads, dim) and no weights."""
    import torch

    rows, heads, tokens, dim = query.shape
    kv_heads, layer = key.shape[1], module.layer_idx
    end = state.used + tokens if state.at is None else state.reach
    if state.allowed is None:
        state.prefix[layer] = (key, value)
    else:
        if layer not in state.suffix:
            shape = (rows, kv_heads, state.allowed.shape[1] - state.width, dim)
            state.suffix[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        for kept, new in zip(state.suffix[layer], (key, value), strict=True):
            if state.at is None:
                kept[:, :, state.used : end] = new
            else:
                kept.index_copy_(2, state.at, new)
    if state.allowed is None or (state.used == 0 and layer not in state.prefix):
        # Right padding under a causal mask: no real token ever sees a pad.
        out = causal_sdpa(query, *repeat_heads(query, key, value), sliding_window, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    keys, values = (kept[:, :, :end] for kept in state.suffix[layer])
    before, before_values = state.prefix.get(layer, (key[:1, :, :0], value[:1, :, :0]))
    width, many = state.width, heads // kv_heads * tokens
    grouped = query.reshape(rows, kv_heads, many, dim)
    flat = grouped.transpose(0, 1).reshape(kv_heads, rows * many, dim)
    shared = (flat @ before[0].transpose(-1, -2)).view(kv_heads, rows, many, width).transpose(0, 1)
    scores = torch.cat([shared, grouped @ keys.transpose(-1, -2)], dim=-1)
    seen = visible(state.newest(tokens), state.places[:, : width + end], sliding_window)
    seen &= state.allowed[:, None, : width + end]
    scores.masked_fill_(~seen.repeat(1, heads // kv_heads, 1)[:, None], torch.finfo(scores.dtype).min)
    scale = dim**-0.5 if scaling is None else scaling
    weights = torch.softmax(scores * scale, dim=-1, dtype=torch.float32).to(query.dtype)
    flat = weights[..., :width].transpose(0, 1).reshape(kv_heads, rows * many, width)
    out = (flat @ before_values[0]).view(kv_heads, rows, many, dim).transpose(0, 1) + weights[..., width:] @ values
    return out.reshape(rows, heads, tokens, dim).transpose(1, 2).contiguous(), None
