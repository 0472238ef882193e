"""4-bit linear layers of which each process holds its rows (FSDP2), the same bytes that one process would pack.

bitsandbytes keeps a packed weight as one column and its scales beside it, where FSDP2 does not look. Here both are
parameters with a row for each row of the matrix, so that they are gathered with their layer and unpacked after that.
Only the scales' own scales, 4 bytes for 16,384 weights, are whole in every process.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from helpers.errors import TunebookError
from helpers.model.weights import AGAIN, Weights, reading

BLOCK = 64  # weights to a scale
NESTED = 256  # scales to a scale of their own


class PackedLinear(torch.nn.Linear):
    """A frozen linear layer in NF4; nested: its scales have 8 bits.

    The bytes are viewed as the 16-bit type that the job computes in: FSDP2 before PyTorch 2.13 casts any other one.
    """

    kept: Any = None  # bitsandbytes' QuantState without the scales, once its rows are read

    def __init__(self, like: torch.nn.Linear, dtype: torch.dtype, nested: bool) -> None:
        super().__init__(like.in_features, like.out_features, bias=False, device="meta")
        self.bias, self.compute_dtype, self.nested = like.bias, dtype, nested
        self.blocks = like.in_features // BLOCK
        carrier = torch.uint8 if dtype == torch.float32 else dtype
        for name, width in (("weight", BLOCK // 2 * self.blocks), ("scales", self.blocks * (1 if nested else 4))):
            empty = torch.empty(like.out_features, -(-width // carrier.itemsize), dtype=carrier, device="meta")
            self.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))

    @property
    def quant_state(self) -> Any:
        """bitsandbytes' QuantState of the whole matrix, while the layer is gathered."""
        from bitsandbytes.functional import QuantState

        kept, scales = self.kept, self.scales.data.view(torch.uint8)
        scales = scales[:, : self.blocks * (1 if self.nested else 4)].reshape(-1)  # the rest fills the last number
        given = (kept.code, BLOCK, kept.quant_type, kept.dtype, kept.offset, kept.state2)
        shape = (self.out_features, self.in_features)
        return QuantState(scales if self.nested else scales.view(torch.float32), shape, *given)

    def unpacked(self) -> Any:
        """The (out, in) matrix, in the type that it was packed from."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight.data.view(torch.uint8).view(-1, 1), self.quant_state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import matmul_4bit

        packed = self.weight.data.view(torch.uint8).view(-1, 1)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return matmul_4bit(x.to(self.compute_dtype), packed, self.quant_state, bias=bias).to(x.dtype)

    def read(self, held: Weights, source: Any, start: int, stop: int) -> dict[str, torch.Tensor]:
        """weight and scales of rows `start` to `stop`, which are this process's, on its device. source: the rows in 16
        bits, or the name of a packed tensor of `held`. Raises TunebookError for one that is packed in other blocks."""
        device = torch.device(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        if isinstance(source, str):
            packed, scales, self.kept = self._from_file(held, source, start, stop, device)
        else:
            rows = source.to(device, self.compute_dtype)
            packed, scales, self.kept = pack(rows, self.nested, lambda mine: (self._every(mine), start * self.blocks))
        found = {"weight": packed, "scales": scales}
        for name, rows in found.items():
            parameter = getattr(self, name)
            rest = parameter.shape[1] * parameter.dtype.itemsize - rows.shape[1]
            found[name] = torch.nn.functional.pad(rows, (0, rest)).contiguous().view(parameter.dtype)
        return found

    def _from_file(self, held: Weights, name: str, start: int, stop: int, device: torch.device) -> tuple:
        from bitsandbytes.functional import QuantState
        from safetensors import safe_open

        kept = QuantState.from_dict(held.parts(name), device=device)
        if kept.blocksize != BLOCK or (kept.nested and kept.state2.blocksize != NESTED):
            raise TunebookError(f"{name} in {held.base} has blocks of {kept.blocksize} weights, not {BLOCK}.")
        with reading("The model", held.base, AGAIN), safe_open(held.entries[name].file, "pt") as file:
            packed = file.get_tensor(name).contiguous().view(torch.uint8).view(self.out_features, -1)[start:stop]
        scales = kept.absmax.view(torch.uint8).view(self.out_features, -1)[start:stop].clone()
        kept.absmax = None
        return packed.to(device, copy=True), scales, kept

    def _every(self, mine: torch.Tensor) -> torch.Tensor:
        """The scales of all processes from this one's, (out × in / 64,); FSDP2 cuts as torch.chunk does."""
        import torch.distributed as dist

        room = math.ceil(self.out_features / dist.get_world_size()) * self.blocks
        mine = torch.nn.functional.pad(mine, (0, room - len(mine)))
        whole = mine.new_empty(room * dist.get_world_size())
        dist.all_gather_into_tensor(whole, mine)
        return whole[: self.out_features * self.blocks]


def pack(rows: torch.Tensor, nested: bool, every: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(packed rows and their scales, (rows, bytes) each; bitsandbytes' QuantState without them) of rows of a matrix.

    every: these rows' scales → (those of all rows, where these begin): what is subtracted from scales in 8 bits, and
    their own scales, are of the whole matrix (bitsandbytes.functional.quantize_4bit).
    """
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    count, blocks = len(rows), rows.shape[1] // BLOCK
    some = rows if count else rows.new_zeros(1, BLOCK)  # a kernel takes no empty matrix
    packed, state = quantize_4bit(some, blocksize=BLOCK, quant_type="nf4")
    packed, scales = packed.view(torch.uint8).view(-1)[: rows.numel() // 2], state.absmax[: count * blocks]
    if nested:
        whole, first = every(scales)
        state.offset = whole.mean()
        whole, state.state2 = quantize_blockwise(whole - state.offset, blocksize=NESTED)
        scales = whole[first : first + len(scales)]
    state.absmax, shape = None, (count, blocks * scales.itemsize)
    return packed.view(count, BLOCK // 2 * blocks), scales.contiguous().view(torch.uint8).view(shape), state


def swap(model: Any, held: Weights, names: dict[str, str], dtype: torch.dtype, double_quant: bool) -> None:
    """Put a PackedLinear in the place of each layer of `model` (without storage) that is packed in the files, or that
    bitsandbytes would pack. names: parameter → tensor in `held`. TunebookError for a row without whole blocks."""
    packed = [key.removesuffix(".weight") for key, name in names.items() if name in held.states]
    for layer in packed or layers(model):
        module, name = model.get_submodule(layer), names.get(f"{layer}.weight", "")
        parts, inputs = held.states.get(name, {}), getattr(module, "in_features", 1)
        if inputs % BLOCK or "SCB" in parts:
            raise TunebookError(
                f"The 4-bit weights of {layer} cannot be shared out over GPUs: that takes rows of whole blocks of "
                f"{BLOCK} weights; set method to 'lora' and name a 16-bit base, or use a GPU with more memory."
            )
        nested = "nested_absmax" in parts if parts else double_quant
        model.set_submodule(layer, PackedLinear(module, dtype, nested))


def layers(model: Any) -> list[str]:
    """The linear layers that transformers would hand to bitsandbytes: not the head, what is tied, or stays in fp32."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    kinds, every = (torch.nn.Linear, Conv1D), model.named_modules()
    return [name for name, module in every if type(module) in kinds and should_convert_module(name, kept)]
