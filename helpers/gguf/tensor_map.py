"""Where a model's matrices stand in the GGUF file that was converted from it: by which name, and in which order of
rows.

The converter renames tensors and sometimes (Llama's rotary embedding) reorders rows. Names come from gguf's own
table; orders are found by comparing the rows of the 16-bit file with the model's, so that no architecture needs code
of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from helpers.gguf import header


class Place(NamedTuple):
    """order: row i of the model is row order[i] of the tensor; None where both have the same order."""

    name: str
    order: np.ndarray | None


def names(summary: header.Summary, layers: Iterable[str]) -> dict[str, str]:
    """Layer name in transformers -> tensor name in the GGUF file, for the layers that it has under one name."""
    architecture = summary.metadata.get("general.architecture")
    known = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if known is None:
        return {}
    table = gguf.get_tensor_name_map(known, summary.metadata.get(f"{architecture}.block_count", 0))
    there = {t.name for t in summary.tensors}
    found = {layer: f"{table.get_name(layer, try_suffixes=('.weight',))}.weight" for layer in layers}
    return {layer: name for layer, name in found.items() if name in there}


def places(layers: Iterable[str], weight_of: Callable[[str], Any], source: Path) -> dict[str, Place]:
    """Layer name -> its place in the 16-bit GGUF `source`, for the layers whose rows are all found there.

    weight_of(layer): its matrix, a torch tensor (rows, columns) with the values that `source` was converted from.
    """
    tensors = {name: t.data for name, t in header.open_tensors(source).items() if t.tensor_type.name == "F16"}
    found = {}
    for layer, name in names(header.check(source), layers).items():
        if name in tensors:
            fits, order = _row_order(tensors[name].view("<u2"), weight_of(layer))
            if fits:
                found[layer] = Place(name, order)
    return found


def _row_order(theirs: np.ndarray, weight: Any) -> tuple[bool, np.ndarray | None]:
    """Whether the 16-bit words (rows, columns) of the file are the model's, and the order of `Place`."""
    import torch

    mine = weight.detach().to("cpu", torch.float16).contiguous().view(torch.int16).numpy().view("<u2")
    if mine.shape != theirs.shape:
        return False, None
    if np.array_equal(mine, theirs):
        return True, None
    mine_rows, their_rows = (np.ascontiguousarray(m).view(f"V{2 * m.shape[1]}").ravel() for m in (mine, theirs))
    mine_sorted, their_sorted = np.argsort(mine_rows, kind="stable"), np.argsort(their_rows, kind="stable")
    if not np.array_equal(mine_rows[mine_sorted], their_rows[their_sorted]):
        return False, None
    order: np.ndarray = np.empty(len(mine), np.int64)
    order[mine_sorted] = their_sorted
    return True, order
