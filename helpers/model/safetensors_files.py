"""A model's safetensors files: which there are, how many weights they hold, and writing one tensor after another."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError


def shards(base: Path) -> list[Path]:
    """The base's safetensors files; all that its index names must be there."""
    index = base / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [p.name for p in sorted(base.glob("*.safetensors"))]
    bad = next((n for n in names if not (base / n).is_file() or Path(n).name != n), None)
    if bad or not names:
        raise TunebookError(
            f"The base in {base} lacks its weights ({bad or 'no *.safetensors file'}); download it again."
        )
    return [base / n for n in names]


def count_weights(base: Path) -> tuple[int, int]:
    """(weights of the model, weights of its largest tensor), from the headers of its files."""
    from safetensors import safe_open

    counts = []
    for shard in shards(base):
        with safe_open(shard, "pt") as file:
            counts += [math.prod(file.get_slice(n).get_shape()) for n in file.keys()]
    return sum(counts), max(counts)


def write_safetensors(
    path: Path, entries: list[tuple[str, tuple[int, ...]]], dtype: Any, tensors: Iterator[Any]
) -> int:
    """Stream tensors into one safetensors file (the format's own layout); returns the bytes of tensor data.

    entries: (name, shape) in the order in which `tensors` yields them, all of `dtype`, two bytes a weight.
    """
    import torch

    label = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in entries:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), tensor in zip(entries, tensors, strict=True):
            if tuple(tensor.shape) != tuple(shape):
                raise TunebookError(
                    f"The merged {name} has shape {tuple(tensor.shape)} where {tuple(shape)} was expected; "
                    "the adapter belongs to another base."
                )
            file.write(memoryview(tensor.view(torch.int16).numpy()).cast("B"))
            del tensor
    return end
