"""What the layers of a model are, told from its config before any weight is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from helpers.model.loading import auto_class, load_config, quantizer
from helpers.model.weights import Weights, reading

# Layers that carry a state from token to token, in transformers' words: over a document's end too, in a packed row.
STATES = ("linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent")
KINDS = ("full_attention", "sliding_attention", "attention", "moe", "mlp", "dense", "sparse")  # those that do not

ROUTER = re.compile(r"\.(gate|router|shared_expert_gate)(\.|$)")


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


def linear_layers(model: Any) -> list[str]:
    """What "all-linear" adapts, as the shortest names that say it: every linear layer of the language model but the
    output head, routers, and what a Mamba layer's fused kernel reads past an adapter (all but its `in_proj`)."""
    from transformers.pytorch_utils import Conv1D

    head, modules = model.get_output_embeddings(), dict(model.get_decoder().named_modules())
    kept, others = [], set()
    for name, module in modules.items():
        parts, parent = name.split("."), modules.get(name.rpartition(".")[0])
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        fused = hasattr(parent, "A_log") and hasattr(parent, "D") and parts[-1] != "in_proj"
        linear = "Linear" in type(module).__name__ or isinstance(module, Conv1D)
        if linear and not (fused or module is head or ROUTER.search(f".{name}")):
            kept.append(tails)
        else:
            others.update(tails)
    return sorted({next(tail for tail in tails if tail not in others) for tails in kept})


def experts(model: Any) -> list[str]:
    """Names of the parameters that hold the experts of a mixture, one matrix for each: PEFT targets them by name."""
    import torch

    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    layers = ((n, m) for n, m in model.get_decoder().named_modules() if not isinstance(m, convolutions))
    found = [f"{n}.{p}" for n, m in layers for p, w in m.named_parameters(recurse=False) if w.dim() == 3]
    return sorted({".".join(name.split(".")[-3:]) for name in found})


class Shape:
    """What the causal LM that `config` describes is made of, counted on an instance without storage (about a second at
    8B). linears: (name, inputs, outputs) of every linear layer inside the layers; stored: bytes of the files of a base
    that is quantised as it comes; others: parameters."""

    def __init__(self, config: Any, stored: int = 0) -> None:
        known = f"models of type {config.model_type} are not known here: take another."
        with reading("The model", Path(config.name_or_path), known):
            self._count(config, stored)

    def _count(self, config: Any, stored: int) -> None:
        import torch
        from transformers.pytorch_utils import Conv1D

        self.stored = stored
        text = config.get_text_config()
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.name = getattr(config, "_name_or_path", "") or text.model_type
        self.hidden, self.layers, self.vocab = text.hidden_size, text.num_hidden_layers, text.vocab_size
        self.heads = text.num_attention_heads
        head_size = head_dim(text)
        self.query = self.heads * head_size
        self.key = (getattr(text, "num_key_value_heads", None) or self.heads) * head_size
        widths = getattr(text, "intermediate_size", None) or 4 * self.hidden
        self.intermediate = max(widths) if isinstance(widths, list) else widths
        kinds = (torch.nn.Linear, Conv1D)
        modules = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) and m is not head]
        self.linears = [(name, *m.weight.shape[:: 1 if isinstance(m, Conv1D) else -1]) for name, m in modules]
        tied = head is None or head.weight is embedding.weight
        self.embedding, self.head = embedding.weight.numel(), 0 if tied else head.weight.numel()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.linear_parameters = sum(i * o for _, i, o in self.linears)
        self.other = self.parameters - self.linear_parameters - self.embedding - self.head


def shape_of(source: Any) -> Shape:
    """The shape of a ModelSource, a model folder or a config; a base that is quantised as it comes has its files'."""
    config = load_config(source)
    return Shape(config, Weights(Path(getattr(source, "path", source))).stored_bytes if quantizer(config) else 0)
