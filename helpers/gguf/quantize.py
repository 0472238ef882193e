"""Quantise a 16-bit GGUF file with llama.cpp's own function, in a process that may crash alone.

An importance matrix of the training data (each column's mean square of inputs) makes the quantisers weigh a column's
rounding error by it.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from helpers import worker
from helpers.errors import TunebookError
from helpers.gguf import header, libraries


class Type(NamedTuple):
    """A GGUF type: llama.cpp's file type number (enum llama_ftype in llama.h), bits per weight on a large model, and
    what the fidelity gates allow: mean KL divergence in nats at most, top-1 agreement at least.

    f16 is the proof that the chain is right; the others' bounds are two to three times what SmolLM2-135M shows (93 %
    of top-1 tokens kept by q8_0 on 250 tokens), which loses more to each type than larger models do.
    """

    number: int
    bits: float
    kl: float
    top1: float


TYPES = {
    "f16": Type(1, 16.0, 1e-4, 0.995),
    "bf16": Type(32, 16.0, 2e-3, 0.98),
    "q8_0": Type(7, 8.5, 0.02, 0.88),
    "q6_k": Type(18, 6.56, 0.05, 0.85),
    "q5_k_m": Type(17, 5.69, 0.15, 0.75),
    "q5_k_s": Type(16, 5.54, 0.15, 0.75),
    "q4_k_m": Type(15, 4.86, 0.25, 0.65),
    "q4_k_s": Type(14, 4.59, 0.3, 0.65),
    "q4_0": Type(2, 4.55, 0.4, 0.6),
    "q3_k_m": Type(12, 3.91, 0.5, 0.5),
    "q3_k_s": Type(11, 3.5, 0.8, 0.4),
    "q2_k": Type(10, 3.17, 2.0, 0.2),
}
# What llama.cpp takes where a row is no multiple of 256 weights, and what it had wanted.
FALLBACK_OF = {"Q5_0": "Q4_K", "Q5_1": "Q5_K", "Q8_0": "Q6_K", "F16": "a K-quant"}
FALLBACK_OF |= dict.fromkeys(("Q4_0", "IQ4_NL"), "Q2_K/Q3_K")


@dataclass(frozen=True)
class Quantised:
    """A finished file. types: tensors of each; fallback: {"Q4_K → Q5_0": count} where the width allowed no K-quant."""

    type: str
    path: Path
    bytes: int
    bits_per_weight: float
    types: dict[str, int]
    fallback: dict[str, int]
    wall_s: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": self.path.name}


def parse_types(text: str) -> list[str]:
    """ "q8_0, Q4_K_M" -> ["q8_0", "q4_k_m"]. Raises TunebookError for a name that is none of `TYPES`."""
    names = list(dict.fromkeys(t.strip().lower() for t in text.split(",") if t.strip()))
    unknown = next((n for n in names if n not in TYPES), None)
    if unknown or not names:
        raise TunebookError(f"quantizations is {unknown or text!r}; it takes {', '.join(TYPES)}, separated by commas.")
    return names


def quantize(source: Path, out: Path, kind: str, imatrix: Path | None = None) -> Quantised:
    """Write `out` from the 16-bit file `source`, whole or not at all. kind: a name of `TYPES`; imatrix: what
    `importance` wrote. Raises TunebookError with llama.cpp's own message.
    """
    started, library = time.monotonic(), libraries.for_quantizing()
    if library is None:
        raise TunebookError(
            "No llama.cpp library here can quantise: run `python -m helpers.gguf.libraries` to fetch one (x86-64 Linux "
            "with glibc 2.34), set llama_cpp to a build of your own, or set quantizations='f16'."
        )
    header.check(source)
    partial = out.with_name(f".{out.name}.partial")
    request = {"library": str(library), "source": str(source), "out": str(partial), "type": TYPES[kind].number}
    request["imatrix"] = str(imatrix or "")
    try:
        worker.run("helpers.gguf.llama_structs:quantize", request, wall_s=None, name="llama.cpp")
        header.check(partial)
        os.replace(partial, out)
    except TunebookError as error:
        raise libraries.failure(f"quantising {source.name} to {kind}", str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    return describe(out, kind, time.monotonic() - started)


def describe(path: Path, kind: str, wall_s: float = 0.0) -> Quantised:
    """Size, types and fallbacks of a file that is there."""
    summary = header.check(path)
    bits, fallen = round(summary.bits_per_weight, 3), fallbacks(summary.tensors, kind)
    return Quantised(kind, path, summary.bytes, bits, summary.types(), fallen, round(wall_s, 2))


def fallbacks(tensors: Sequence[Any], kind: str) -> dict[str, int]:
    """Tensors of a K-quant file whose rows are no multiple of 256 weights, by what they became."""
    matrices = [t for t in tensors if len(t.shape) > 1 and t.shape[0] % 256 and "_k" in kind]
    became = [t.tensor_type.name for t in matrices]
    return dict(Counter(f"{FALLBACK_OF[t]} → {t}" for t in became if t in FALLBACK_OF).most_common())


# ---------------------------------------------------------------- importance


def importance(merged: Path, f16: Path, rows: Sequence[Sequence[int]], out: Path) -> Path:
    """Write the importance matrix `out` in llama.cpp's GGUF form (NAME.in_sum2 and NAME.counts for each tensor).

    merged: the model folder that `f16` was converted from; rows: token ids of training conversations. Gathered in
    torch; llama.cpp's own `imatrix` tool gathers the same sums in its runtime.
    """
    import numpy as np
    import torch

    from helpers.model.loading import load_model

    model = load_model(merged).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names = header.tensor_names(header.check(f16), layers)
    if not names:
        raise TunebookError(f"None of the layers of {merged} has a llama.cpp tensor name; set imatrix=False.")
    arrays: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            arrays[f"{name}.in_sum2"] = arrays.get(f"{name}.in_sum2", 0) + (x * x).sum(0).cpu().numpy().astype(
                np.float64
            )
            arrays[f"{name}.counts"] = arrays.get(f"{name}.counts", 0) + len(x)

        return hook

    for layer, name in names.items():
        layers[layer].register_forward_pre_hook(watch(name))
    with torch.inference_mode():
        for row in rows:
            model(torch.tensor([list(row)], device=model.device))
    metadata = {"imatrix.datasets": ["training data"], "imatrix.chunk_count": len(rows), "imatrix.chunk_size": 512}
    partial = out.with_name(f".{out.name}.partial")
    tensors = {n: np.asarray(v, dtype=np.float32).reshape(1, -1) for n, v in arrays.items()}
    header.write(partial, "imatrix", "imatrix", metadata, tensors)
    os.replace(partial, out)
    return out
