"""Batched decoding that reads a shared prompt prefix once, instead of once a row.

Questions of one data set begin alike: the same system prompt, often the same schema. Expanding its keys and values to
every row makes decoding wait for memory. Here the prefix stays a single copy, (1, heads, prefix, dim); its scores are
one matrix product for the whole batch, and the softmax runs over prefix and suffix together, so the result is exact
(compare cascade attention, Juravsky et al. 2024, https://arxiv.org/abs/2402.05099).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from helpers.model.packed_attention import causal_sdpa, choose, repeat_heads, visible

NAME = "tunebook_shared_prefix"
# Keys and values of another shape or of another layer; such models decode through transformers instead.
UNSUPPORTED = ("kv_lora_rank", "linear_attn_config", "is_encoder_decoder", "num_kv_shared_layers", "global_head_dim")


def supports(model: Any) -> bool:
    """Whether every layer of `model` is plain attention with rotary positions, over the whole context or a window."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not choose(None, config).packed or any(getattr(config, name, None) for name in UNSUPPORTED):
        return False
    plain = kinds <= {"full_attention", "sliding_attention"} and getattr(config, "rope_parameters", None)
    return bool(plain and getattr(model, "_supports_attention_backend", False))


@dataclass
class State:
    """Keys and values of one batch. prefix: layer → (keys, values) of shape (1, kv_heads, prefix, dim); suffix: layer →
    (keys, values) of shape (rows, kv_heads, capacity, dim), of which the first `used` columns are filled.
    allowed: bool (rows, capacity), the suffix columns that belong to the row and are not padding; places: their
    positions (rows, capacity), counted from the end of the prefix."""

    phase: str = "prefix"
    prefix: dict[int, tuple] = field(default_factory=dict)
    suffix: dict[int, tuple] = field(default_factory=dict)
    used: int = 0
    capacity: int = 0
    allowed: Any = None
    places: Any = None

    def begin(self, mask: Any, answer: int) -> None:
        """A new batch. mask: (rows, width), 0 where a prompt is padded on the right; answer: tokens that may follow."""
        from torch.nn.functional import pad

        self.phase, self.used, self.capacity, self.suffix = "prompt", 0, mask.shape[1] + answer, {}
        self.allowed = pad(mask.bool(), (0, answer), value=True)
        self.places = self.allowed.cumsum(1) - 1

    def seen(self, tokens: int, window: int | None, prefix: int) -> tuple[Any, Any]:
        """What the `tokens` newest columns see of the suffix and of the prefix, bool (rows, tokens, columns) each;
        None for all of the prefix."""
        import torch

        end = self.used + tokens
        queries = self.places[:, self.used : end]
        own = visible(queries, self.places[:, :end], window) & self.allowed[:, None, :end]
        before = torch.arange(-prefix, 0, device=own.device)
        return own, visible(queries, before.expand(len(own), -1), window) if window and prefix else None

    def keep(self, stay: list[int]) -> list[int]:
        """Let go of all rows but `stay` (ascending): the last of them move into the places of the finished ones, so
        that little is copied. Returns which old row each new place holds."""
        import torch

        count = len(stay)
        holes, movers = sorted(set(range(count)) - set(stay)), [p for p in stay if p >= count]
        order = [*range(count)]
        if holes:
            to, of = (torch.tensor(places, device=self.allowed.device) for places in (holes, movers))
            self.allowed[to], self.places[to] = self.allowed[of], self.places[of]
            for keys, values in self.suffix.values():
                keys[to, :, : self.used] = keys[of, :, : self.used]
                values[to, :, : self.used] = values[of, :, : self.used]
            for hole, mover in zip(holes, movers, strict=True):
                order[hole] = mover
        self.allowed, self.places = self.allowed[:count], self.places[:count]
        self.suffix = {layer: (keys[:count], values[:count]) for layer, (keys, values) in self.suffix.items()}
        return order


class decoding:
    """`with decoding(model) as state:` routes the model's attention through `state`, and puts it back afterwards."""

    def __init__(self, model: Any):
        self.model = model

    def __enter__(self) -> State:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        state = State()
        AttentionInterface.register(NAME, lambda module, *a, **k: attention(state, module, *a, **k))
        AttentionMaskInterface.register(NAME, lambda *a, **k: None)
        self.before = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        return state

    def __exit__(self, *_: Any) -> None:
        self.model.set_attn_implementation(self.before)


def attention(
    state: State,
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple:
    """Attention for transformers' AttentionInterface. query: (rows, heads, tokens, dim); key, value: (rows, kv_heads,
    tokens, dim) of the new tokens only. Returns (rows, tokens, heads, dim) and no weights."""
    import torch

    rows, heads, tokens, dim = query.shape
    kv_heads, layer = key.shape[1], module.layer_idx
    if state.phase == "prefix":
        state.prefix[layer] = (key, value)
    elif state.phase == "prompt":
        shape = (rows, kv_heads, state.capacity, dim)
        state.suffix[layer] = (key.new_zeros(shape), value.new_zeros(shape))
    if state.phase != "prefix":
        keys, values = state.suffix[layer]
        keys[:, :, state.used : state.used + tokens] = key
        values[:, :, state.used : state.used + tokens] = value
    if state.phase == "prefix" or (state.phase == "prompt" and layer not in state.prefix):
        # Right padding under a causal mask: no real token ever sees a pad.
        out = causal_sdpa(query, *repeat_heads(query, key, value), sliding_window, scale=scaling)
        return out.transpose(1, 2), None
    groups, end = heads // kv_heads, state.used + tokens
    keys, values = keys[:, :, :end], values[:, :, :end]
    width = state.prefix[layer][0].shape[2] if layer in state.prefix else 0
    seen, seen_before = state.seen(tokens, sliding_window, width)
    grouped = query.reshape(rows, kv_heads, groups * tokens, dim)
    scale = dim**-0.5 if scaling is None else scaling

    def hide(scores: Any, allowed: Any) -> Any:
        return scores.masked_fill(~allowed.repeat(1, groups, 1)[:, None], torch.finfo(scores.dtype).min)

    own = hide(grouped @ keys.transpose(-1, -2), seen)
    if not width:
        out = torch.softmax(own * scale, dim=-1, dtype=torch.float32).to(query.dtype) @ values
    else:
        before, before_values = state.prefix[layer]
        flat = grouped.transpose(0, 1).reshape(kv_heads, rows * groups * tokens, dim)
        shared = (flat @ before[0].transpose(-1, -2)).view(kv_heads, rows, groups * tokens, width).transpose(0, 1)
        if seen_before is not None:
            shared = hide(shared, seen_before)
        weights = torch.softmax(torch.cat([shared, own], dim=-1) * scale, dim=-1, dtype=torch.float32).to(query.dtype)
        flat = weights[..., :width].transpose(0, 1).reshape(kv_heads, rows * groups * tokens, width)
        common = (flat @ before_values[0]).view(kv_heads, rows, groups * tokens, dim).transpose(0, 1)
        out = common + weights[..., width:] @ values
    return out.reshape(rows, kv_heads, groups, tokens, dim).reshape(rows, heads, tokens, dim).transpose(1, 2), None
