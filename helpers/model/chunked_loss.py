"""Cross-entropy and token log-probabilities straight from hidden states: whole logits are never held.

With a vocabulary of 128,256 the logits of 16,384 tokens are 4 GB in bf16 and their gradient as much again. Here the
output head is applied to a slice of tokens at a time; on CUDA through liger-kernel's Triton kernels, elsewhere in plain
PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from helpers import compat
from helpers.errors import TunebookError
from helpers.model.packed_attention import IGNORE

SLICE = 16384  # tokens handed to liger at once: it cuts them by vocabulary/hidden into logits as large as the slice
CHUNK = 1024  # tokens of logits held at once without liger: 200 MB in fp32 at a vocabulary of 49,152
# Final-logit arithmetic of some families: (setting, power of it that logits are multiplied with; 0: a cap).
SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "final_logit_softcapping": 0}

_waits = [True]  # whether what waits for the GPU may be used


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """Inside, a head waits for nothing that the GPU computes, as a CUDA graph has to: liger-kernel's counts targets."""
    _waits.append(False)
    try:
        yield
    finally:
        _waits.pop()


class _ChunkedHead(torch.autograd.Function):
    """logps[i] = log softmax(hidden[i] · weightᵀ)[target[i]], 0 where ignored; logits are recomputed going back."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, target: Any) -> Any:
        logps = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for rows in _chunks(hidden):
            logits = (hidden[rows] @ weight.t()).float()
            logps[rows] = -torch.nn.functional.cross_entropy(
                logits, target[rows], reduction="none", ignore_index=IGNORE
            )
        ctx.save_for_backward(hidden, weight, target)
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        hidden, weight, target = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden: Any = torch.zeros_like(hidden) if need_hidden else None
        grad_weight: Any = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        for rows in _chunks(hidden):
            probabilities = (hidden[rows] @ weight.t()).float().softmax(-1)
            scale = grad[rows] * (target[rows] != IGNORE)
            back = probabilities.mul_(-scale[:, None])
            back.scatter_add_(1, target[rows].clamp(min=0)[:, None], scale[:, None])
            back = back.to(hidden.dtype)
            if need_hidden:
                grad_hidden[rows] = back @ weight
            if need_weight:
                grad_weight += (back.t() @ hidden[rows]).float()
        return grad_hidden, grad_weight.to(weight.dtype) if need_weight else None, None


def _chunks(hidden: Any) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, len(hidden), CHUNK)]


def token_logps(hidden: Any, weight: Any, target: Any) -> Any:
    """Log-probability of each target token, differentiable: float32 (tokens,), 0 where the target is -100.

    hidden (tokens, size), weight (vocab, size), target (tokens,).
    """
    loss = compat.liger_cross_entropy() if hidden.is_cuda and _waits[-1] else None
    if loss is None:
        return _ChunkedHead.apply(hidden, weight, target)
    pairs = zip(hidden.split(SLICE), target.split(SLICE), strict=True)
    return -torch.cat([loss(h, weight, t, IGNORE, "none") for h, t in pairs])


def summed_loss(hidden: Any, weight: Any, target: Any) -> Any:
    """Σ −log p(target) over the targets that are not -100, float32 scalar, same shapes as `token_logps`."""
    loss = compat.liger_cross_entropy() if hidden.is_cuda else None
    if loss is None:
        return -_ChunkedHead.apply(hidden, weight, target).sum()
    pairs = zip(hidden.split(SLICE), target.split(SLICE), strict=True)
    return torch.stack([loss(h, weight, t, IGNORE, "sum").float() for h, t in pairs]).sum()


def shifted(labels: Any) -> Any:
    """targets[..., t] = labels[..., t + 1]; the last predicts nothing. Same shape as labels."""
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], IGNORE)], dim=-1)


def can_fuse(model: Any) -> str:
    """Empty when the model's head is a plain matrix product, else what it does besides."""
    config = model.config.get_text_config()
    for name in SCALES:
        if getattr(config, name, None) not in (None, 0, 1, 1.0):
            return f"{config.model_type} applies {name} to its logits"
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return f"the output head is {type(head).__name__}, not a plain linear layer"
    return ""


def logits_of(model: Any, hidden: Any) -> Any:
    """Logits (tokens, vocab) in fp32 of hidden states (tokens, size), scaled and soft-capped as the model's own are."""
    return scaled(model, model.get_output_embeddings()(hidden).float())


def scaled(model: Any, logits: Any) -> Any:
    """What a head gives in fp32, as the model's own final logits."""
    config = model.config.get_text_config()
    for name, power in SCALES.items():
        if power and getattr(config, name, None):
            logits = logits * getattr(config, name) ** power
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def body_of(model: Any) -> Any:
    """The model without its head; the text class of Llama 4 names a part that it has not."""
    return getattr(model, model.base_model_prefix, None) or model.model


def _agrees(model: Any, run: Any = None) -> bool:
    """Whether the model's own logits are the head of the last hidden states, scaled and capped by `SCALES`: families
    differ in more ways. run: the wrapper that has to be called, where weights are whole only within it."""
    run, seen = run or model, dict[str, Any]()
    ids, training = torch.arange(8, device=model.get_input_embeddings().weight.device)[None], model.training
    body, head = body_of(model), model.get_output_embeddings()
    hooks = [
        body.register_forward_hook(lambda _, given, found: seen.update(states=found[0])),
        head.register_forward_hook(lambda _, given, found: seen.update(given=given[0], found=found)),
    ]
    model.eval()
    try:
        with torch.no_grad():
            own = run(input_ids=ids, use_cache=False).logits.float()
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if {"states", "given"} - seen.keys() or seen["given"].shape != seen["states"].shape:
        return False
    ours = scaled(model, seen["found"].float())
    pairs = ((own, ours), (seen["states"].float(), seen["given"].float()))
    return own.shape == ours.shape and all(bool((a - b).norm() <= 0.02 * a.norm()) for a, b in pairs)


def prove(model: Any) -> str:
    """As `install` does, afterwards: of a sharded model, whose wrapper is called. Returns what it changed, or ""."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    if causal._loss_head == "own" or _agrees(causal, model):
        return ""
    head, causal._loss_head = causal.get_output_embeddings(), "own"
    head.forward = getattr(head, "_own_forward", head.forward)
    return "; its head makes logits in a way of its own, so that they are whole"


@dataclass
class LogpsOutput(ModelOutput):
    """logps (batch, tokens) float32: log-probability of the next label at each position, 0 where masked.

    router: Σ over the documents of their tokens times their load-balancing loss, where it was asked for."""

    logps: Any = None
    router: Any = None


def install(model: Any, prove: bool = True) -> str:
    """Give a causal LM (not its PEFT wrapper) a forward whose loss holds no whole logits; returns how, for people.

    With `labels`: `.loss` is Σ −log p / `num_items_in_batch` (or the mean over trained tokens), `.logits` None. With
    `token_logps=True` too: `.logps` (batch, tokens) float32, logps[:, t] = log p(labels[:, t + 1]); no loss.
    `loss_positions` (from the collator) names the positions that predict something, so that prompts skip the head.
    Without labels (generation, evaluation of logits) the model's own forward runs. prove: compare the head's
    arithmetic with the model's own first; one that differs keeps its own, with whole logits.
    """
    if getattr(model, "_own_forward", None) is not None:
        return "cross-entropy as before"
    why = can_fuse(model)
    model._loss_head = "own" if prove and not _agrees(model) else "sliced" if why else "plain"

    @functools.wraps(type(model).forward)  # libraries read which arguments a model takes
    def forward(self: Any, input_ids: Any = None, labels: Any = None, **given: Any) -> Any:
        if labels is None:
            return self._own_forward(input_ids=input_ids, **given)
        return _with_labels(self, labels, input_ids=input_ids, **given)

    replaced = [(model, forward)] + [(model.get_output_embeddings(), _head)] * (model._loss_head == "plain")
    for module, fused in replaced:
        module._own_forward = module.forward
        module.forward = types.MethodType(fused, module)
    if model._loss_head == "own":
        return f"cross-entropy of whole logits: those of {model.config.model_type} are made in a way of their own"
    return f"cross-entropy of {CHUNK:,} tokens at a time: {why}" if why else "cross-entropy without whole logits"


def _head(self: Any, hidden: Any, target: Any = None, summed: bool = False) -> Any:
    """Logits or, for given targets, what `token_logps` and `summed_loss` return. Called as a module, so that its hooks
    run: a weight that is sharded over several GPUs is whole only between them."""
    if target is None:
        return self._own_forward(hidden)
    return (summed_loss if summed else token_logps)(hidden.to(self.weight.dtype), self.weight, target)


def _logps(model: Any, flat: Any, goal: Any, summed: bool) -> Any:
    """Log-probabilities of the targets, float32 (tokens,), or their negative sum; flat: hidden states, or logits."""
    if model._loss_head == "plain":
        with torch.autocast(flat.device.type, enabled=False):
            return model.get_output_embeddings()(flat, goal, summed=summed)
    from torch.utils.checkpoint import checkpoint

    def piece(part: Any, target: Any) -> Any:
        logits = part.float() if model._loss_head == "own" else logits_of(model, part)
        return -torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=IGNORE)

    pieces = zip(flat.split(CHUNK), goal.split(CHUNK), strict=True)
    logps = torch.cat([checkpoint(piece, part, target, use_reentrant=False) for part, target in pieces])
    return -logps.sum() if summed else logps


def _with_labels(
    model: Any,
    labels: Any,
    token_logps: bool = False,
    loss_positions: Any = None,
    num_items_in_batch: Any = None,
    router: bool = False,
    **given: Any,
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    for name in ("return_dict", "output_hidden_states", "output_attentions", "logits_to_keep"):
        given.pop(name, None)
    body = model._own_forward if model._loss_head == "own" else body_of(model)
    found = body(**{**given, "use_cache": False}, **({"output_router_logits": True} if router else {}))
    states = found.logits if model._loss_head == "own" else found[0]
    target = shifted(labels)
    flat, goal = states.reshape(-1, states.shape[-1]), target.reshape(-1)
    if loss_positions is not None:
        flat, goal = (t.index_select(0, loss_positions) for t in (flat, goal))
    if token_logps:
        logps = _logps(model, flat, goal, False)
        if loss_positions is not None:
            everywhere = torch.zeros(target.numel(), dtype=torch.float32, device=flat.device)
            logps = everywhere.index_copy(0, loss_positions, logps)
        balance = balance_of(model.config.get_text_config(), found, given) if router else None
        return LogpsOutput(logps=logps.view_as(target), router=balance)
    total = _logps(model, flat, goal, True)
    count = num_items_in_batch if num_items_in_batch is not None else (goal != IGNORE).sum().clamp(min=1)
    return CausalLMOutputWithPast(loss=total / count)


def balance_of(config: Any, found: Any, row: dict[str, Any]) -> Any:
    """Σ over a row's documents of tokens × load-balancing loss (Switch, arXiv:2101.03961, eq. 4, over all layers).

    Each document by itself, so that the sum is the same however documents are cut into rows.
    """
    layers, count = getattr(found, "router_logits", None), getattr(config, "num_experts_per_tok", None)
    if not layers or not count:
        raise TunebookError(
            f"router_aux_loss needs the router's logits, which {config.model_type} does not give; set it to 0."
        )
    logits = torch.stack([layer.reshape(-1, layer.shape[-1]) for layer in layers]).float()  # (layers, tokens, experts)
    chances, experts, mask = logits.softmax(-1), logits.shape[-1], row.get("attention_mask")
    chosen = torch.zeros_like(chances).scatter_(-1, chances.topk(count, dim=-1).indices, 1.0)
    seen = (torch.ones(logits.shape[1], device=logits.device) if mask is None else mask.reshape(-1).float())[:, None]
    lengths = row.get("document_lengths") or ([logits.shape[1]] if mask is None else [mask.shape[1]] * len(mask))
    routed, chance, tokens = (per_document(v * seen, lengths) for v in (chosen.mean(0), chances.mean(0), seen))
    if row.get("prefix_length"):  # each document begins with what all of them share
        routed, chance, tokens = (v[1:] + v[:1] for v in (routed, chance, tokens))
    return (experts * (routed * chance).sum(1) / tokens.clamp(min=1)).sum()


def per_document(values: Any, document_lengths: Any) -> Any:
    """Sums of `values` over each document of a packed row: (1, tokens) → (documents,), (tokens, n) → (documents, n)."""
    lengths = torch.as_tensor(document_lengths, device=values.device)
    places = torch.arange(len(lengths), device=values.device)
    values = values if len(values) == sum(document_lengths) else values.t()
    index = torch.repeat_interleave(places, lengths, output_size=len(values))
    sums = torch.zeros(len(lengths), values.shape[1], dtype=values.dtype, device=values.device)
    return sums.index_add(0, index, values).squeeze(1)
