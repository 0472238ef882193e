"""What the layers of a model are, told from its config before any weight is loaded: kinds, sizes, experts, states."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.model.loading import auto_class, load_config, quantizer
from helpers.model.weights import Weights, reading

# Layers that carry a state from token to token, in transformers' words: over a document's end too, in a packed row.
STATES = ("linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent")
KINDS = ("full_attention", "sliding_attention", "attention", "moe", "mlp", "dense", "sparse")  # those that do not

# How many experts a token goes to, by the names that configs have for it.
ROUTED = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "moe_top_k")
SCANNED = 512  # tokens that a layer with a state is looked at with: more than its chunks have

DROPS = ("moshi", "nemotron")  # of transformers 5.17, those whose attention does not get what a row brings along
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
    kind = model_class(config)
    if kind._supports_attention_backend and not kind._supports_sdpa:
        return f"{text.model_type} has attention of its own (sinks), which packed attention does not compute"
    if not kind._supports_attention_backend or text.model_type in DROPS:
        return f"{text.model_type} takes no boundaries of documents"
    return ""


def model_class(config: Any) -> Any:
    """The transformers class of a config's causal language model."""
    return auto_class(config)._model_mapping[type(config)]


def decoder(model: Any) -> Any:
    """The part of a causal LM that has its layers; a few call their output head the decoder."""
    found = model.get_decoder()
    return model.base_model if found is model.get_output_embeddings() else found


def rope_limit(config: Any) -> int:
    """Tokens of an example above which its whole batch has other rotary frequencies (longrope, dynamic); 0: none."""
    text = config.get_text_config()
    known = getattr(text, "rope_parameters", None) or {}
    both = (one for one in (known, *known.values()) if isinstance(one, dict))
    kinds = [one for one in both if one.get("rope_type") in ("longrope", "dynamic")]
    return min((one.get("original_max_position_embeddings", text.max_position_embeddings) for one in kinds), default=0)


def head_dim(config: Any) -> int:
    """Size of one attention head of a transformers text config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def linear_layers(model: Any) -> list[str]:
    """What "all-linear" adapts, as the shortest names that say it: every linear layer of the language model but the
    output head, routers, weights that several layers share (Zamba 2: two adapters of one could not be merged), and what
    a Mamba layer's fused kernel reads past an adapter (all but its `in_proj`)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head, modules = model.get_output_embeddings(), dict(decoder(model).named_modules())
    weights = Counter(id(module.weight) for module in modules.values() if hasattr(module, "weight"))
    kept, others = [], set()
    for name, module in modules.items():
        parts, parent = name.split("."), modules.get(name.rpartition(".")[0])
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        fused = hasattr(parent, "A_log") and hasattr(parent, "D") and parts[-1] != "in_proj"
        plain = isinstance(module, (torch.nn.Linear, Conv1D)) and weights[id(module.weight)] == 1
        plain &= "Grouped" not in type(module).__name__  # DeepSeek V4's, whose product is another one
        if plain and not (fused or module is head or ROUTER.search(f".{name}")):
            kept.append(tails)
        else:
            others.update(tails)
    return sorted({next(tail for tail in tails if tail not in others) for tails in kept})


def expert_weights(model: Any) -> Iterator[tuple[str, Any]]:
    """(name in the decoder, parameter) of the matrices of a mixture's experts, one stack of them for each."""
    import torch

    others = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    for name, module in decoder(model).named_modules():
        if not isinstance(module, others) and not hasattr(module, "A_log"):  # a Mamba layer's stacks are no experts
            own = module.named_parameters(recurse=False)
            yield from ((f"{name}.{n}", w) for n, w in own if w.dim() == 3 and min(w.shape) > 1)


def experts(model: Any) -> list[str]:
    """Names of the parameters that hold the experts of a mixture: PEFT targets them by name."""
    return sorted({".".join(name.split(".")[-3:]) for name, _ in expert_weights(model)})


class Shape:
    """What the causal LM that `config` describes is made of. linears: (name, inputs, outputs) of every linear layer
    inside the layers, adapted: those of "all-linear"; experts: (count, rows, columns) of every stack of expert
    matrices, of which a token meets the share `routed`; stored: bytes of the files of a base that is quantised as it
    comes; recurrent: layers with a state (Mamba, linear attention, convolution), kept_bytes: what one of them keeps a
    token for its backward pass, scan_bytes: its largest array a token meanwhile; others: parameters."""

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
            model = auto_class(config).from_config(config, dtype=torch.bfloat16)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.name = getattr(config, "_name_or_path", "") or text.model_type
        self.hidden, self.layers, self.vocab = text.hidden_size, text.num_hidden_layers, text.vocab_size
        self.heads = text.num_attention_heads
        self.query = self.heads * head_dim(text)
        self.key = (getattr(text, "num_key_value_heads", None) or self.heads) * head_dim(text)
        kinds = (torch.nn.Linear, Conv1D)
        modules = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) and m is not head]
        self.linears = [(name, *m.weight.shape[:: 1 if isinstance(m, Conv1D) else -1]) for name, m in modules]
        inside, short = {id(m) for m in decoder(model).modules()}, tuple(f".{n}" for n in linear_layers(model))
        names = {name for name, module in modules if id(module) in inside and f".{name}".endswith(short)}
        self.adapted = [linear for linear in self.linears if linear[0] in names]
        tied = head is None or head.weight is embedding.weight
        self.embedding, self.head = embedding.weight.numel(), 0 if tied else head.weight.numel()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.linear_parameters = sum(i * o for _, i, o in self.linears)
        self.other = self.parameters - self.linear_parameters - self.embedding - self.head
        stacks = dict(expert_weights(model))
        self.experts = [tuple(w.shape) for w in stacks.values()]
        self.expert_parameters = sum(w.numel() for w in stacks.values())
        each = max((w.shape[0] for w in stacks.values()), default=1)
        chosen = next((n for n in (getattr(text, name, None) for name in ROUTED) if n), each)
        self.routed = min((max(chosen) if isinstance(chosen, (list, tuple)) else chosen) / each, 1.0)
        self.active = self.parameters - round(self.expert_parameters * (1 - self.routed))
        widths = getattr(text, "intermediate_size", None) or 4 * self.hidden
        routed = [round(w.numel() * self.routed) // self.hidden for n, w in stacks.items() if "down" in n]
        # An MLP keeps three arrays of its width; one of routed experts its input and output for each of them besides.
        self.intermediate = max([*(widths if isinstance(widths, list) else [widths]), *routed])
        if stacks:
            self.intermediate += round(self.routed * each * self.hidden * 2 / 3)
        mixers = [m for m in decoder(model).modules() if any(type(c) is torch.nn.Conv1d for c in m.children())]
        self.recurrent = len(mixers)
        self.kept_bytes, self.scan_bytes = _scanned(mixers[0], self.hidden) if mixers else (0.0, 0.0)

    @property
    def stack(self) -> float:
        """Parameters in the experts of one layer, on average."""
        return self.expert_parameters / self.layers

    def said(self, four_bits: bool) -> list[str]:
        """What a plan says of experts and states."""
        found = []
        if self.experts:
            each = max(count for count, *_ in self.experts)
            sizes = f"{self.parameters / 1e9:.3g} billion parameters, of which a token meets {self.active / 1e9:.3g}"
            said = f"Mixture of experts: {sizes} billion ({round(self.routed * each)} of {each} experts)."
            stay = f" Experts stay in 16 bits ({2 * self.expert_parameters / 2**30:.1f} GiB)"
            found.append(said + f"{stay}: bitsandbytes' loader quantises linear layers alone." * four_bits)
        if self.recurrent:
            kept, passing = (f"{size / 1024:,.0f}" for size in (self.kept_bytes, self.scan_bytes))
            said = (
                f"{self.recurrent} of {self.layers} layers carry a state, and one keeps {kept} KiB a token and passes"
            )
            said += f" through {passing}, as PyTorch computes it; the kernels of mamba-ssm and flash-linear-attention"
            found.append(f"{said} need less.")
        return found


def _scanned(mixer: Any, hidden: int) -> tuple[float, float]:
    """(bytes that a layer with a state keeps for its backward pass, bytes of its largest array), a token, in 16 bits:
    run without storage, in the code that computes it where there are no kernels."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    own = {p.untyped_storage()._cdata for p in mixer.parameters()}
    kept: dict[int, Any] = {}
    largest = 0

    def keep(tensor: Any) -> Any:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            nonlocal largest
            made = operation(*given, **(named or {}))
            stored = [t.untyped_storage() for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
            largest = max([largest, *(s.nbytes() for s in stored if s._cdata not in own)])
            return made

    convolution, *rest = sorted(mixer.children(), key=lambda part: type(part) is not torch.nn.Conv1d)
    width = hidden if any(isinstance(part, torch.nn.Linear) for part in rest) else convolution.in_channels
    given = torch.zeros(1, SCANNED, width, device="meta", dtype=torch.bfloat16, requires_grad=True)
    others = {"position_ids": torch.zeros(1, SCANNED, device="meta"), "attention_mask": None, "past_key_values": None}
    taken = {n: v for n, v in others.items() if n in inspect.signature(mixer.forward).parameters}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Largest(), torch.device("meta"):
        mixer(given, **taken)
    sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own]
    return sum(sizes) / SCANNED, largest / SCANNED


def shape_of(source: Any) -> Shape:
    """The shape of a ModelSource, a model folder or a config; a base that is quantised as it comes has its files'."""
    config = load_config(source)
    return Shape(config, Weights(Path(getattr(source, "path", source))).stored_bytes if quantizer(config) else 0)
