"""The adapter alone as a GGUF file, for llama.cpp's `--lora`: its base stays one file that many adapters share.

llama.cpp adds `alpha / rank * (B A) x` to a layer. Ranks may differ between layers and rsLoRA scales otherwise, so each layer's own
scale is written into B, and alpha says nothing more. Row orders that the converter changes (the query and key rows of Llama's
rotary embedding) are changed in B by the converter's own code, in its own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.errors import TunebookError
from helpers.gguf import convert, libraries
from helpers.model import merging

# Runs in the converter's process: argv = model folder, npz of B matrices by transformers' weight name, npz out by GGUF name.
SCRIPT = """
import sys
from pathlib import Path
import numpy as np, torch, gguf
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
folder, source, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
hparams = ModelBase.load_hparams(folder, False)
kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
model = kind(folder, gguf.LlamaFileType.ALL_F32, Path(out), dry_run=True)
made = {}
for name, value in np.load(source).items():
    block = next((int(p) for p in name.split('.') if p.isdigit()), None)
    found = list(model.modify_tensors(torch.from_numpy(value), name, block))
    if len(found) != 1 or found[0][1].shape != value.shape:
        sys.exit(f'{name} is split or reshaped by the converter')
    made[f'{found[0][0]}|{name}'] = found[0][1].numpy()
made['architecture|'] = np.array(gguf.MODEL_ARCH_NAMES[model.model_arch])
np.savez(out, **made)
"""


def write(adapter: Path, model: Path, out: Path) -> Path:
    """Write `out`, atomically. model: a folder of the base's architecture (config and tokenizer are read).

    Raises TunebookError for adapters that llama.cpp's form cannot hold: DoRA, saved modules, trained tokens, trained biases.
    """
    import numpy as np

    pairs = _pairs(adapter, merging.check_adapter(adapter))
    with tempfile.TemporaryDirectory(prefix=".adapter.", dir=out.parent) as work:
        folder = convert.clean_copy(model, Path(work) / "model")
        np.savez(Path(work) / "b.npz", **{f"{n}.weight": b for n, (_, b) in pairs.items()})
        script = Path(work) / "rename.py"
        script.write_text(f"import sys; sys.path.insert(0, {str(libraries.converter())!r})\n{SCRIPT}")
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            [sys.executable, str(script), str(folder), str(Path(work) / "b.npz"), str(Path(work) / "renamed.npz")],
            capture_output=True,
            text=True,
            errors="replace",
            env=env,
        )
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise TunebookError(
                f"The adapter in {adapter} cannot be written as a GGUF adapter ({last[0][:200] if last else done.returncode}); "
                "export the merged model instead."
            )
        partial = Path(work) / "adapter.gguf"
        _write(partial, pairs, dict(np.load(Path(work) / "renamed.npz")))
        os.replace(partial, out)
    return out


def _pairs(adapter: Path, config: dict) -> dict:
    """Layer name -> (A (rank, in), B (out, rank) with the layer's whole scale in it), float32."""
    from peft import LoraConfig, PeftConfig
    from safetensors.numpy import load_file

    tensors = {k.removeprefix(merging.PREFIX): v for k, v in load_file(adapter / "adapter_model.safetensors").items()}
    foreign = next((k for k in tensors if not k.endswith((".lora_A.weight", ".lora_B.weight"))), None)
    if foreign or config.get("peft_type") != "LORA":
        raise TunebookError(
            f"The adapter in {adapter} holds {foreign or config.get('peft_type')}, which llama.cpp's adapter form has no place for; "
            "export the merged model instead."
        )
    lora: LoraConfig = PeftConfig.from_pretrained(adapter)
    pairs = {}
    for name in sorted(k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")):
        a, b = tensors[f"{name}.lora_A.weight"].astype("float32"), tensors[f"{name}.lora_B.weight"].astype("float32")
        alpha = _by_pattern(lora.alpha_pattern, name, lora.lora_alpha)
        scale = alpha / (len(a) ** 0.5 if lora.use_rslora else len(a))
        pairs[name] = (a, b * scale)
    return pairs


def _by_pattern(pattern: dict, name: str, default: float) -> float:
    """PEFT's rule: a pattern matches the end of a module's name, from a dot on."""
    import re

    return next((v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _write(path: Path, pairs: dict, renamed: dict) -> None:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, str(renamed.pop("architecture|")))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    ranks = {len(a) for a, _ in pairs.values()}
    writer.add_float32("adapter.lora.alpha", float(max(ranks)))
    for key, b in renamed.items():
        name, _, layer = key.partition("|")
        a = pairs[layer.removesuffix(".weight")][0]
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(
            f"{name}.lora_b", np.ascontiguousarray(b * (len(a) / max(ranks)))
        )  # llama.cpp scales by alpha / rank
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
