"""Packed rows, and attention that keeps their documents apart on every GPU and on a CPU.

A packed row is one long row of several examples ("documents"):

    input_ids      a  b  c  d  |  e  f  |  g  h  i
    position_ids   0  1  2  3  |  0  1  |  0  1  2         positions restart
    labels         –  b  c  d  |  –  f  |  –  h  i         nothing predicts a document's first token
    cu_seq_lens    0              4        6        9      where documents begin and end

A dense block mask would cost the square of the row. Two exact ways are registered with transformers instead:

`packed_varlen`  PyTorch's own variable-length FlashAttention (compute capability 8.0 and newer, 16-bit)
`packed_sdpa`    one `scaled_dot_product_attention` call per document (T4, CPU, float32); no mask either

Text-to-SQL rows of one database share a schema of hundreds of tokens, and both answers of a preference pair share their
prompt. Causal attention makes the hidden states of a common prefix the same in every row, so one row

    input_ids      p0 p1 … pn  |  suffix of row 1  |  suffix of row 2 …
    position_ids    0  1 …  n  |  n+1 n+2 …        |  n+1 n+2 …

in which each suffix sees the prefix and itself gives the same losses and gradients as separate rows. On two CPU cores
it made an epoch of the default job about three times as fast. `shared_prefix` is its attention, for GPUs without
FlashAttention and for CPUs; `helpers.evaluate.prefix_cache` decodes by the same idea.

Without `cu_seq_lens_q` and `document_lengths` both do what "sdpa" does, so padded batches and `generate()` work too.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from helpers.errors import TunebookError
from helpers.model.layer_kinds import head_dim, model_class, unpackable

IGNORE = -100  # label that no loss counts
FLASH = "packed_varlen"  # the word "flash" in the name would make transformers look for a kernel package
SDPA = "packed_sdpa"
SHARED = "shared_prefix"
MIN_PREFIX = 16  # a shorter common prefix is not worth a row of its own shape
ROW_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "document_lengths")
LARGEST_FLASH_HEAD = 256  # FlashAttention 2's limit on the head dimension
# Settings of a model whose attention is not causal softmax(q k / scale) v, which is all that the kernels here compute.
UNPLAIN = {
    "attn_logit_softcapping": "soft-capped attention logits",
    "attention_chunk_size": "chunked attention",
    "use_bidirectional_attention": "bidirectional attention",
    "index_topk": "sparse attention",
}


# ---------------------------------------------------------------- the row


def example_labels(example: dict) -> list[int]:
    """Labels of one example: its `labels`, or its ids where `completion_mask` is 1, or all of its ids."""
    if example.get("labels") is not None:
        return list(example["labels"])
    ids = example["input_ids"]
    mask = example.get("completion_mask")
    return list(ids) if mask is None else [i if m else IGNORE for i, m in zip(ids, mask, strict=True)]


def row_tensors(documents: Sequence[dict]) -> dict:
    """One packed row of `documents` (dicts with input_ids and labels or completion_mask).

    Returns input_ids, labels, position_ids (1, tokens), cu_seq_lens_q and _k (documents + 1) int32, max_length_q and
    _k, document_lengths.
    """
    import numpy
    import torch

    lengths = [len(d["input_ids"]) for d in documents]
    ids = [i for d in documents for i in d["input_ids"]]
    labels = [x for d in documents for x in [IGNORE, *example_labels(d)[1:]]]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.from_numpy(numpy.array([ids])),  # a fifth of torch.tensor's time
        "labels": torch.from_numpy(numpy.array([labels])),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "document_lengths": tuple(lengths),
    }


def common_length(sequences: Sequence[Sequence[Any]]) -> int:
    """How many leading tokens (or letters) all sequences have in common."""
    low, high = min(sequences, key=list), max(sequences, key=list)  # the two that differ first, in dictionary order
    shorter = min(len(low), len(high))
    return next((index for index in range(shorter) if low[index] != high[index]), shorter)


def shareable(documents: Sequence[dict], trained_prefix: bool = False) -> int:
    """Length of the prefix worth sharing: common to all and, unless `trained_prefix`, before anything is trained.

    One token short of what is common, since every suffix repeats the last common token.
    """
    if len(documents) < 2:
        return 0
    common = common_length([d["input_ids"] for d in documents]) - 1
    if not trained_prefix:
        for d in documents:
            trained = next((t for t, label in enumerate(d["labels"]) if label != IGNORE and t > 0), len(d["labels"]))
            common = min(common, trained - 1)
    return common if common >= MIN_PREFIX else 0


def shared_tensors(documents: Sequence[dict], prefix: int) -> dict:
    """One row of `prefix` common tokens and the suffix of every document.

    Documents are dicts with input_ids and labels. Every suffix keeps the last common token as its first, so that what
    follows it is predicted inside the suffix; labels of the prefix are the first document's and must be equal in all.
    Returns input_ids, labels, position_ids (1, tokens), document_lengths (the prefix first), prefix_length and
    suffix_index (suffixes, longest): the place of each suffix's tokens in the row, padded with 0.
    """
    import torch

    suffixes = [d["input_ids"][prefix:] for d in documents]
    lengths = [len(s) for s in suffixes]
    ids = [*documents[0]["input_ids"][:prefix], *(i for s in suffixes for i in s)]
    labels = [IGNORE, *documents[0]["labels"][1:prefix]]
    for number, document in enumerate(documents):
        own = list(document["labels"][prefix:])
        if number:
            own[0] = IGNORE  # the first document's suffix carries the target of the prefix's last token
        labels += own
    index = torch.zeros(len(suffixes), max(lengths), dtype=torch.long)
    start = prefix
    for number, n in enumerate(lengths):
        index[number, :n] = torch.arange(start, start + n)
        start += n
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in lengths)])[None],
        "document_lengths": (prefix, *lengths),
        "prefix_length": prefix,
        "suffix_index": index,
    }


def loss_positions(labels: Any) -> Any:
    """Flat indices of the positions whose next label is trained: the only ones that the output head has to look at."""
    from torch.nn.functional import pad

    return pad(labels[..., 1:] != IGNORE, (0, 1)).reshape(-1).nonzero().reshape(-1)


# ---------------------------------------------------------------- which attention


@dataclass(frozen=True)
class Choice:
    """An attention implementation, why it was taken, and whether rows may be packed with it."""

    name: str
    reason: str
    packed: bool


def choose(capability: tuple[int, int] | None = None, config: Any = None, dtype: str = "auto") -> Choice:
    """The fastest attention that keeps documents apart on this GPU.

    capability: CUDA compute capability such as (8, 0); None means no GPU. config: a transformers config, read for
    head size and unusual attention. dtype: "float32" rules FlashAttention out, which is 16-bit only, and so does
    TUNEBOOK_ATTENTION=sdpa in the environment: what a GPU without it does can be played on one that has it.
    """
    text = config and config.get_text_config()
    unplain = [name for setting, name in UNPLAIN.items() if getattr(text, setting, None)]
    if unplain:
        return Choice("eager", f"{text.model_type} has {unplain[0]}, which packed attention does not compute", False)
    register()
    if why := unpackable(config):
        kind = model_class(config)
        name = "eager" if not kind._supports_sdpa else SDPA if kind._supports_attention_backend else "sdpa"
        return Choice(name, f"{why}; rows are padded", False)
    if capability is None:
        return Choice(SDPA, "no GPU: one exact attention call per document", True)
    said = f"compute capability {capability[0]}.{capability[1]}"
    if tuple(capability) < (8, 0):
        why = f"{said} is below 8.0, which variable-length FlashAttention needs: one attention call per document"
    elif os.environ.get("TUNEBOOK_ATTENTION") == "sdpa":
        why = "TUNEBOOK_ATTENTION is sdpa: one attention call per document"
    elif dtype == "float32":
        why = "FlashAttention has no float32 kernel: one attention call per document"
    elif text is not None and head_dim(text) > LARGEST_FLASH_HEAD:
        why = f"head size {head_dim(text)} is over FlashAttention's {LARGEST_FLASH_HEAD}"
    elif _varlen() is None:
        why = "this PyTorch has no torch.nn.attention.varlen (2.11 to 2.13 do)"
    else:
        return Choice(FLASH, f"{said}: PyTorch's variable-length FlashAttention", True)
    return Choice(SDPA, why, True)


def register() -> str:
    """Make the three names known to transformers, and return `SHARED`. Calling it again changes nothing."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for name, function in ((FLASH, packed_varlen), (SDPA, packed_sdpa), (SHARED, shared_prefix)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask_unless_packed)
    return SHARED


# ---------------------------------------------------------------- the attention


def visible(queries: Any, keys: Any, window: int | None = None) -> Any:
    """Which keys a query sees, by position: (…, queries) and (…, keys) → bool (…, queries, keys).

    window: of a sliding-window layer, the query itself counted, as transformers does; None or 0 for no window.
    """
    age = queries[..., :, None] - keys[..., None, :]
    return (age >= 0) & (age < window) if window else age >= 0


def causal_sdpa(query: Any, key: Any, value: Any, window: int | None = None, **options: Any) -> Any:
    """Causal attention of one document, (…, heads, tokens, head) each; a mask only where the window cuts something."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    tokens = query.shape[-2]
    if not window or tokens <= window:
        return scaled_dot_product_attention(query, key, value, is_causal=tokens > 1, **options)
    places = torch.arange(tokens, device=query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=visible(places, places, window), **options)


def mask_unless_packed(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    """No mask for a packed row (or plain causal prefill), transformers' sdpa mask for everything padded or cached."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def packed_varlen(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **row):
    """query (1, heads, tokens, head), key and value (1, kv_heads, tokens, head) → (1, tokens, heads, head), None.

    row: cu_seq_lens_q and max_length_q of `row_tensors`.
    """
    if row.get("cu_seq_lens_q") is None:
        return _unpacked(module, query, key, value, attention_mask, dropout, scaling, sliding_window, **row)
    if dropout:
        raise TunebookError(
            f"The model asks for attention dropout {dropout}, which variable-length FlashAttention does not do; set "
            "attention_dropout to 0 in its config."
        )
    batch, heads, tokens, head = query.shape
    query, key, value = (t.transpose(1, 2).reshape(batch * tokens, t.shape[1], head) for t in (query, key, value))
    attend, named = _varlen()
    left = -1 if not sliding_window else sliding_window - 1  # the token itself counts in transformers' window
    options: dict[str, Any] = {"scale": scaling, "window_size": (left, 0)}
    if "enable_gqa" in named:  # 2.11 takes grouped heads without being told
        options["enable_gqa"] = heads != key.shape[1]
    if value.dtype != query.dtype:  # float32 rotary tables promote queries and keys
        query, key = query.to(value.dtype), key.to(value.dtype)
    ends, longest = row["cu_seq_lens_q"], row["max_length_q"]
    return attend(query, key, value, ends, ends, longest, longest, **options).view(batch, tokens, heads, head), None


def packed_sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **row):
    """The same as `packed_varlen`, one document at a time: Σ length² work, no (tokens, tokens) mask."""
    import torch

    lengths = row.get("document_lengths")
    if lengths is None and row.get("cu_seq_lens_q") is None:
        return _unpacked(module, query, key, value, attention_mask, dropout, scaling, sliding_window, **row)
    lengths = row["cu_seq_lens_q"].diff().tolist() if lengths is None else list(lengths)
    parts = zip(*(t.split(lengths, dim=2) for t in (query, *repeat_heads(query, key, value))), strict=True)
    outs = [causal_sdpa(q, k, v, sliding_window, dropout_p=dropout, scale=scaling) for q, k, v in parts]
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def shared_prefix(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **row):
    """query (1, heads, tokens, head), key and value (1, kv_heads, tokens, head) → (1, tokens, heads, head), None.

    row: prefix_length and suffix_index of `shared_tensors`; without them this is `packed_sdpa`.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if not row.get("prefix_length"):
        return packed_sdpa(module, query, key, value, attention_mask, dropout, scaling, sliding_window, **row)
    prefix, index = row["prefix_length"], row["suffix_index"]
    key, value = repeat_heads(query, key, value)
    common_query, common_key, common_value = (t[:, :, :prefix] for t in (query, key, value))
    first = causal_sdpa(common_query, common_key, common_value, sliding_window, dropout_p=dropout, scale=scaling)

    def with_prefix(tensor: Any, common: Any) -> Any:  # (suffixes, heads, prefix + longest, head)
        return torch.cat([common.expand(len(index), -1, -1, -1), tensor[0][:, index].transpose(0, 1)], dim=2)

    places = torch.arange(prefix + index.shape[1], device=query.device)
    later = scaled_dot_product_attention(
        query[0][:, index].transpose(0, 1),
        with_prefix(key, common_key),
        with_prefix(value, common_value),
        attn_mask=visible(places[prefix:], places, sliding_window)[None, None],
        dropout_p=dropout,
        scale=scaling,
    )
    later = later.transpose(1, 2)[index > 0]  # (tokens of all suffixes, heads, head), in the row's order
    return torch.cat([first[0].transpose(0, 1), later])[None].contiguous(), None


def _unpacked(module, query, key, value, mask, dropout, scaling, window, **row):
    """Padded rows, and plain rows without a mask, whose window nobody else would see to."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is None and window and query.shape[2] == key.shape[2] > window:
        out = causal_sdpa(query, *repeat_heads(query, key, value), window, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    rest = {k: v for k, v in row.items() if k not in ROW_KEYS}
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **rest)


def repeat_heads(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    """Keys and values with as many heads as the queries, which CPU and sm75 kernels want."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


@lru_cache(maxsize=1)
def _varlen() -> Any:
    """PyTorch's function and the names it takes: `enable_gqa` from 2.12."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)
