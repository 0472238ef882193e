"""An importance matrix from the training data: for each linear layer the mean square of every input column.

llama.cpp's quantisers weigh a column's rounding error by it. It is gathered in torch on the merged model (llama.cpp's own
`imatrix` tool gathers the same sums in its runtime) and written in llama.cpp's GGUF form, so that its tools read it, too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError
from helpers.gguf import header


def write(merged: Path, gguf: Path, rows: Sequence[Sequence[int]], out: Path) -> Path:
    """Write `out` for the tensors of `gguf`, the 16-bit file converted from `merged`. rows: token ids of training conversations.

    Raises TunebookError when the model's layers cannot be told apart by llama.cpp's tensor names.
    """
    sums, counts = gather(merged, rows)
    names = tensor_names(header.check(gguf), list(sums))
    if not names:
        raise TunebookError(f"None of the layers of {merged} has a llama.cpp tensor name; set imatrix=False.")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    _write(partial, {names[n]: (sums[n], counts[n]) for n in sums if n in names}, len(rows))
    os.replace(partial, out)
    return out


def gather(merged: Path, rows: Sequence[Sequence[int]]) -> tuple[dict[str, Any], dict[str, int]]:
    """(layer name -> float32 sums of squares over tokens, one a column; layer name -> tokens seen)."""
    import numpy as np
    import torch

    from helpers.model.loading import load_model

    model = load_model(merged).eval()
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            sums[name] = sums.get(name, 0) + (x * x).sum(0).cpu().numpy().astype(np.float64)
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    hooks = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    with torch.inference_mode():
        for row in rows:
            model(torch.tensor([list(row)], device=model.device))
    for hook in hooks:
        hook.remove()
    return {n: v.astype(np.float32) for n, v in sums.items()}, counts


def tensor_names(summary: header.Summary, layers: Sequence[str]) -> dict[str, str]:
    """Layer name in transformers -> tensor name in the GGUF file, by gguf's own table for the file's architecture."""
    import gguf

    by_name = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
    architecture = by_name.get(summary.metadata.get("general.architecture"))
    if architecture is None:
        return {}
    blocks = summary.metadata.get(f"{summary.metadata['general.architecture']}.block_count", 0)
    table = gguf.get_tensor_name_map(architecture, blocks)
    known = {t.name for t in summary.tensors}
    found = {layer: table.get_name(layer, try_suffixes=(".weight",)) for layer in layers}
    return {layer: f"{name}.weight" for layer, name in found.items() if name and f"{name}.weight" in known}


def _write(path: Path, entries: dict[str, tuple[Any, int]], chunks: int) -> None:
    """The GGUF form of llama.cpp's imatrix files: NAME.in_sum2 and NAME.counts for each tensor."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["training data"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (values, count) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", values.reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[count]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
