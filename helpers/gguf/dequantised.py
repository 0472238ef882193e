"""A quantised file's weights laid over the trained model: what the smaller weights alone cost, without llama.cpp's arithmetic.

The weights are unpacked by the gguf package, which shares no code with llama.cpp's runtime. The converter gives tensors other names and
sometimes (Llama's rotary embedding) another order of rows. Names come from gguf's own table; orders are found by comparing the rows of
the 16-bit file with the model's, so that no architecture needs code of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.gguf import header, importance

if TYPE_CHECKING:
    import numpy as np

PLAIN = ("F32", "F16", "BF16")


class Places:
    """Where the tensors of files quantised from the 16-bit GGUF `source` belong in the model it was converted from.

    model: the transformers model, its weights still the trained ones.
    """

    def __init__(self, model: Any, source: Path):
        summary = header.check(source)
        tensors = {t.name: t for t in summary.tensors if t.type == "F16" and len(t.shape) == 2}
        matrices = {
            n.removesuffix(".weight"): p for n, p in model.named_parameters() if n.endswith(".weight") and p.dim() == 2
        }
        self._found: dict[str, tuple[Any, np.ndarray | None]] = {}
        for layer, name in importance.tensor_names(summary, list(matrices)).items():
            if name in tensors:
                fits, order = _row_order(_raw(source, tensors[name]).view("<u2"), matrices[layer].detach())
                if fits:
                    self._found[name] = (matrices[layer], order)

    def fill(self, file: Path) -> bool:
        """Overwrite the model's weights with those of `file`. False, and nothing done, where some of them have no place in the model."""
        import numpy as np
        import torch
        from gguf import GGMLQuantizationType, dequantize

        packed = [t for t in header.check(file).tensors if t.type not in PLAIN]
        if any(t.name not in self._found for t in packed):
            return False
        for tensor in packed:
            weight, order = self._found[tensor.name]
            values = dequantize(_raw(file, tensor), GGMLQuantizationType[tensor.type])
            if order is not None:
                values = values[order]
            with torch.no_grad():
                weight.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        return True


def _raw(file: Path, tensor: header.Tensor) -> np.ndarray:
    """A matrix's bytes, (rows, bytes a row), memory-mapped."""
    import numpy as np

    rows = tensor.shape[1]
    return np.memmap(file, np.uint8, "r", tensor.offset, (rows, tensor.bytes // rows))


def _row_order(theirs: np.ndarray, weight: Any) -> tuple[bool, np.ndarray | None]:
    """Whether the 16-bit rows are the model's, and the order that makes them the model's (None: they stand in it already).

    theirs: (rows, columns) as 16-bit words; weight: the model's matrix in any precision.
    """
    import numpy as np
    import torch

    mine = weight.to("cpu", torch.float16).contiguous().view(torch.int16).numpy().view("<u2")
    if mine.shape != theirs.shape:
        return False, None
    if np.array_equal(mine, theirs):
        return True, None
    as_rows = [np.ascontiguousarray(m).view(f"V{2 * m.shape[1]}").ravel() for m in (mine, theirs)]
    by_content = [np.argsort(rows) for rows in as_rows]
    if not np.array_equal(as_rows[0][by_content[0]], as_rows[1][by_content[1]]):
        return False, None
    order = np.empty(len(mine), np.int64)
    order[by_content[0]] = by_content[1]
    return True, order
