"""The process behind `quantize.quantize`: a crash in llama.cpp ends this one and not the notebook. It imports next to nothing, because
every quantisation starts it.
"""

from __future__ import annotations

import ctypes as c
import sys
from pathlib import Path

from helpers.gguf import llama_structs


class _Importance(c.Structure):
    """`llama_model_imatrix_data`: one tensor's importance, a mean square for each of its columns."""

    _fields_ = [("name", c.c_char_p), ("data", c.POINTER(c.c_float)), ("size", c.c_size_t)]


def main(library: str, source: str, out: str, kind: str, file_type: str, threads: str, imatrix: str) -> int:
    """library: path of a libllama that quantises, "" for the row quantisers; file_type: llama.cpp's number of `kind`. 0 when `out` is whole."""
    if not library:
        from helpers.gguf import quantization_mix

        quantization_mix.quantize(Path(source), Path(out), kind, imatrix)
        return 0
    loaded = llama_structs.Library(library, runs=False)
    function = loaded.dll.llama_model_quantize
    function.restype, function.argtypes = c.c_uint32, (c.c_char_p, c.c_char_p, c.POINTER(llama_structs.Block))
    loaded.dll.llama_model_quantize_default_params.restype = llama_structs.Block
    block = loaded.dll.llama_model_quantize_default_params()
    numbers = (c.c_int32 * 2).from_buffer(block)  # nthread and ftype have come first in every release
    numbers[0], numbers[1] = int(threads), int(file_type)
    if imatrix:
        rows = _read_importance(Path(imatrix))
        table = (_Importance * (len(rows) + 1))(
            *[_Importance(n.encode(), v.ctypes.data_as(c.POINTER(c.c_float)), v.size) for n, v in rows.items()]
        )
        c.c_void_p.from_buffer(block, 24).value = c.addressof(
            table
        )  # after four numbers and six flags, on a multiple of 8
    status = function(source.encode(), out.encode(), c.byref(block))
    if status:
        print(loaded.last_error(), file=sys.stderr)
    return min(status, 1)


def _read_importance(path: Path) -> dict:
    """Tensor name -> float32 mean squares, out of an importance matrix in GGUF form."""
    import numpy as np
    from gguf import GGUFReader

    tensors = {t.name: t.data for t in GGUFReader(path).tensors}
    sums = {n.removesuffix(".in_sum2"): v for n, v in tensors.items() if n.endswith(".in_sum2")}
    return {
        n: np.ascontiguousarray((v / max(float(tensors[f"{n}.counts"].flat[0]), 1.0)).ravel(), dtype=np.float32)
        for n, v in sums.items()
    }


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
