"""Fused training arithmetic for a loaded model: LoRA layers, norms and activations, and the head's loss.

`apply` changes the instance, not the class or the library, and names what it did. Every piece computes what it
replaces; where a layer asks for more than the fused form does (DoRA, several adapters), its own form stays.
"""

from __future__ import annotations

import types
from collections import defaultdict
from typing import Any

import torch

from helpers import compat
from helpers.model import chunked_loss, fp8
from helpers.model.four_bit import PackedLinear

# Layers of one parent that read the same numbers.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


class _LoraLinears(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ of layers that read the same x, all A in one product each way, without PEFT's
    separate scaling, casting and adding of wide tensors.

    The low-rank products accumulate into the matrix product's own output (`addmm_`). On an H200 with 16k tokens the
    elementwise kernels this removes were 12 % of a step. A and B may stay fp32: they are cast here, and their gradients
    come back in their own type. W is dense, 4-bit, unpacked once each way, or FP8 codes, whose state is the scales.
    """

    @staticmethod
    def forward(ctx, x, bases, scale, compute, dropout, *tensors):
        weights, a, b = (tensors[i : i + len(bases)] for i in range(0, len(tensors), len(bases)))
        flat = x.reshape(-1, x.shape[-1]).to(compute)
        low_a, low_b = (torch.cat(low) if len(low) > 1 else low[0] for low in (a, b))
        low_a = low_a.to(compute)
        low_b = torch.mul(low_b, scale, out=torch.empty_like(low_b, dtype=compute))
        dropped, kept = torch.native_dropout(flat, dropout, True) if dropout else (flat, None)
        hidden, sizes = dropped @ low_a.t(), [len(up) for up in b]
        made, thin = [], hidden.split(len(a[0]), 1)
        for (state, bias), weight, up, part in zip(bases, weights, low_b.split(sizes), thin, strict=True):
            made.append(flat.new_empty((*x.shape[:-1], len(up))))  # not a view: some models add to it in place
            y = made[-1].view(-1, len(up))
            if torch.is_tensor(state):
                fp8.forward(flat, weight, state, y)
                if bias is not None:
                    y.add_(bias)
            elif bias is None:
                torch.mm(flat, _dense(weight, state, compute).t(), out=y)
            else:
                torch.addmm(bias.to(compute), flat, _dense(weight, state, compute).t(), out=y)
            y.addmm_(part, up.t())
        ctx.save_for_backward(flat, hidden, low_a, low_b, kept, *weights)
        ctx.set_materialize_grads(False)
        ctx.dropout, ctx.scale, ctx.bases, ctx.sizes = dropout, scale, bases, sizes
        ctx.x_shape, ctx.x_dtype, ctx.types = x.shape, x.dtype, (a[0].dtype, b[0].dtype)
        return tuple(made)

    @staticmethod
    def backward(ctx, *grads):
        flat, hidden, low_a, low_b, kept, *weights = ctx.saved_tensors
        rank, grad_x = hidden.shape[1] // len(grads), None
        narrow, grad_b = torch.empty_like(hidden), torch.empty_like(low_b)
        parts = (narrow.split(rank, 1), hidden.split(rank, 1), low_b.split(ctx.sizes), grad_b.split(ctx.sizes))
        for grad, (state, _), weight, to_a, thin, up, to_b in zip(grads, ctx.bases, weights, *parts, strict=True):
            if grad is None:  # nobody asked for this layer's output
                to_a.zero_()
                continue
            grad = grad.reshape(-1, grad.shape[-1]).to(flat.dtype)
            torch.mm(grad, up, out=to_a)  # already carries the scale
            torch.mm(grad.t(), thin, out=to_b)
            if ctx.needs_input_grad[0] and torch.is_tensor(state):
                own = fp8.backward(grad, weight, state)
                grad_x = own if grad_x is None else grad_x.add_(own)
            elif ctx.needs_input_grad[0]:
                dense = _dense(weight, state, flat.dtype)
                grad_x = grad @ dense if grad_x is None else grad_x.addmm_(grad, dense)
        if grad_x is not None:
            if kept is None:
                grad_x.addmm_(narrow, low_a)
            else:
                grad_x.add_(_dropped(narrow @ low_a, kept, ctx.dropout))
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        grad_a = (narrow.t() @ _dropped(flat, kept, ctx.dropout)).to(ctx.types[0]).split(rank)
        grad_b = grad_b.to(ctx.types[1]).mul_(ctx.scale).split(ctx.sizes)
        low = [None if grads[i % len(grads)] is None else one for i, one in enumerate((*grad_a, *grad_b))]
        return grad_x, None, None, None, None, *(None for _ in weights), *low


def _dropped(x: Any, kept: Any, dropout: float) -> Any:
    """`x` without what was dropped; only the mask is held for the backward pass, a byte a number."""
    return x if kept is None else x * kept * (1 / (1 - dropout))


def _dense(weight: Any, state: Any, dtype: Any) -> Any:
    """The (out, in) matrix of a dense or 4-bit weight in `dtype`; state: None, bitsandbytes', or the sharded layer."""
    if state is None:
        return weight.to(dtype)
    if isinstance(state, PackedLinear):
        return state.unpacked().to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data.view(-1, 1), state).to(dtype)


class _Group:
    """LoRA layers that read the same numbers: the first that a model calls computes all of them, and what it `made` of
    `x` waits for the others, who are given the same tensor."""

    def __init__(self) -> None:
        self.layers, self.x, self.made = list[Any](), None, dict[Any, Any]()

    def beside(self, layer: Any, name: str) -> list[Any]:
        """The layer and those that one product serves with it."""

        def kind(one: Any) -> Any:
            if compat.plain_adapter(one) != name or getattr(one.lora_dropout[name], "p", None):
                return one
            return one.scaling[name], one.lora_A[name].weight.shape, one.get_base_layer().weight.dtype

        others = [one for one in self.layers if one is not layer]
        return [layer, *others] if others and {kind(layer)} == set(map(kind, others)) else [layer]


def _lora_forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of one PEFT LoRA layer; its own when this call is anything but one plain active adapter in training."""
    group, device = self._group, x.device.type
    expected, same, known = self in group.made, group.x is x, group.made.pop(self, None)
    group.x = group.x if group.made else None
    if expected and same:
        return known
    name = "" if args or kwargs or not torch.is_grad_enabled() else compat.plain_adapter(self)
    if not name:
        return self._own_forward(x, *args, **kwargs)
    layers = [self] if expected else group.beside(self, name)  # one that reads something else is computed alone
    bases = [layer.get_base_layer() for layer in layers]
    states = [_state(base) for base in bases]
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        compute = torch.get_autocast_dtype(device)
    else:
        own = getattr(bases[0], "compute_dtype", None) or x.dtype
        compute = bases[0].weight.dtype if states[0] is None else own
    dropout = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
    low = [side[name].weight for kind in ("lora_A", "lora_B") for side in (getattr(layer, kind) for layer in layers)]
    given = tuple(zip(states, (base.bias for base in bases), strict=True)), self.scaling[name], compute, dropout
    with torch.autocast(device, enabled=False):
        made = _LoraLinears.apply(x, *given, *(base.weight for base in bases), *low)
    made = made if autocast else [y.to(x.dtype) for y in made]
    if len(layers) > 1:
        group.x, group.made = x, dict(zip(layers[1:], made[1:], strict=True))
    return made[0]


def _state(base: Any) -> Any:
    """What unpacks a layer's weight: FP8's scales, bitsandbytes' state, the sharded layer itself; None: it is dense."""
    own = base if isinstance(base, PackedLinear) else getattr(base.weight, "quant_state", None)
    return getattr(base, "fp8_scale", own)


def fuse_lora(model: Any) -> int:
    """Give every plain or 4-bit LoRA linear layer the fused forward; returns how many."""
    groups = defaultdict[Any, _Group](_Group)
    layers = [(n, layer) for n, layer in compat.lora_linears(model) if getattr(layer, "_own_forward", None) is None]
    for name, layer in layers:
        parent, _, own = name.rpartition(".")
        layer._group = groups[parent, next((names for names in TOGETHER if own in names), own)]
        layer._group.layers.append(layer)
        layer._own_forward = layer.forward
        layer.forward = types.MethodType(_lora_forward, layer)
    return len(layers)


def apply(model: Any, *, fused_loss: bool = True, fused_lora: bool = True, prove: bool = True) -> list[str]:
    """Fuse what can be fused in `model` (a causal LM or its PEFT wrapper). Call it after the adapter is added.

    prove: compare the head's loss with the model's own now. Returns notes for the manifest, among them what was left
    out and why.
    """
    peft = hasattr(model, "peft_config")
    causal = model.get_base_model() if peft else model
    compat.keep_four_bit_layout(model)
    done = []
    weight = next(causal.parameters())
    if weight.is_cuda or (weight.is_meta and torch.cuda.is_available()):
        done.append(compat.liger_kernels(causal))
    if fused_lora and peft and (count := fuse_lora(model)):
        done.append(f"fused LoRA arithmetic in {count} layers")
    if fused_loss:
        done.append(chunked_loss.install(causal, prove))
    return done
