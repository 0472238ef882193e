"""Fused training arithmetic for a loaded model: LoRA layers, norms and activations, and the head's loss.

`apply` changes the instance, not the class or the library, and names what it did. Every piece computes what it
replaces; where a layer asks for more than the fused form does (dropout, DoRA, several adapters), its own form stays.
"""

from __future__ import annotations

import types

import torch

from helpers.model import chunked_loss


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ without PEFT's separate scaling, casting and adding of wide tensors.

    The low-rank products accumulate into the matrix product's own output (`addmm_`). On an H200 with 16k tokens the
    elementwise kernels this removes were 12 % of a step. A and B may stay fp32: they are cast here, and their
    gradients come back in their own type. W is dense or a bitsandbytes 4-bit weight, unpacked once each way.
    """

    @staticmethod
    def forward(ctx, x, weight, state, bias, a, b, scale, compute):
        flat = x.reshape(-1, x.shape[-1]).to(compute)
        dense = _dense(weight, state, compute)
        y = torch.addmm(bias.to(compute), flat, dense.t()) if bias is not None else flat @ dense.t()
        low_a, low_b = a.to(compute), (b * scale).to(compute)
        hidden = flat @ low_a.t()
        y.addmm_(hidden, low_b.t())
        ctx.save_for_backward(flat, weight, hidden, low_a, low_b)
        ctx.state, ctx.scale, ctx.x_shape, ctx.x_dtype = state, scale, x.shape, x.dtype
        ctx.types = a.dtype, b.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        flat, weight, hidden, low_a, low_b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).to(flat.dtype)
        narrow = grad @ low_b  # already carries the scale
        grad_a = (narrow.t() @ flat).to(ctx.types[0])
        grad_b = (grad.t() @ hidden).to(ctx.types[1]).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _dense(weight, ctx.state, flat.dtype)
            grad_x.addmm_(narrow, low_a)
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        return grad_x, None, None, None, grad_a, grad_b, None, None


def _dense(weight, state, dtype):
    """The (out, in) matrix of a dense or 4-bit weight in `dtype`."""
    if state is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data.view(-1, 1), state).to(dtype)


def _lora_forward(self, x, *args, **kwargs):
    """Forward of one PEFT LoRA layer; its own when this call is anything but one plain active adapter."""
    active = [name for name in self.active_adapters if name in self.lora_A]
    if (
        args
        or kwargs
        or len(active) != 1
        or self.disable_adapters
        or self.merged
        or active[0] in self.lora_variant
        or not torch.is_grad_enabled()
    ):
        return self._own_forward(x, *args, **kwargs)
    name = active[0]
    drop = self.lora_dropout[name]
    down, up = self.lora_A[name], self.lora_B[name]
    base = self.get_base_layer()
    if (getattr(drop, "p", 0.0) and self.training) or up.bias is not None or base.weight.requires_grad:
        return self._own_forward(x, *args, **kwargs)
    state = getattr(base.weight, "quant_state", None)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
    else:
        compute = (getattr(base, "compute_dtype", None) or x.dtype) if state is not None else base.weight.dtype
    autocast = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False):
        y = _LoraLinear.apply(x, base.weight, state, base.bias, down.weight, up.weight, self.scaling[name], compute)
    return y if autocast else y.to(x.dtype)


def fuse_lora(model) -> int:
    """Give every plain or 4-bit LoRA linear layer the fused forward; returns how many."""
    from peft.tuners.lora import Linear

    kinds = [Linear]
    try:
        from peft.tuners.lora.bnb import Linear4bit

        kinds.append(Linear4bit)
    except ImportError:  # bitsandbytes is not installed: no 4-bit layers either
        pass
    count = 0
    for module in model.modules():
        if (
            type(module) in kinds
            and getattr(module, "_own_forward", None) is None
            and not getattr(module, "fan_in_fan_out", False)
        ):
            if module.lora_variant or isinstance(module.get_base_layer(), torch.nn.Embedding):
                continue
            module._own_forward = module.forward
            module.forward = types.MethodType(_lora_forward, module)
            count += 1
    return count


def keep_layout(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a CPU's AVX512-BF16 in the first evaluation.

    The repacked bytes mean something else to training, and unpacking rounds the block scales again.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def fuse_kernels(model) -> str:
    """liger-kernel's RMSNorm, rotary embedding and activation for this model; returns what was applied or why not."""
    if not next(model.parameters()).is_cuda:
        return ""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return "liger kernels left out: liger-kernel is not installed"
    import inspect

    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if patch is None:
        return f"liger kernels left out: none for {model.config.model_type}"
    wanted = {
        "rope": True,
        "rms_norm": True,
        "swiglu": True,
        "geglu": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
        "model": model,
    }
    known = inspect.signature(patch).parameters
    patch(**{k: v for k, v in wanted.items() if k in known})
    return "liger RMSNorm, rotary embedding and activation"


def apply(model, *, fused_loss: bool = True, fused_lora: bool = True, kernels: bool = True) -> list[str]:
    """Fuse what can be fused in `model` (a causal LM or its PEFT wrapper). Call it after the adapter is added.

    Returns sentences for the manifest, among them what was left out and why.
    """
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    keep_layout(model)
    done = []
    if kernels:
        done.append(fuse_kernels(causal))
    if fused_lora and hasattr(model, "peft_config"):
        count = fuse_lora(model)
        done.append(f"fused LoRA arithmetic in {count} layers" if count else "")
    if fused_loss:
        why = chunked_loss.can_fuse(causal)
        if not why:
            chunked_loss.install(causal)
        done.append(f"fused cross-entropy left out: {why}" if why else "cross-entropy without whole logits")
    return [line for line in done if line]
