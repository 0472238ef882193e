"""From a Hugging Face folder to a GGUF file in 16 bits, by llama.cpp's own converter in a process of its own.

The converter (packaged, pinned by hash) brings a top-level `gguf` of its own version, and some of its model classes would run a
folder's Python code. So it runs apart, offline, on a folder from which every hint at foreign code has been removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.errors import TunebookError
from helpers.gguf import header, libraries

TYPES_16 = ("f16", "bf16")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)


def convert(model: Path, out: Path, outtype: str = "f16", name: str = "") -> dict[str, float]:
    """Write `out` from the folder `model` (config, safetensors, tokenizer). outtype: "f16" or "bf16".

    Returns {"wall_s": seconds, "bytes": size}. Raises TunebookError naming what the converter did not accept; nothing half-written stays.
    """
    if outtype not in TYPES_16:
        raise TunebookError(
            f"Conversion type {outtype!r} is none of {', '.join(TYPES_16)}; smaller types come from quantising."
        )
    started = time.time()
    with tempfile.TemporaryDirectory(prefix=".convert.", dir=_parent(out)) as work:
        folder, partial = clean_copy(model, Path(work) / "model"), Path(work) / "out.gguf"
        _run(folder, partial, model, ["--outtype", outtype, *(["--model-name", name] if name else [])])
        header.check(partial)
        os.replace(partial, out)
    return {"wall_s": round(time.time() - started, 2), "bytes": out.stat().st_size}


def convert_vocabulary(model: Path, out: Path) -> Path:
    """A GGUF with the tokenizer alone, from a folder that needs no weights: what preflight looks at before training."""
    with tempfile.TemporaryDirectory(prefix=".convert.", dir=_parent(out)) as work:
        folder, partial = clean_copy(model, Path(work) / "model", weights=False), Path(work) / "out.gguf"
        _run(folder, partial, model, ["--vocab-only"])
        os.replace(partial, out)
    return out


def architectures() -> set[str]:
    """Hugging Face's names of the architectures that the converter knows."""
    import ast

    tree = ast.parse((libraries.converter() / "conversion/__init__.py").read_text())
    for node in tree.body:
        names = [t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(t, ast.Name)]
        if "TEXT_MODEL_MAP" in names:
            return set(ast.literal_eval(node.value))
    return set()


def clean_copy(model: Path, folder: Path, weights: bool = True) -> Path:
    """A folder of links to the weights and copies of the small files, without `auto_map` (which names code to run)."""
    folder.mkdir()
    for file in ("config.json", *TOKENIZER_FILES):
        if not (model / file).is_file():
            continue
        if file in ("config.json", "tokenizer_config.json"):
            try:
                value = json.loads((model / file).read_text())
            except ValueError:
                raise TunebookError(f"{model / file} is no valid JSON; download or merge the model again.") from None
            value.pop("auto_map", None)
            (folder / file).write_text(json.dumps(value, ensure_ascii=False))
        else:
            shutil.copyfile(model / file, folder / file)
    if weights:
        for path in [*model.glob("*.safetensors"), *model.glob("*.safetensors.index.json")]:
            (folder / path.name).symlink_to(path.resolve())
    return folder


def _run(folder: Path, out: Path, model: Path, options: list[str]) -> None:
    script = libraries.converter() / "convert_hf_to_gguf.py"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_MININTERVAL": "5",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(folder), "--outfile", str(out), *options],
        capture_output=True,
        text=True,
        errors="replace",
        env=env,
        cwd=folder,
    )
    if done.returncode or not out.is_file():
        out.unlink(missing_ok=True)
        raise TunebookError(_why(done.stderr, done.returncode, model))


def _why(log: str, status: int, model: Path) -> str:
    """The converter's failure as a sentence."""
    if re.search(
        r"No space left|Not enough free space|File too large|\d+ requested and \d+ written", log
    ):  # the last is numpy's wording
        return f"No space left on the disk while converting {model} to GGUF; free some room and run the same command again."
    if "pre-tokenizer was not recognized" in log:
        return (
            f"The tokenizer in {model} splits text in a way that llama.cpp's converter does not know, so a GGUF of it would read other tokens "
            "than were trained; keep the base's own tokenizer, with its tokens only added to."
        )
    if "is not supported" in log or "not supported!" in log:
        return f"llama.cpp's converter does not know the architecture of {model}; choose another base, or export the adapter and safetensors alone."
    if status in (-9, 137):
        return f"The conversion of {model} was killed, most likely because the memory is full; close other programs and run it again."
    lines = [line.strip() for line in log.splitlines() if line.strip() and "%|" not in line]  # its progress comes last
    return f"llama.cpp's converter stopped on {model}: {lines[-1][:300] if lines else f'status {status}'}"


def _parent(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent
