"""Attention that keeps packed examples apart, on every card.

A packed row is one long row of several examples ("documents"). No token may look into another document, and a dense
block mask would cost the square of the row. Two exact ways are registered with transformers instead, under names that
`attn_implementation` takes:

`packed_varlen`  PyTorch's own variable-length FlashAttention (compute capability 8.0 and newer, 16-bit)
`packed_sdpa`   one `scaled_dot_product_attention` call per document (T4, CPU, float32); no mask either

The collator says where documents end (`cu_seq_lens_q`, `document_lengths`). Without those, both names do what "sdpa"
does, mask and all, so padded batches and `generate()` work with a model loaded for packing.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache

from helpers.errors import TunebookError

FLASH = "packed_varlen"  # the word "flash" in the name would make transformers look for a kernel package
SDPA = "packed_sdpa"
LARGEST_FLASH_HEAD = 256  # FlashAttention 2's limit on the head dimension
# Settings of a model whose attention is not plain softmax(q k / scale) v, so neither kernel computes it.
UNPLAIN = {"attn_logit_softcapping": "soft-capped attention logits", "attention_chunk_size": "chunked attention"}


@dataclass(frozen=True)
class Choice:
    """An attention implementation, why it was taken, and whether rows may be packed with it."""

    name: str
    reason: str
    packed: bool


def choose(capability: tuple[int, int] | None = None, config=None, dtype: str = "auto") -> Choice:
    """The fastest attention that keeps documents apart on this card.

    capability: CUDA compute capability such as (8, 0); None means no GPU. config: a transformers config, read for
    head size and unusual attention. dtype: "float32" rules FlashAttention out, which is 16-bit only.
    """
    text = getattr(config, "get_text_config", lambda: config)() if config is not None else None
    if text is not None:
        for setting, name in UNPLAIN.items():
            if getattr(text, setting, None):
                return Choice("eager", f"{text.model_type} has {name}, which packed attention does not compute", False)
        if text.model_type == "gpt_oss":
            return Choice("eager", "gpt_oss has attention sinks, which packed attention does not compute", False)
    register()
    if capability is None:
        return Choice(SDPA, "no GPU: one exact attention call per document", True)
    if tuple(capability) < (8, 0):
        return Choice(
            SDPA,
            f"compute capability {capability[0]}.{capability[1]} is below 8.0, "
            "which variable-length FlashAttention needs: one attention call per document",
            True,
        )
    if dtype == "float32":
        return Choice(SDPA, "FlashAttention has no float32 kernel: one attention call per document", True)
    if text is not None and head_dim(text) > LARGEST_FLASH_HEAD:
        return Choice(SDPA, f"head size {head_dim(text)} is over FlashAttention's {LARGEST_FLASH_HEAD}", True)
    if _varlen() is None:
        return Choice(SDPA, "this PyTorch has no torch.nn.attention.varlen (2.11 to 2.13 do)", True)
    return Choice(
        FLASH, f"compute capability {capability[0]}.{capability[1]}: PyTorch's variable-length FlashAttention", True
    )


def head_dim(config) -> int:
    """Size of one attention head of a transformers text config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def register() -> None:
    """Make both names known to transformers. Calling it again changes nothing."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(FLASH, packed_varlen)
    AttentionInterface.register(SDPA, packed_sdpa)
    for name in (FLASH, SDPA):
        AttentionMaskInterface.register(name, mask_unless_packed)


def mask_unless_packed(*args, attention_mask=None, **kwargs):
    """No mask for a packed row (or plain causal prefill), transformers' sdpa mask for everything padded or cached."""
    from transformers.masking_utils import sdpa_mask

    q_length, kv_length = kwargs.get("q_length"), kwargs.get("kv_length")
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def packed_varlen(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q=None,
    max_length_q: int | None = None,
    **kwargs,
):
    """query (1, heads, tokens, head), key and value (1, kv_heads, tokens, head) → (1, tokens, heads, head), None."""
    if cu_seq_lens_q is None:
        return _unpacked(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise TunebookError(
            f"The model asks for attention dropout {dropout}, which variable-length FlashAttention "
            "does not do; set attention_dropout to 0 in its config."
        )
    batch, heads, tokens, head = query.shape
    query, key, value = (t.transpose(1, 2).reshape(batch * tokens, t.shape[1], head) for t in (query, key, value))
    attend, named = _varlen()
    options = {"scale": scaling}
    left = -1 if not sliding_window else sliding_window - 1  # the token itself counts in transformers' window
    if "window_size" in named:
        options["window_size"] = (left, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in named:  # 2.11 takes grouped heads without being told
        options["enable_gqa"] = heads != key.shape[1]
    if value.dtype != query.dtype:  # float32 rotary tables promote queries and keys
        query, key = query.to(value.dtype), key.to(value.dtype)
    out = attend(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
    return out.view(batch, tokens, heads, head), None


def packed_sdpa(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_lengths=None,
    cu_seq_lens_q=None,
    **kwargs,
):
    """The same as `packed_varlen`, one document at a time: Σ length² work, no (tokens, tokens) mask."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if document_lengths is None and cu_seq_lens_q is None:
        return _unpacked(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if document_lengths is None:
        document_lengths = cu_seq_lens_q.diff().tolist()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # CPU and sm75 kernels want as many key heads as query heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    lengths = list(document_lengths)
    outs = []
    for q, k, v in zip(
        query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
    ):
        n = q.shape[2]
        if sliding_window and n > sliding_window:
            age = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)[None, :]
            band = (age >= 0) & (age < sliding_window)
            outs.append(scaled_dot_product_attention(q, k, v, attn_mask=band, dropout_p=dropout, scale=scaling))
        else:
            outs.append(scaled_dot_product_attention(q, k, v, is_causal=n > 1, dropout_p=dropout, scale=scaling))
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def check_boundaries(model) -> None:
    """Prove on the loaded model that packed documents do not see each other.

    Runs two short documents packed and apart (a few ms) and compares the last hidden states, so a model class that
    drops the boundary arguments on the way is caught before training on leaked text.

    Raises: TunebookError naming the model when the two differ by more than 16-bit rounding explains.
    """
    import torch

    from helpers.train.packing import row_tensors

    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = getattr(body, getattr(body, "base_model_prefix", ""), body)
    device = next(body.parameters()).device
    vocab = body.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in (24, 40)]
    packed = row_tensors([{"input_ids": d, "labels": d} for d in documents])
    packed.pop("labels")
    packed = {k: v.to(device) if torch.is_tensor(v) else v for k, v in packed.items()}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            together = body(**packed, use_cache=False)[0][0, len(documents[0]) :].float()
            alone = body(input_ids=packed["input_ids"][:, len(documents[0]) :], use_cache=False)[0][0].float()
    finally:
        model.train(training)
    error = ((together - alone).norm() / alone.norm()).item()
    if not error < 0.1:  # bf16 kernels of two shapes differ by under 0.02; a leak by more than 0.3
        raise TunebookError(
            f"Packed examples would see each other in {body.config.model_type} (hidden states differ "
            f"by {error:.1%}); set packing to False for this model."
        )


def _unpacked(module, query, key, value, attention_mask, dropout, scaling, **kwargs):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in ("max_length_q", "max_length_k", "cu_seq_lens_k", "document_lengths"):
        kwargs.pop(name, None)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


@lru_cache(maxsize=1)
def _varlen():
    """PyTorch's function and the names it takes: `window_size` from 2.11, `enable_gqa` from 2.12."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)
