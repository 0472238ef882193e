"""Quantise a 16-bit GGUF file with llama.cpp's own function, in a process of its own (helpers/gguf/quantize_process.py).

Preferred in this order: `llama-quantize` of the user's own build, `llama_model_quantize` of the prebuilt library (through ctypes),
and, where that library cannot be loaded, llama.cpp's row quantisers inside `xllamacpp` with llama.cpp's choice of types
(helpers/gguf/quantization_mix.py). All three give the same bytes of tensor data.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers import machine
from helpers.errors import TunebookError
from helpers.gguf import header, libraries, llama_structs

# Name -> llama.cpp's file type number (enum llama_ftype in llama.h).
FILE_TYPES = {
    "f16": 1,
    "bf16": 32,
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
# Bits per weight as llama.cpp's types have them on a large model; the sizes that preflight announces.
NOMINAL_BITS = {
    "f16": 16.0,
    "bf16": 16.0,
    "q8_0": 8.5,
    "q6_k": 6.56,
    "q5_k_m": 5.69,
    "q5_k_s": 5.54,
    "q4_k_m": 4.86,
    "q4_k_s": 4.59,
    "q4_0": 4.55,
    "q3_k_m": 3.91,
    "q3_k_s": 3.5,
    "q2_k": 3.17,
}
# What llama.cpp takes where a row is no multiple of 256 weights, and what it had wanted.
FALLBACK_OF = {
    "Q5_0": "Q4_K",
    "Q5_1": "Q5_K",
    "Q8_0": "Q6_K",
    "Q4_0": "Q2_K/Q3_K",
    "IQ4_NL": "Q2_K/Q3_K",
    "F16": "a K-quant",
}


@dataclass(frozen=True)
class Quantised:
    """One finished file. types: tensors of each type; fallback: {"Q4_K → Q5_0": count} where the width allowed no K-quant."""

    type: str
    path: Path
    bytes: int
    bits_per_weight: float
    types: dict[str, int]
    fallback: dict[str, int]
    wall_s: float
    by: str

    def as_dict(self) -> dict:
        return asdict(self) | {"path": self.path.name}


def parse_types(text: str) -> list[str]:
    """ "q8_0, Q4_K_M" -> ["q8_0", "q4_k_m"]. Raises TunebookError for a name that is none of `FILE_TYPES`."""
    names = list(dict.fromkeys(t.strip().lower() for t in text.split(",") if t.strip()))
    unknown = [n for n in names if n not in FILE_TYPES]
    if unknown or not names:
        raise TunebookError(
            f"Quantisation {unknown[0] if unknown else text!r} is not known; choose among {', '.join(FILE_TYPES)}."
        )
    return names


def quantize(source: Path, out: Path, kind: str, imatrix: Path | None = None, threads: int = 0) -> Quantised:
    """Write `out` from the 16-bit file `source`, atomically.

    kind: a name of `FILE_TYPES`; imatrix: an importance matrix in llama.cpp's GGUF form.
    Raises TunebookError, the partial file removed, when llama.cpp fails or the disk is full.
    """
    parse_types(kind)
    header.check(source)
    started, threads = time.time(), threads or llama_structs.threads()
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    program, library = libraries.quantize_program(), libraries.for_quantizing()
    if program:
        options = ["--imatrix", str(imatrix)] if imatrix else []
        command, by = [str(program), *options, str(source), str(partial), kind.upper(), str(threads)], str(program)
    else:
        command = [
            sys.executable,
            "-m",
            "helpers.gguf.quantize_process",
            str(library or ""),
            str(source),
            str(partial),
            kind,
            str(FILE_TYPES[kind]),
            str(threads),
            str(imatrix or ""),
        ]
        by = library.name if library else "xllamacpp's row quantisers"
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=machine.PROJECT)
        if done.returncode or not partial.is_file():
            raise TunebookError(_why(done.stderr + done.stdout, done.returncode, source, kind))
        summary = header.check(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return describe(out, kind, summary, round(time.time() - started, 2), by)


def describe(
    path: Path, kind: str, summary: header.Summary | None = None, wall_s: float = 0.0, by: str = ""
) -> Quantised:
    """Size, types and fallbacks of a file that is there."""
    summary = summary or header.check(path)
    return Quantised(
        kind,
        path,
        summary.bytes,
        round(summary.bits_per_weight, 3),
        summary.types(),
        fallbacks(summary, kind),
        wall_s,
        by,
    )


def fallbacks(summary: header.Summary, kind: str) -> dict[str, int]:
    """Tensors of a K-quant file whose rows are no multiple of 256 weights, by what they became."""
    if "_k" not in kind:
        return {}
    fell = [t for t in summary.tensors if len(t.shape) > 1 and t.shape[0] % 256 and t.type in FALLBACK_OF]
    return dict(Counter(f"{FALLBACK_OF[t.type]} → {t.type}" for t in fell).most_common())


def _why(log: str, status: int, source: Path, kind: str) -> str:
    text = " ".join(log.split())
    if (
        "No space left" in text
        or "failed to write" in text.lower()
        or "iostream error" in text
        or "basic_ios::clear" in text
    ):
        return (
            f"The disk is full: {kind} of {source.name} could not be written and its partial file is removed; free some room and run the "
            "same command again, it goes on with this file."
        )
    if status in (-9, 137):
        return f"Quantising {source.name} to {kind} was killed, most likely because the memory is full; close other programs and run it again."
    if status < 0:
        return (
            f"llama.cpp crashed (signal {-status}) while quantising {source.name} to {kind}; try another type, or set TUNEBOOK_LLAMA_CPP "
            "to another build."
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"llama.cpp could not quantise {source.name} to {kind}: {lines[-1][:300] if lines else f'status {status}'}"
