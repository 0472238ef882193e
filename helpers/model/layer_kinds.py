"""What the layers of a model are, told from its config before any weight is loaded."""

from __future__ import annotations

from typing import Any

from helpers.model.loading import auto_class

# Layers that carry a state from token to token, in transformers' words: over a document's end too, in a packed row.
STATES = ("linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent")
KINDS = ("full_attention", "sliding_attention", "attention", "moe", "mlp", "dense", "sparse")  # those that do not


def unpackable(config: Any) -> str:
    """Why documents of a row would reach each other in the model of a transformers config; "" where attention alone
    leads from token to token, and takes the boundaries."""
    if config is None:
        return ""
    text = config.get_text_config()
    lists = (getattr(text, name, None) for name in ("layer_types", "layers_block_type", "block_types"))
    kinds: list[str] = next(filter(None, lists), [])
    if states := [kind for kind in kinds if kind in STATES]:
        return f"{len(states)} of {len(kinds)} layers of {text.model_type} ({states[0]}) carry a state along the row"
    if other := next((kind for kind in kinds if kind not in KINDS), ""):
        return f"{text.model_type} has layers of {other}, which packed attention does not compute"
    if not model_class(config)._supports_attention_backend:
        return f"{text.model_type} takes no boundaries of documents"
    return ""


def model_class(config: Any) -> Any:
    """The transformers class of a config's causal language model."""
    return auto_class(config)._model_mapping[type(config)]


def head_dim(config: Any) -> int:
    """Size of one attention head of a transformers text config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
