"""Quantise with llama.cpp's row quantisers out of the `xllamacpp` package, for machines where no library has the whole function.

Which tensor gets which type is llama.cpp's own choice (llama-quant.cpp) for dense models without an importance matrix's special
cases; a test holds the bytes against `llama_model_quantize` itself. Mixtures of experts need the library.
"""

from __future__ import annotations

import ctypes as c
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError
from helpers.gguf import header, libraries

BASE = {
    "q8_0": "Q8_0",
    "q6_k": "Q6_K",
    "q5_k_m": "Q5_K",
    "q5_k_s": "Q5_K",
    "q4_k_m": "Q4_K",
    "q4_k_s": "Q4_K",
    "q4_0": "Q4_0",
    "q3_k_m": "Q3_K",
    "q3_k_s": "Q3_K",
    "q2_k": "Q2_K",
}
NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
NUMBER = {name: number for number, (name, _, _) in header.TYPES.items()}
FILE_NUMBER = {
    "q8_0": 7,
    "q6_k": 18,
    "q5_k_m": 17,
    "q5_k_s": 16,
    "q4_k_m": 15,
    "q4_k_s": 14,
    "q4_0": 2,
    "q3_k_m": 12,
    "q3_k_s": 11,
    "q2_k": 10,
}


def choose(summary: header.Summary, kind: str) -> dict[str, str]:
    """Tensor name -> type, as llama.cpp would choose for file type `kind`."""
    architecture = summary.metadata["general.architecture"]
    if summary.metadata.get(f"{architecture}.expert_count", 0):
        raise TunebookError(
            "A mixture of experts is quantised by llama.cpp's library only; run `python -m helpers.gguf.libraries` to fetch it."
        )
    layers = summary.metadata[f"{architecture}.block_count"]
    heads = summary.metadata.get(f"{architecture}.attention.head_count", 1)
    shared = heads // max(summary.metadata.get(f"{architecture}.attention.head_count_kv", heads), 1)
    tied = not any(t.name == "output.weight" for t in summary.tensors)
    order = sorted(summary.tensors, key=lambda t: int(t.name.split(".")[1]) if t.name.startswith("blk.") else -1)
    seen = {"v": 0, "down": 0}
    chosen = {}
    for tensor in order:
        if len(tensor.shape) < 2 or not tensor.name.endswith(".weight") or "_norm" in tensor.name:
            chosen[tensor.name] = tensor.type
            continue
        wanted = _wanted(tensor.name, kind, layers, shared, tied, seen)
        if tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight"):
            wanted = wanted if wanted == "Q8_0" else "Q6_K"
        if tensor.shape[0] % header.TYPES[NUMBER[wanted]][1]:
            wanted = NARROW.get(wanted, "F16")
            wanted = "F16" if tensor.shape[0] % 32 else wanted
        chosen[tensor.name] = wanted
    return chosen


def _wanted(name: str, kind: str, layers: int, shared: int, tied: bool, seen: dict[str, int]) -> str:
    """The type before the width is looked at. seen counts the value and down projections, which some types treat by depth."""
    base = BASE[kind]
    more = lambda i: i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2
    if "attn_v.weight" in name:
        i, seen["v"] = seen["v"], seen["v"] + 1
        return {
            "q2_k": "Q4_K" if shared >= 4 else "Q3_K",
            "q3_k_m": "Q5_K" if i < 2 else "Q4_K",
            "q4_k_m": "Q6_K" if more(i) else base,
            "q5_k_m": "Q6_K" if more(i) else base,
            "q4_k_s": "Q5_K" if i < 4 else base,
        }.get(kind, base)
    if "ffn_down" in name:
        i, seen["down"] = seen["down"], seen["down"] + 1
        return {
            "q2_k": "Q3_K",
            "q3_k_m": "Q5_K" if i < layers // 16 else "Q4_K",
            "q4_k_m": "Q6_K" if more(i) else base,
            "q5_k_m": "Q6_K" if more(i) else base,
            "q4_k_s": "Q5_K" if i < layers // 8 else base,
        }.get(kind, base)
    if "attn_output.weight" in name:
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K"}.get(kind, base)
    if "attn_qkv.weight" in name:
        return {"q3_k_m": "Q4_K", "q4_k_m": "Q5_K", "q5_k_m": "Q6_K"}.get(kind, base)
    return base


def quantize(source: Path, out: Path, kind: str, imatrix: str = "") -> None:
    """Write `out`, tensor by tensor, metadata kept as it is. Raises TunebookError for a request that only the library can meet."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

    if imatrix:
        raise TunebookError(
            "An importance matrix is used by llama.cpp's library only; run `python -m helpers.gguf.libraries` to fetch it."
        )
    chosen = choose(header.check(source), kind)
    reader = GGUFReader(source)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        value = FILE_NUMBER[kind] if name == "general.file_type" else field.contents()
        writer.add_key_value(name, value, field.types[0], inner if field.types[0] == GGUFValueType.ARRAY else None)
    if "general.quantization_version" not in reader.fields:
        writer.add_quantization_version(2)
    for tensor in reader.tensors:
        number = GGMLQuantizationType(NUMBER[chosen[tensor.name]])
        shape = [int(n) for n in tensor.shape]
        size, rows = _bytes(chosen[tensor.name], shape), shape[::-1]
        plain = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}.get(number.name)
        packed_rows = [*rows[:-1], size // max(int(np.prod(rows[:-1])), 1)]  # the writer counts a packed row in bytes
        writer.add_tensor_info(tensor.name, rows if plain else packed_rows, plain or np.uint8, size, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(_packed(tensor, chosen[tensor.name]))
    writer.close()


def _bytes(kind: str, shape: list[int]) -> int:
    import math

    _, block, width = header.TYPES[NUMBER[kind]]
    return math.prod(shape) // block * width


def _packed(tensor: Any, kind: str) -> Any:
    """A tensor's bytes in its new type."""
    import numpy as np
    from gguf import dequantize

    if tensor.tensor_type.name == kind:
        return np.ascontiguousarray(tensor.data)
    floats = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    if kind in ("F16", "F32"):
        return floats.astype(np.float16 if kind == "F16" else np.float32)
    columns, size = int(tensor.shape[0]), _bytes(kind, [int(n) for n in tensor.shape])
    packed = np.empty(size, np.uint8)
    pack = c.CDLL(str(libraries.packaged())).ggml_quantize_chunk
    pack.restype, pack.argtypes = (
        c.c_size_t,
        (c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p),
    )
    wrote = pack(NUMBER[kind], floats.ctypes.data, packed.ctypes.data, 0, floats.size // columns, columns, None)
    if wrote != size:
        raise TunebookError(
            f"llama.cpp packed {tensor.name} into {wrote} bytes where {kind} takes {size}; use the prebuilt library."
        )
    return packed.reshape(*[int(n) for n in tensor.shape[::-1]][:-1], -1)
