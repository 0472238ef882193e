"""The safetensors files of a base or an adapter: which there are, what they hold, and how one is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError
from helpers.storage import disk_error, write_json


@contextmanager
def reading(what: str, path: Path, remedy: str) -> Iterator[None]:
    """The one door for foreign model files: whatever a library raises on them becomes one TunebookError.

    A folder that was cut off, edited or made by another version fails in libraries in dozens of ways, so every
    exception is meant; "no space left" keeps its own message.
    """
    try:
        yield
    except TunebookError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and isinstance(disk_error(error, path), TunebookError):
            raise disk_error(error, path) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        said = next((line for line in lines if "size mismatch" in line), lines[0])[:300]
        raise TunebookError(f"{what} in {path} cannot be loaded ({said}); {remedy}") from error


def shards(base: Path) -> list[Path]:
    """The base's safetensors files; all that its index names must be there."""
    with reading("The list of weights", base, "download the base again."):
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


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a safetensors file, from its header."""
    from safetensors import safe_open

    with reading("The file of weights", file, "it is damaged: download or copy it again."), safe_open(file, "pt") as f:
        return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118  not a dict


def count_weights(base: Path) -> tuple[int, int]:
    """(weights of the model, weights of its largest tensor), from the headers of its files."""
    counts = [math.prod(shape) for shard in shards(base) for shape in shapes(shard).values()]
    return sum(counts), max(counts)


def sort_adapter_config(adapter: Path) -> None:
    """PEFT writes its sets of names in any order; sorted, the adapters of two identical runs have one hash."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    texts = {k: sorted(v) for k, v in config.items() if isinstance(v, list) and all(isinstance(x, str) for x in v)}
    write_json(file, config | texts)


def check_adapter(adapter: Path) -> dict[str, Any]:
    """The adapter's config. Raises TunebookError when the folder is incomplete, damaged, or holds NaN."""
    import torch
    from safetensors import safe_open

    weights = adapter / "adapter_model.safetensors"
    if not (adapter / "adapter_config.json").is_file() or not weights.is_file():
        pickled = (adapter / "adapter_model.bin").is_file()
        has = "only pickled weights (adapter_model.bin), which are not read" if pickled else "no adapter"
        raise TunebookError(
            f"{adapter} holds {has}; expected adapter_config.json and adapter_model.safetensors, as PEFT saves them."
        )
    with reading("The adapter", adapter, "it is damaged: train it again or copy it again."):
        config = json.loads((adapter / "adapter_config.json").read_text())
        with safe_open(weights, "pt") as file:
            bad = next((k for k in file.keys() if not torch.isfinite(file.get_tensor(k)).all()), None)  # noqa: SIM118
    if bad:
        raise TunebookError(
            f"The adapter in {adapter} holds NaN or infinity in {bad}; its training diverged, so train again with a "
            "lower learning rate."
        )
    return config


def write_safetensors(
    path: Path, entries: list[tuple[str, tuple[int, ...]]], dtype: Any, tensors: Iterable[Any]
) -> int:
    """Stream tensors into one safetensors file (the format's own layout); returns the bytes of tensor data.

    entries: (name, shape) in the order in which `tensors` yields them, all of `dtype`, two bytes a weight.
    """
    import torch

    label = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
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
