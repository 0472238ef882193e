"""Cross-entropy and token log-probabilities straight from hidden states: whole logits are never held.

With a vocabulary of 128,256 the logits of 16,384 tokens are 4 GB in bf16 and their gradient as much again. Here the
output head is applied to a slice of tokens at a time; on CUDA through liger-kernel's Triton kernels, elsewhere in plain
PyTorch.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from helpers import compat
from helpers.model.packed_attention import IGNORE

SLICE = 16384  # tokens handed to liger at once: it cuts them by vocabulary/hidden into logits as large as the slice
CHUNK = 1024  # tokens of logits held at once without liger: 200 MB in fp32 at a vocabulary of 49,152
# Final-logit arithmetic that a plain matrix product and softmax would leave out.
UNPLAIN_HEADS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class _ChunkedHead(torch.autograd.Function):
    """logps[i] = log softmax(hidden[i] · weightᵀ)[target[i]], 0 where ignored; logits are recomputed going back."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, target: Any) -> Any:
        logps = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for rows in torch.arange(hidden.shape[0], device=hidden.device).split(CHUNK):
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
        for rows in torch.arange(hidden.shape[0], device=hidden.device).split(CHUNK):
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


def token_logps(hidden: Any, weight: Any, target: Any) -> Any:
    """Log-probability of each target token, differentiable: float32 (tokens,), 0 where the target is -100.

    hidden (tokens, size), weight (vocab, size), target (tokens,).
    """
    loss = compat.liger_cross_entropy() if hidden.is_cuda else None
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
    """Empty when the model's head is a plain matrix product, else why its own loss has to be kept."""
    config = model.config.get_text_config()
    for name in UNPLAIN_HEADS:
        if getattr(config, name, None) not in (None, 0, 1, 1.0):
            return f"{config.model_type} applies {name} to its logits"
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return f"the output head is {type(head).__name__}, not a plain linear layer"
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        return f"{config.model_type} is a mixture of experts and adds a router loss"
    return ""


@dataclass
class LogpsOutput(ModelOutput):
    """logps (batch, tokens) float32: log-probability of the next label at each position, 0 where masked."""

    logps: Any = None


def install(model: Any) -> None:
    """Give a causal LM (not its PEFT wrapper) a forward whose loss holds no logits.

    With `labels`: `.loss` is Σ −log p / `num_items_in_batch` (or the mean over trained tokens), `.logits` None. With
    `token_logps=True` too: `.logps` (batch, tokens) float32, logps[:, t] = log p(labels[:, t + 1]); no loss.
    `loss_positions` (from the collator) names the positions that predict something, so that prompts skip the head.
    Without labels (generation, evaluation of logits) the model's own forward runs.
    """
    if getattr(model, "_own_forward", None) is not None:
        return

    @functools.wraps(type(model).forward)  # libraries read which arguments a model takes
    def forward(self: Any, input_ids: Any = None, labels: Any = None, **given: Any) -> Any:
        if labels is None:
            return self._own_forward(input_ids=input_ids, **given)
        return _with_labels(self, labels, input_ids=input_ids, **given)

    head = model.get_output_embeddings()
    for module, fused in ((model, forward), (head, _head)):
        module._own_forward = module.forward
        module.forward = types.MethodType(fused, module)


def _head(self: Any, hidden: Any, target: Any = None, summed: bool = False) -> Any:
    """Logits or, for given targets, what `token_logps` and `summed_loss` return. Called as a module, so that its hooks
    run: a weight that is sharded over several GPUs is whole only between them."""
    if target is None:
        return self._own_forward(hidden)
    return (summed_loss if summed else token_logps)(hidden.to(self.weight.dtype), self.weight, target)


def _with_labels(
    model: Any,
    labels: Any,
    token_logps: bool = False,
    loss_positions: Any = None,
    num_items_in_batch: Any = None,
    **given: Any,
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    for name in ("return_dict", "output_hidden_states", "output_attentions", "logits_to_keep"):
        given.pop(name, None)
    hidden = getattr(model, model.base_model_prefix)(**{**given, "use_cache": False})[0]
    target = shifted(labels)
    head = model.get_output_embeddings()
    flat, goal = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    if loss_positions is not None:
        flat, goal = flat[loss_positions], goal[loss_positions]
    with torch.autocast(flat.device.type, enabled=False):
        if token_logps:
            logps = head(flat, goal)
            if loss_positions is not None:
                everywhere = torch.zeros(target.numel(), dtype=torch.float32, device=flat.device)
                logps = everywhere.index_copy(0, loss_positions, logps)
            return LogpsOutput(logps=logps.view_as(target))
        total = head(flat, goal, summed=True)
        count = num_items_in_batch if num_items_in_batch is not None else (goal != IGNORE).sum().clamp(min=1)
        return CausalLMOutputWithPast(loss=total / count)


def per_document(values: Any, document_lengths: Any) -> Any:
    """Sums of `values` (1, tokens) over each document of a packed row → (documents,)."""
    lengths = torch.as_tensor(document_lengths, device=values.device)
    places = torch.arange(len(lengths), device=values.device)
    index = torch.repeat_interleave(places, lengths, output_size=values.numel())
    return torch.zeros(len(lengths), dtype=values.dtype, device=values.device).index_add(0, index, values.reshape(-1))
