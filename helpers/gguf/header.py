"""Read what a GGUF file says about itself: metadata, tensors, sizes. Refuses a damaged or truncated file with a sentence.

Format: the GGUF specification in ggml's documentation, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from helpers.errors import TunebookError

# ggml's tensor types: number -> (name, weights a block, bytes a block). From ggml.h; the ones that llama.cpp writes today.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST = (
    1 << 24
)  # entries of one array, metadata keys, tensors: far above any model, far below what would fill the memory


@dataclass(frozen=True)
class Tensor:
    """One tensor's entry. shape: ggml's order (columns first); offset: bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Summary:
    """What the header says. metadata: key -> value, of lists of texts (vocabulary, merges) only their length; tensors: in file order;
    bytes: size of the file.
    """

    metadata: dict[str, Any]
    tensors: list[Tensor]
    bytes: int

    @property
    def weights(self) -> int:
        return sum(t.weights for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per weight; the header and the tokenizer are left out."""
        return 8 * sum(t.bytes for t in self.tensors) / max(self.weights, 1)

    def types(self) -> dict[str, int]:
        """How many tensors have each type, most frequent first."""
        return dict(Counter(t.type for t in self.tensors).most_common())


def check(path: str | Path) -> Summary:
    """Header of a GGUF file. Raises TunebookError when it is missing, not GGUF, damaged or shorter than its tensors say."""
    path = Path(path)
    if not path.is_file():
        raise TunebookError(f"There is no file {path}; run notebook 04 to export the model, or correct the path.")
    state = path.stat()
    return _checked(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=8)
def _checked(path: Path, size: int, _: int) -> Summary:
    """Read once while the file stays as it is: a large vocabulary takes a tenth of a second."""
    try:
        with open(path, "rb") as file:
            summary = _read(file, size)
    except (struct.error, EOFError, UnicodeDecodeError, KeyError, OverflowError, ValueError) as error:
        raise TunebookError(
            f"{path} is no readable GGUF file ({_why(error)}); export it again, or download it again."
        ) from error
    end = max((t.offset + t.bytes for t in summary.tensors), default=0)
    if end > size:
        raise TunebookError(
            f"{path} is truncated: its tensors need {end:,} bytes and it has {size:,}; export it again, or download it again."
        )
    return summary


def _why(error: Exception) -> str:
    return (
        "its header breaks off" if isinstance(error, (struct.error, EOFError)) else str(error) or type(error).__name__
    )


def _read(file: BinaryIO, size: int) -> Summary:
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    version, n_tensors, n_metadata = _unpack(file, "<IQQ")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, not 2 or 3")
    if max(n_tensors, n_metadata) > MOST:
        raise ValueError(f"it announces {n_tensors} tensors and {n_metadata} keys")
    metadata = {}
    for _ in range(n_metadata):
        key = _string(file, size)
        metadata[key] = _value(file, *_unpack(file, "<I"), size)
    raw = []
    for _ in range(n_tensors):
        name, (dimensions,) = _string(file, size), _unpack(file, "<I")
        if dimensions > 8:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = _unpack(file, f"<{dimensions}Q")
        raw.append((name, shape, *_unpack(file, "<IQ")))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise ValueError(f"its alignment is {align!r}")
    start = -(-file.tell() // align) * align
    tensors = []
    for name, shape, kind, offset in raw:
        if kind not in TYPES:
            raise ValueError(f"tensor {name!r} has the unknown type {kind}")
        label, block, width = TYPES[kind]
        tensors.append(Tensor(name, shape, label, start + offset, math.prod(shape) // block * width))
    return Summary(metadata, tensors, size)


def _unpack(file: BinaryIO, layout: str) -> tuple:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _string(file: BinaryIO, size: int) -> str:
    (length,) = _unpack(file, "<Q")
    if length > size:
        raise EOFError
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data.decode()


def _pass_strings(file: BinaryIO, count: int, size: int) -> int:
    """Read on past `count` texts; a vocabulary has a hundred thousand, so no struct here."""
    read, number = file.read, int.from_bytes
    for _ in range(count):
        head = read(8)
        length = number(head, "little")
        if len(head) < 8 or length > size or len(read(length)) < length:
            raise EOFError
    return count


def _value(file: BinaryIO, kind: int, size: int, depth: int = 0) -> Any:
    if kind == STRING:
        return _string(file, size)
    if kind == ARRAY:
        inner, count = _unpack(file, "<IQ")
        if count > min(MOST, size) or depth > 2:
            raise ValueError(f"an array announces {count} entries")
        if inner in SCALARS:
            return list(_unpack(file, f"<{count}{SCALARS[inner]}"))
        if inner == STRING:
            return _pass_strings(file, count, size)
        return [_value(file, inner, size, depth + 1) for _ in range(count)]
    return _unpack(file, "<" + SCALARS[kind])[0]
