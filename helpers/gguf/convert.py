"""From a Hugging Face folder to a 16-bit GGUF file by llama.cpp's own converter; from a PEFT adapter to a GGUF one.

The converter (packaged, pinned by hash) brings a top-level `gguf` of its own version, and some of its model classes
would run a folder's Python code. So it runs in a process of its own, offline, on a folder without any reference to
foreign code.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError
from helpers.gguf import header, libraries
from helpers.model import merging
from helpers.model.loading import check_adapter
from helpers.model.merging import shards

TYPES_16 = ("f16", "bf16")
COPIED = (
    *("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)


def convert(model: Path, out: Path, outtype: str = "f16", name: str = "") -> Path:
    """Write `out` from the model folder (config, safetensors, tokenizer), whole or not at all. outtype: of `TYPES_16`.

    Raises TunebookError with what the converter said.
    """
    options = ["--outtype", outtype, *(["--model-name", name] if name else [])]
    with _copy(model, out.parent) as folder:
        for path in [*model.glob("*.safetensors"), *model.glob("*.safetensors.index.json")]:
            (folder / path.name).symlink_to(path.resolve())
        made = _run(folder, model, options)
        header.check(made)
        os.replace(made, out)
    return out


def convert_vocabulary(model: Path, out: Path) -> Path:
    """A GGUF with the tokenizer alone, from a folder that needs no weights: what preflight looks at before training."""
    with _copy(model, out.parent) as folder:
        os.replace(_run(folder, model, ["--vocab-only"]), out)
    return out


def architectures() -> set[str]:
    """Hugging Face's names of the architectures that the converter knows."""
    for node in ast.parse((libraries.converter() / "conversion/__init__.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "TEXT_MODEL_MAP":
            return set(ast.literal_eval(node.value)) if node.value else set()
    return set()


@contextmanager
def _copy(model: Path, where: Path) -> Iterator[Path]:
    """A temporary folder in `where` with the small files of `model`, `auto_map` (which names code to run) taken out."""
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert.", dir=where) as work:
        folder = Path(work) / "model"
        folder.mkdir()
        for file in filter(Path.is_file, (model / name for name in COPIED)):
            if file.name not in ("config.json", "tokenizer_config.json"):
                shutil.copyfile(file, folder / file.name)
                continue
            try:
                value = json.loads(file.read_text())
            except ValueError:
                raise TunebookError(f"{file} is not valid JSON; download or merge the model again.") from None
            value.pop("auto_map", None)
            (folder / file.name).write_text(json.dumps(value, ensure_ascii=False))
        yield folder


def _run(folder: Path, model: Path, options: list[str]) -> Path:
    out = folder.parent / "out.gguf"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    script = libraries.converter() / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(folder), "--outfile", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env, cwd=folder)
    if not done.returncode and out.is_file():
        return out
    if "pre-tokenizer was not recognized" in done.stderr:
        raise TunebookError(
            f"The tokenizer in {model} splits text in a way llama.cpp's converter does not know: its GGUF would "
            "read other tokens than were trained; keep the base's own tokenizer, with its tokens only added to."
        )
    if "is not supported" in done.stderr or "not supported!" in done.stderr:
        raise TunebookError(
            f"llama.cpp's converter does not know the architecture of {model}; choose another base, or set "
            "outputs='adapter,merged'."
        )
    raise libraries.failure(f"converting {model} to GGUF", done.stderr, done.returncode)


def convert_adapter(adapter: Path, model: Path, f16: Path, out: Path) -> Path:
    """Write the adapter alone as `out`, for llama.cpp's `--lora`: its base stays one file that many adapters share.

    model: the folder that `f16`, its 16-bit GGUF, was converted from; names and row orders are read off the two.
    Ranks may differ between layers and rsLoRA scales otherwise, so each layer's own scale is written into B. Raises
    TunebookError for adapters that llama.cpp's form cannot hold: DoRA, saved modules, trained tokens, trained biases.
    """
    from peft import PeftConfig
    from peft.utils.other import get_pattern_key
    from safetensors.numpy import load_file

    kind = check_adapter(adapter).get("peft_type")
    tensors = {k.removeprefix(merging.PREFIX): v for k, v in load_file(adapter / "adapter_model.safetensors").items()}
    foreign = next((k for k in tensors if not k.endswith((".lora_A.weight", ".lora_B.weight"))), None)
    if foreign or kind != "LORA":
        raise TunebookError(
            f"The adapter in {adapter} holds {foreign or kind}, which llama.cpp's adapter form has no place for; "
            "export the merged model instead."
        )
    lora = PeftConfig.from_pretrained(adapter)
    layers = sorted(k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight"))
    places = header.places(layers, _weight_of(model), f16)
    arrays: dict[str, Any] = {}
    for layer in layers:
        if layer not in places:
            raise TunebookError(
                f"The adapter in {adapter} cannot be a GGUF adapter: the converter splits or reshapes {layer}; "
                "export the merged model instead."
            )
        a: Any = tensors[f"{layer}.lora_A.weight"].astype("float32")
        b: Any = tensors[f"{layer}.lora_B.weight"].astype("float32")
        alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern, layer), lora.lora_alpha)
        b *= alpha / (len(a) ** 0.5 if lora.use_rslora else len(a))
        name, order = places[layer]
        in_file = b.copy()
        if order is not None:
            in_file[order] = b
        arrays |= {f"{name}.lora_a": a, f"{name}.lora_b": in_file}
    metadata = {"adapter.type": "lora", "adapter.lora.alpha": 0.0}  # 0: llama.cpp does not scale B again
    partial = out.with_name(f".{out.name}.partial")
    header.write(partial, header.check(f16).metadata["general.architecture"], "adapter", metadata, arrays)
    os.replace(partial, out)
    return out


def _weight_of(model: Path) -> Callable[[str], Any]:
    """Layer name -> its weight, read from the folder's safetensors when it is asked for."""
    from safetensors import safe_open

    shard_of: dict[str, Path] = {}
    for shard in shards(model):
        with safe_open(shard, "pt") as file:
            shard_of |= dict.fromkeys(file.keys(), shard)

    def weight_of(layer: str) -> Any:
        with safe_open(shard_of[f"{layer}.weight"], "pt") as file:
            return file.get_tensor(f"{layer}.weight")

    return weight_of
