"""Fused training arithmetic for a loaded model: LoRA layers, norms and activations, and the head's loss.

`apply` changes the instance, not the class or the library, and names what it did. Every piece computes what it
replaces; where a layer asks for more than the fused form does (DoRA, several adapters), its own form stays.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from helpers import compat
from helpers.model import chunked_loss, fp8
from helpers.model.four_bit import PackedLinear


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ without PEFT's separate scaling, casting and adding of wide tensors.

    The low-rank products accumulate into the matrix product's own output (`addmm_`). On an H200 with 16k tokens the
    elementwise kernels this removes were 12 % of a step. A and B may stay fp32: they are cast here, and their
    gradients come back in their own type. W is dense, a bitsandbytes 4-bit weight, unpacked once
    each way, or FP8 codes, of which `state` is the scales.
    """

    @staticmethod
    def forward(ctx, x, weight, state, bias, a, b, scale, compute, dropout):
        flat = x.reshape(-1, x.shape[-1]).to(compute)
        in_fp8 = torch.is_tensor(state)
        dense = weight if in_fp8 else _dense(weight, state, compute)
        whole = flat.new_empty((*x.shape[:-1], dense.shape[0]))  # not a view: some models add to it in place
        y = whole.view(-1, dense.shape[0])
        if in_fp8:
            fp8.forward(flat, weight, state, y)
            if bias is not None:
                y.add_(bias)
        elif bias is None:
            torch.mm(flat, dense.t(), out=y)
        else:
            torch.addmm(bias.to(compute), flat, dense.t(), out=y)
        low_a, low_b = a.to(compute), (b * scale).to(compute)
        dropped, kept = torch.native_dropout(flat, dropout, True) if dropout else (flat, None)
        hidden = dropped @ low_a.t()
        y.addmm_(hidden, low_b.t())
        ctx.save_for_backward(flat, weight, hidden, low_a, low_b, kept)
        ctx.dropout = dropout
        ctx.state, ctx.scale, ctx.x_shape, ctx.x_dtype = state, scale, x.shape, x.dtype
        ctx.types = a.dtype, b.dtype
        return whole

    @staticmethod
    def backward(ctx, grad):
        flat, weight, hidden, low_a, low_b, kept = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).to(flat.dtype)
        narrow = grad @ low_b  # already carries the scale
        grad_a = (narrow.t() @ _dropped(flat, kept, ctx.dropout)).to(ctx.types[0])
        grad_b = (grad.t() @ hidden).to(ctx.types[1]).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if torch.is_tensor(ctx.state):
                grad_x = fp8.backward(grad, weight, ctx.state)
            else:
                grad_x = grad @ _dense(weight, ctx.state, flat.dtype)
            if kept is None:
                grad_x.addmm_(narrow, low_a)
            else:
                grad_x.add_(_dropped(narrow @ low_a, kept, ctx.dropout))
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        return grad_x, None, None, None, grad_a, grad_b, None, None, None


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


def _lora_forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of one PEFT LoRA layer; its own when this call is anything but one plain active adapter in training."""
    name = "" if args or kwargs or not torch.is_grad_enabled() else compat.plain_adapter(self)
    if not name:
        return self._own_forward(x, *args, **kwargs)
    base, device = self.get_base_layer(), x.device.type
    own = base if isinstance(base, PackedLinear) else getattr(base.weight, "quant_state", None)
    state = getattr(base, "fp8_scale", own)
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        compute = torch.get_autocast_dtype(device)
    else:
        compute = (getattr(base, "compute_dtype", None) or x.dtype) if state is not None else base.weight.dtype
    dropout = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
    down, up = self.lora_A[name].weight, self.lora_B[name].weight
    with torch.autocast(device, enabled=False):
        y = _LoraLinear.apply(x, base.weight, state, base.bias, down, up, self.scaling[name], compute, dropout)
    return y if autocast else y.to(x.dtype)


def fuse_lora(model: Any) -> int:
    """Give every plain or 4-bit LoRA linear layer the fused forward; returns how many."""
    layers = [layer for _, layer in compat.lora_linears(model) if getattr(layer, "_own_forward", None) is None]
    for layer in layers:
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
