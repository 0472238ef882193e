"""Linear layers on a CPU with their weights laid out once for the matrix kernels, instead of anew at every call.

PyTorch hands a weight to its matrix library as it lies in memory, and the library rearranges it in every call; with a
few dozen rows that costs a third of the product. Here oneDNN arranges each weight once, as PyTorch's own compiler does
for a frozen model. On one AVX2 core with 64 rows: 31 instead of 22 GFLOPS (1536 x 576), 33 instead of 22 (49152 x 576).
"""

from __future__ import annotations

import functools
from typing import Any

from helpers import machine
from helpers.model.loading import fast_bf16

ROWS = 64  # what the layout is chosen for; 4 to 1,024 rows run as fast in it
MOST_SHARE = 0.25  # of the free memory that the second copy of the weights may take


class PackedWeights:
    """`with PackedWeights(model):` runs the linear layers on rearranged weights, where that is possible (`layers`).

    The model's own weights stay as they are, so outside of the block nothing has changed.
    """

    def __init__(self, model: Any):
        import torch

        self.layers: list[tuple[Any, Any]] = []
        layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
        size = sum(m.weight.numel() * m.weight.itemsize for m in layers)
        right = [torch.float32, torch.bfloat16] if fast_bf16() else [torch.float32]
        fits = size <= MOST_SHARE * 2**30 * machine.free_memory_gib()
        if model.device.type == "cpu" and model.dtype in right and fits and torch.backends.mkldnn.is_available():
            with torch.inference_mode():
                self.layers = [(m, torch.ops.mkldnn._reorder_linear_weight(m.weight, ROWS)) for m in layers]

    def __enter__(self) -> None:
        for layer, weight in self.layers:
            layer.forward = functools.partial(_linear, weight, layer.bias)

    def __exit__(self, *_: Any) -> None:
        for layer, _weight in self.layers:
            del layer.forward


def _linear(weight: Any, bias: Any, x: Any) -> Any:
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
