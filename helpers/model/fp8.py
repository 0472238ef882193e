"""A frozen base in 8-bit floats (e4m3), a scale for each row of a weight, for the FP8 products of a GPU.

y = x Wᵀ takes x and W as rows of codes with a scale each. Going back, g W needs W turned, with a scale for each of its
columns; W's scales lie along the sum there, so they go into g before it is quantised, and the turned codes need none:
both passes see the same weights, and one copy of them is kept. Turning it once a pass moves two bytes a weight.
Activations and gradients are quantised as they come, with a scale for each token, in training alone: evaluation takes
16-bit activations, as the merged model does. Row-wise recipe as in torchao's float8 training; format: arXiv:2209.05433.
On a CPU the same quantised numbers are multiplied in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from helpers import compat, machine
from helpers.errors import TunebookError
from helpers.model import loading, weights
from helpers.model.layer_kinds import decoder, linear_layers

E4M3, LARGEST, LEAST = torch.float8_e4m3fn, 448.0, 1e-30
MULTIPLE = 16  # of both sizes of a matrix that FP8 products take

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU, or none with Triton: plain PyTorch does the same
    triton = None


class Fp8Linear(torch.nn.Linear):
    """A frozen linear layer: codes (out, in), held as bytes so that no cast of the model's floats touches them, and
    `fp8_scale` (out), fp32."""

    fp8_scale: Any
    rounds = True  # its activations; see `unrounded`

    @classmethod
    def of(cls, linear: Any, device: Any) -> Fp8Linear:
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        codes, scale = quantize(linear.weight.data.to(device))
        made.weight = torch.nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        made.register_buffer("fp8_scale", scale)
        made.bias = linear.bias
        return made.train(linear.training)

    def forward(self, x: Any) -> Any:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            x = x.to(dtype)
            if self.training and self.rounds:
                y = _Product.apply(x, self.weight, self.fp8_scale)
            else:
                y = (torch.nn.functional.linear(x, self.weight.view(E4M3).to(dtype)) * self.fp8_scale).to(dtype)
            return y if self.bias is None else y + self.bias.to(dtype)


@contextlib.contextmanager
def unrounded() -> Iterator[None]:
    """Layers in training multiply activations as they come. Rounded, two passes a last bit of bf16 apart drift by all
    of FP8's error: 39 % through 32 random layers, 7 % unrounded."""
    Fp8Linear.rounds = False
    try:
        yield
    finally:
        Fp8Linear.rounds = True


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        y = x.new_empty(*x.shape[:-1], len(weight))  # not a view: some models add to it in place
        forward(x.reshape(-1, x.shape[-1]), weight, scale, y.view(-1, len(weight)))
        return y

    @staticmethod
    def backward(ctx, grad):
        return backward(grad.reshape(-1, grad.shape[-1]), *ctx.saved_tensors).view(*grad.shape[:-1], -1), None, None


def forward(x: Any, weight: Any, scale: Any, out: Any) -> None:
    """x (tokens, in) times the layer's weight into `out` (tokens, out)."""
    _multiply(_rows(x), weight.view(E4M3), scale, out)


def backward(grad: Any, weight: Any, scale: Any) -> Any:
    """grad (tokens, out) times the layer's weight: (tokens, in)."""
    codes = turned(weight.view(E4M3))
    return _multiply(_rows(grad, scale), codes, scale.new_ones(len(codes)), grad.new_empty(len(grad), len(codes)))


def _multiply(rows: tuple[Any, Any], codes: Any, scale: Any, out: Any) -> Any:
    if not out.is_cuda:
        return out.copy_(dense(*rows) @ dense(codes, scale).t())
    if out.dtype != torch.bfloat16:
        return out.copy_(compat.fp8_product(*rows, codes, scale, None))
    return compat.fp8_product(*rows, codes, scale, out)


def dense(codes: Any, scale: Any) -> Any:
    """The fp32 matrix that codes and scales stand for."""
    return codes.view(E4M3).float() * scale[:, None]


def quantize(x: Any, factor: Any = None) -> tuple[Any, Any]:
    """(e4m3 codes of `x` · factor, the fp32 scale of each row), the same on every device. x: (rows, columns); factor:
    (columns)."""
    wide = x.float() if factor is None else x.float() * factor
    scale = wide.abs().amax(1).clamp_min(LEAST) / LARGEST
    return (wide / scale[:, None]).to(E4M3), scale


def load(source: Any, quantize: str, double_quant: bool = True, device: str = "", **how: Any) -> Any:
    """As `loading.load_model`, and with quantize "fp8" its `layers` in FP8; `in_fp8` says how many are and are not. On
    a GPU without room for the 16 bits they are read into host memory, and go over layer by layer."""
    if quantize != "fp8":
        return loading.load_model(source, quantize, double_quant, device=device, **how)
    files = weights.shards(Path(getattr(source, "path", source)))
    large = sum(file.stat().st_size for file in files) / 2**30 > 0.9 * (machine.free_gpu_gib() or 0)
    model = loading.load_model(source, device="cpu" if large else device, **how)
    gpu = torch.cuda.is_available() and device != "cpu"
    convert(model, torch.device("cuda" if gpu else "cpu"))
    if gpu:
        torch.cuda.empty_cache()
    return model


def layers(model: Any) -> tuple[dict[str, Any], list[str]]:
    """(name → module of the layers that FP8 takes, names of those that stay) of what "all-linear" adapts in a causal
    LM: embeddings, head, norms, routers and experts are no part of it. FP8 products take sizes of n · MULTIPLE."""
    inside = {id(module) for module in decoder(model).modules()}
    ends = tuple(f".{name}" for name in linear_layers(model))
    found = {n: m for n, m in model.named_modules() if id(m) in inside and f".{n}".endswith(ends)}
    fit = {n: type(m) is torch.nn.Linear and not any(s % MULTIPLE for s in m.weight.shape) for n, m in found.items()}
    return {n: m for n, m in found.items() if fit[n]}, [n for n in found if not fit[n]]


def convert(model: Any, device: Any) -> None:
    """Put a causal LM's `layers` into FP8, one by one, and all of it on `device`. TunebookError where none can be."""
    taken, kept = layers(model)
    if not taken:
        raise TunebookError(
            f"FP8 takes none of the {len(kept)} linear layers of this model ({', '.join(kept[:2])}): they are of "
            f"another kind, or their sizes are no multiples of {MULTIPLE}; set quantize to 'none'."
        )
    stay = f" and {len(kept)} in 16 bits, which FP8 products do not take ({kept[0]})" if kept else ""
    model.in_fp8 = f"base in FP8, row-wise scales: {len(taken)} linear layers{stay}"
    for name in list(taken):  # each layer's 16 bits go as its codes come
        model.set_submodule(name, Fp8Linear.of(taken.pop(name), device))
    if model.device.type != device.type:
        model.to(device)


# ---------------------------------------------------------------- kernels

if triton is not None:

    @triton.jit
    def _quantize_kernel(x, factor, codes, scales, columns, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = at < columns
        values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
        if FACTOR:
            values *= tl.load(factor + at, mask=inside, other=0.0)
        scale = tl.maximum(tl.max(tl.abs(values), 0), 1e-30) / 448.0
        tl.store(codes + row * columns + at, (values / scale).to(tl.float8e4nv), mask=inside)
        tl.store(scales + row, scale)

    @triton.jit
    def _turn_kernel(codes, out, rows, columns, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tile = tl.load(codes + row[:, None] * columns + column[None, :], mask=inside, other=0)
        tl.store(out + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))


def _rows(x: Any, factor: Any = None) -> tuple[Any, Any]:
    """`quantize` in one kernel, where there is Triton; its division is rounded otherwise in the last place."""
    if triton is None or not x.is_cuda:
        return quantize(x, factor)
    x = x.contiguous()
    codes, scale = torch.empty_like(x, dtype=E4M3), x.new_empty(len(x), dtype=torch.float32)
    block = triton.next_power_of_2(x.shape[1])
    warps = min(max(block // 1024, 1), 16)
    _quantize_kernel[(len(x),)](x, factor, codes, scale, x.shape[1], factor is not None, block, num_warps=warps)
    return codes, scale


def turned(codes: Any) -> Any:
    """codes (rows, columns) as (columns, rows), in that order in memory."""
    given = codes.view(torch.uint8)
    if triton is None or not codes.is_cuda:
        return given.t().contiguous().view(E4M3)
    out = given.new_empty(given.shape[::-1])
    grid = [triton.cdiv(size, 128) for size in given.shape]
    _turn_kernel[tuple(grid)](given, out, *given.shape, 128, num_warps=8)
    return out.view(E4M3)
