"""What a GGUF file says about itself: metadata, tensors, sizes. A damaged or truncated file is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFValueType, GGUFWriter, get_tensor_name_map
from gguf.gguf_reader import ReaderTensor

from helpers.errors import TunebookError

MOST = 1 << 24  # tensors or metadata keys: far above any model


class _Reader(GGUFReader):
    """gguf's reader, made strict and fast. Overrides private methods, checked with gguf==0.19.

    The original takes 3 s for a vocabulary of 49,000 texts and reads on past the end of a truncated file.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        need = offset + np.dtype(dtype).itemsize * int(count)
        if need > len(self.data):
            what = "it is truncated" if hasattr(self, "data_offset") else "its header breaks off"
            raise EOFError(f"{what}: {need:,} bytes or more are needed and it has {len(self.data):,}")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        """Arrays in one piece; of texts only how many there are."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        inner, count = struct.unpack_from("<IQ", self.data, orig_offs)
        kind, end = GGUFValueType(inner), orig_offs + 12
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                end += 8 + struct.unpack_from("<Q", self.data, end)[0]
            return end - orig_offs, [np.array([count])], [0], [GGUFValueType.ARRAY, kind]
        values = self._get(end, self.gguf_scalar_to_np[kind], count)
        return end + values.nbytes - orig_offs, [values], [0], [GGUFValueType.ARRAY, kind]


NUMBERS = (  # ends of the names of fields that hold a whole number, or one for each layer
    *(".block_count", ".context_length", ".embedding_length", ".head_count", ".head_count_kv"),
    *(".key_length", ".value_length", ".eos_token_id", ".bos_token_id"),
)
TEXTS = ("general.architecture", "general.name", "tokenizer.ggml.model", "tokenizer.chat_template")


@dataclass(frozen=True)
class Summary:
    """metadata: key -> value, of lists of texts (vocabulary, merges) only their length; tensors: without their data."""

    metadata: dict[str, Any]
    tensors: list[ReaderTensor]
    bytes: int


def check(path: str | Path) -> Summary:
    """Header of a GGUF file. Raises TunebookError when it is missing, damaged or shorter than its tensors say."""
    path = Path(path)
    if not path.is_file():
        raise TunebookError(f"There is no file {path}; run notebook 04 to export the model, or correct the path.")
    state = path.stat()
    return _checked(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=8)
def _checked(path: Path, size: int, _: int) -> Summary:
    """Read once while the file stays as it is."""
    try:
        with open(path, "rb") as file:
            magic, _version, tensors, keys = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        if max(tensors, keys) > MOST:
            raise ValueError(f"it announces {tensors} tensors and {keys} keys")
        reader = _Reader(path)
    except (struct.error, EOFError, LookupError, TypeError, ValueError, OverflowError, MemoryError) as error:
        why = "its header breaks off" if isinstance(error, struct.error) else str(error) or type(error).__name__
        again = "export it again, or download it again."
        raise TunebookError(f"{path} is not a readable GGUF file ({why}); {again}") from error
    metadata = {name: _value(field) for name, field in reader.fields.items()}
    for name, value in metadata.items():
        numbers = value if isinstance(value, list) else [value]
        of_kind = all(type(n) is int and 0 <= n < 2**40 for n in numbers) if name.endswith(NUMBERS) else True
        if not of_kind or (name in TEXTS and not isinstance(value, str)):
            wanted = "text" if name in TEXTS else "a whole number"
            raise TunebookError(f"{path} is not a readable GGUF file ({name} is {str(value)[:80]!r}, not {wanted}).")
    # a view of the mapped file would keep a deleted file's bytes on the disk
    tensors_alone = [t._replace(shape=np.array(t.shape), data=None, field=None) for t in reader.tensors]
    return Summary(metadata, tensors_alone, size)


def open_tensors(path: Path) -> dict[str, ReaderTensor]:
    """The tensors of a sound file by name, their `data` memory-mapped."""
    return {t.name: t for t in _Reader(path).tensors}


def _value(field: Any) -> Any:
    value = field.parts[-1]
    if field.types[0] == GGUFValueType.STRING:
        return bytes(value).decode("utf-8", "replace")
    if field.types[0] == GGUFValueType.ARRAY and field.types[-1] != GGUFValueType.STRING:
        return value.tolist()
    return value[0].item()


def write(
    path: Path, architecture: str, kind: str, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """A small GGUF file of type `kind` ("adapter", "imatrix"), at once; whole numbers are written as uint32."""
    writer = GGUFWriter(path, architecture)
    writer.add_type(kind)
    for key, value in metadata.items():
        found = GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.get_type(value)
        writer.add_key_value(key, value, found, GGUFValueType.STRING if isinstance(value, list) else None)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------- whose tensor is whose
# The converter renames tensors and may reorder rows (Llama's rotary embedding). Names come from gguf's own table;
# orders are found by comparing the rows of the 16-bit file with the model's, so that no architecture needs code.


Order = np.ndarray | slice  # row i of the model is row order[i] of the tensor


def tensor_names(summary: Summary, layers: Iterable[str]) -> dict[str, str]:
    """Layer name in transformers -> tensor name in the GGUF file, for the layers that it has under one name."""
    architecture = summary.metadata.get("general.architecture")
    known = next((number for number, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if known is None:
        return {}
    table = get_tensor_name_map(known, summary.metadata.get(f"{architecture}.block_count", 0))
    there = {t.name for t in summary.tensors}
    found = {layer: f"{table.get_name(layer, try_suffixes=('.weight',))}.weight" for layer in layers}
    return {layer: name for layer, name in found.items() if name in there}


def places(layers: Iterable[str], weight_of: Callable[[str], Any], source: Path) -> dict[str, tuple[str, Order]]:
    """Layer name -> (tensor name in the 16-bit GGUF `source`, order), for the layers whose rows are all found there.

    weight_of(layer): its matrix, a torch tensor (rows, columns) with the values that `source` was converted from.
    """
    tensors = {name: t.data for name, t in open_tensors(source).items() if t.tensor_type.name == "F16"}
    names = {layer: name for layer, name in tensor_names(check(source), layers).items() if name in tensors}
    orders = {layer: _row_order(tensors[name].view("<u2"), weight_of(layer)) for layer, name in names.items()}
    return {layer: (names[layer], order) for layer, order in orders.items() if order is not None}


def _row_order(theirs: np.ndarray, weight: Any) -> Order | None:
    """Where the 16-bit words (rows, columns) of the file have the model's rows; None when they have others."""
    import torch

    mine = weight.detach().to("cpu", torch.float16).contiguous().view(torch.int16).numpy().view("<u2")
    if mine.shape != theirs.shape:
        return None
    if np.array_equal(mine, theirs):
        return slice(None)
    mine_rows, their_rows = (np.ascontiguousarray(m).view(f"V{2 * m.shape[1]}").ravel() for m in (mine, theirs))
    mine_sorted, their_sorted = np.argsort(mine_rows, kind="stable"), np.argsort(their_rows, kind="stable")
    if not np.array_equal(mine_rows[mine_sorted], their_rows[their_sorted]):
        return None
    order: np.ndarray = np.empty(len(mine), np.int64)
    order[mine_sorted] = their_sorted
    return order
