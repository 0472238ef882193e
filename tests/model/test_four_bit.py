"""4-bit weights packed by rows: the bytes, and the products, of bitsandbytes' own."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

from helpers.errors import TunebookError
from helpers.model import four_bit
from helpers.model.weights import Weights


def matrix(rows, columns, dtype):
    torch.manual_seed(rows)
    return (torch.randn(rows, columns) * 0.05).to(dtype)


def in_parts(whole, nested, dtype, cuts):
    """The layer put together from what the owners of some rows each read."""
    plain = torch.nn.Linear(whole.shape[1], whole.shape[0], bias=False)
    layer = four_bit.PackedLinear(plain, dtype, nested)
    layer._every = lambda mine: quantize_4bit(whole, blocksize=64, quant_type="nf4")[1].absmax
    found = [layer.read(None, whole[a:b], a, b) for a, b in cuts]
    for name in ("weight", "scales"):
        setattr(layer, name, torch.nn.Parameter(torch.cat([one[name] for one in found]), requires_grad=False))
    return layer


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "columns", "cuts"), [(96, 576, [(0, 48), (48, 96)]), (5, 128, [(0, 2), (2, 4), (4, 5), (5, 5)])]
)
def test_rows_packed_apart_are_the_bytes_of_the_matrix_packed_at_once(rows, columns, cuts, dtype, nested):
    whole = matrix(rows, columns, dtype)
    layer = in_parts(whole, nested, dtype, cuts)
    packed, state = quantize_4bit(whole, blocksize=64, quant_type="nf4", compress_statistics=nested)
    assert torch.equal(layer.weight.data.view(torch.uint8).view(-1), packed.view(-1))
    assert torch.equal(layer.quant_state.absmax, state.absmax) and layer.quant_state.shape == state.shape
    assert torch.equal(layer.unpacked(), dequantize_4bit(packed, state)) and layer.unpacked().dtype == dtype
    x = matrix(3, columns, dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert torch.allclose(y.float(), x.float() @ layer.unpacked().float().T, atol=0.02) and x.grad is not None


def test_packed_files_are_read_by_rows_and_other_blocks_are_refused(tmp_path):
    whole = matrix(8, 128, torch.bfloat16)
    for blocksize in (64, 128):
        packed, state = quantize_4bit(whole, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
        folder = tmp_path / str(blocksize)
        folder.mkdir()
        parts = {f"w.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        save_file({"w.weight": packed, **parts}, folder / "model.safetensors")
        layer = four_bit.PackedLinear(torch.nn.Linear(128, 8, bias=False), torch.bfloat16, True)
        if blocksize == 128:
            with pytest.raises(TunebookError, match="blocks of 128 weights"):
                layer.read(Weights(folder), "w.weight", 0, 4)
            return
        found = [layer.read(Weights(folder), "w.weight", a, a + 4) for a in (0, 4)]
        for name in ("weight", "scales"):
            setattr(layer, name, torch.nn.Parameter(torch.cat([one[name] for one in found]), requires_grad=False))
        assert torch.equal(layer.unpacked(), dequantize_4bit(packed, state))
