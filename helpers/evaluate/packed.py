"""Linear layers on a CPU with their weights laid out once for the matrix kernels, instead of anew at every call.

PyTorch hands a weight to its matrix library as it lies in memory, and the library rearranges it in every call; with a few dozen
rows that costs as much as a third of the product. Here oneDNN arranges each weight once, as PyTorch's own compiler does for a
frozen model. Measured on one AVX2 core with 64 rows: 31 instead of 22 GFLOPS (1536 x 576), 33 instead of 22 (49152 x 576).
"""

from __future__ import annotations

import functools
from typing import Any

from helpers import machine

ROWS = 64  # what the layout is chosen for; 4 to 1,024 rows run as fast in it
MOST_SHARE = 0.25  # of the free memory that the second copy of the weights may take


class Packed:
    """`with Packed(model):` runs the model's linear layers on rearranged weights, where that is possible; `bool` says whether it is.

    The model's own weights stay as they are, so outside of the block nothing has changed.
    """

    def __init__(self, model: Any):
        self.layers = _arrange(model)

    def __bool__(self) -> bool:
        return bool(self.layers)

    def __enter__(self) -> Packed:
        for layer, weight in self.layers:
            layer.forward = functools.partial(_linear, weight, layer.bias)
        return self

    def __exit__(self, *_: Any) -> None:
        for layer, _weight in self.layers:
            del layer.forward


def _arrange(model: Any) -> list[tuple[Any, Any]]:
    import torch

    from helpers.model.loading import fast_bf16

    layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
    size = sum(m.weight.numel() * m.weight.itemsize for m in layers)
    right = {torch.float32} | ({torch.bfloat16} if fast_bf16() else set())
    if model.device.type != "cpu" or model.dtype not in right or size > MOST_SHARE * 2**30 * machine.free_memory_gib():
        return []
    try:
        with torch.inference_mode():
            return [(m, torch.ops.mkldnn._reorder_linear_weight(m.weight, ROWS)) for m in layers]
    except (AttributeError, RuntimeError):  # a PyTorch built without oneDNN
        return []


def _linear(weight: Any, bias: Any, x: Any) -> Any:
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
