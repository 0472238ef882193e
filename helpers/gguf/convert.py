"""From a Hugging Face folder to GGUF files by llama.cpp's own code: 16-bit, quantised, and a PEFT adapter alone.

The converter (packaged, pinned by hash) brings a top-level `gguf` of its own version, and some of its model classes
would run a folder's Python code. So it runs in a process of its own, offline, on a folder without any reference to
foreign code. Quantising, too, has a process that may crash alone; an importance matrix of the training data (each
column's mean square of inputs) makes the quantisers weigh a column's rounding error by it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gguf import LlamaFileType

from helpers import compat, worker
from helpers.errors import TunebookError
from helpers.gguf import header, libraries
from helpers.model import layer_kinds, merging, weights
from helpers.model.loading import load_config, load_model
from helpers.model.weights import check_adapter

TYPES_16 = ("f16", "bf16")
# Routers of experts whose function transformers has in its code and not in the config.
SIGMOID: tuple[str, ...] = (
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "exaone_moe",
    "kimi_linear",
    "minimax_m2",
    "nemotron_h",
)
SIGMOID += ("glm4_moe_lite", "glm_moe_dsa", "solar_open")
# Families in which llama.cpp gives every n-th layer full attention and the others a window, whatever the config says.
PERIODS = {"gemma2": 2, "gpt_oss": 2, "cohere2": 4, "exaone4": 4, "gemma3n_text": 5, "gemma3_text": 6}
WORDS = {"linear_attention": "mamba", "full_attention": "attention"}  # the converter's for transformers 5's


class Type(NamedTuple):
    """A GGUF type: bits per weight on a large model, and what the fidelity gates allow: mean KL divergence in nats at
    most, top-1 agreement at least.

    f16 is the proof that the chain is right; the others' bounds are two to three times what SmolLM2-135M shows (93 %
    of top-1 tokens kept by q8_0 on 250 tokens), which loses more to each type than larger models do.
    """

    bits: float
    kl: float
    top1: float


TYPES = {
    "f16": Type(16.0, 1e-4, 0.995),
    "bf16": Type(16.0, 2e-3, 0.98),
    "q8_0": Type(8.5, 0.02, 0.88),
    "q6_k": Type(6.56, 0.05, 0.85),
    "q5_k_m": Type(5.69, 0.15, 0.75),
    "q5_k_s": Type(5.54, 0.15, 0.75),
    "q4_k_m": Type(4.86, 0.25, 0.65),
    "q4_k_s": Type(4.59, 0.3, 0.65),
    "q4_0": Type(4.55, 0.4, 0.6),
    "q3_k_m": Type(3.91, 0.5, 0.5),
    "q3_k_s": Type(3.5, 0.8, 0.4),
    "q2_k": Type(3.17, 2.0, 0.2),
}


def convert(model: Path, out: Path, outtype: str = "f16", name: str = "", only_vocabulary: bool = False) -> Path:
    """Write `out` from the model folder (config, safetensors, tokenizer), whole or not at all. outtype: of `TYPES_16`;
    only_vocabulary: the tokenizer alone, the names and shapes of the weights tried where there are some. Raises
    TunebookError with what the converter said."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert.", dir=out.parent) as work:
        folder, made = Path(work) / "model", Path(work) / "out.gguf"
        folder.mkdir()
        for file in filter(Path.is_file, (model / name for name in merging.KEPT)):
            shutil.copyfile(file, folder / file.name)
        for file in filter(Path.is_file, (folder / "config.json", folder / "tokenizer_config.json")):
            with weights.reading("The model's settings", model / file.name, "download or merge the model again."):
                value = json.loads(file.read_text())
            value.pop("auto_map", None)  # names code to run
            for part in (value, value.get("text_config") or {}):
                _speak_to_converter(part)
            file.write_text(json.dumps(value, ensure_ascii=False))
        for file in (weights_there := list(model.glob("*.safetensors*"))):
            (folder / file.name).symlink_to(file.resolve())
        process = Path(__file__).with_name("converter_process.py")
        command = [sys.executable, "-E", str(process), str(libraries.converter()), str(folder), "--outfile", str(made)]
        command += ["--outtype", outtype, *(["--vocab-only"] if only_vocabulary else [])]
        command += ["--plan"] if only_vocabulary and weights_there else []
        command += ["--model-name", name] if name else []
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env, cwd=folder)
        if done.returncode or not made.is_file():
            raise _refusal(model, done.stderr, done.returncode)
        header.check(made)
        os.replace(made, out)
    return out


def _speak_to_converter(config: dict[str, Any]) -> None:
    """Put back what transformers 5 leaves out of a config that it saves, or has other words for. Raises TunebookError
    for an order of layers that llama.cpp has no place for."""
    kind, layers = str(config.get("model_type")), config.get("layer_types") or []
    if kind in SIGMOID:  # the converter takes a softmax where nothing is said
        config.setdefault("scoring_func", "sigmoid")
    if config.get("layers_block_type"):
        config.setdefault("num_hidden_layers", len(config["layers_block_type"]))
    if not config.get("num_local_experts", 1):  # a dense model, whatever would be chosen of none
        config.pop("num_experts_per_tok", None)
    if kind.startswith("gemma4") and "head_dim" in config:
        full: dict[str, Any] = next(iter((config.get("per_layer_config") or {}).values()), {})
        config.setdefault("global_head_dim", full.get("head_dim", config["head_dim"]))
        config.setdefault("num_global_key_value_heads", full.get("num_key_value_heads"))
    if kind == "mpt":
        config["architectures"] = ["MPTForCausalLM"]
    if config.get("topk_method") == "greedy":  # among all experts, and not in groups
        config |= {"n_group": 1, "topk_group": 1}
    if kind == "gpt2":
        config.setdefault("n_ctx", config.get("n_positions"))
    part = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    if kind in ("gpt_neox", "cohere2"):
        config.setdefault("rotary_pct", part)
    if kind == "bamba":
        config.setdefault("attn_rotary_emb", int(part * config["hidden_size"] // config["num_attention_heads"]))
    for name in ("layer_types", "layers_block_type"):
        if kind in ("granitemoehybrid", "nemotron_h") and config.get(name):
            config[name] = [WORDS.get(layer, layer) for layer in config[name]]
    if kind.startswith(("qwen3_next", "qwen3_5")) and "linear_attention" in layers:
        config.setdefault("full_attention_interval", [*layers, "full_attention"].index("full_attention") + 1)
    if why := _unlike(kind, config, layers):
        raise TunebookError(f"llama.cpp takes {kind} with {why}; choose another base, or set outputs='adapter,merged'.")


def _unlike(kind: str, config: dict[str, Any], layers: list[str]) -> str:
    """What llama.cpp's code for a family has fixed, or has no setting for, where this model has it otherwise."""

    def every(n: int, found: list[bool]) -> bool:
        return found == [bool((i + 1) % n) for i in range(len(found))]

    linear = [layer == "linear_attention" for layer in layers]
    if any(linear) and "full_attention_interval" in config and not every(config["full_attention_interval"], linear):
        return f"full attention in every n-th layer alone, and this model's layers are {', '.join(layers)[:200]}"
    windows, period = [layer == "sliding_attention" for layer in layers], PERIODS.get(kind, 0)
    if kind == "exaone4" and any(windows) and len(layers) != 64:
        return f"a sliding window at 64 layers alone, and this model has {len(layers)}"
    other = not every(period, windows) if period else False
    other |= config.get("sliding_window_pattern", period) not in (None, period) and bool(period)
    if other and (any(windows) or kind != "exaone4"):
        return f"full attention in every {period}th layer alone, and this model's layers are otherwise"
    if kind == "afmoe":
        return "other logits than transformers has (by a mean KL of 0.003 nats on a tiny model)"
    if kind.startswith("llama4") and config.get("attention_chunk_size", 8192) not in (None, 8192):
        return f"chunks of 8,192 tokens, and this model's are of {config['attention_chunk_size']:,}"
    rotated = [bool(layer) for layer in config.get("no_rope_layers") or []]
    if kind in ("smollm3", "llama4_text") and not every(4, rotated):
        return "a rotary embedding in all but every 4th layer, and this model's layers are otherwise"
    groups = config.get("mamba_n_groups") or config.get("n_groups") or 1
    if kind in ("bamba", "granitemoehybrid", "mamba2") and groups > 1:
        return f"a norm for each group of a Mamba layer, and this model has one over its {groups} groups"
    rope, states = config.get("position_embedding_type") == "rope", {"mamba", "linear_attention"} & {*layers}
    if kind == "granitemoehybrid" and layers and rope == bool(states):
        return "a rotary embedding where it has no Mamba layers, and there alone"
    return ""


def lost_window(model: Path, file: Path) -> int:
    """The sliding window, in tokens, of a model that llama.cpp runs without one; 0 where it has none or keeps it."""
    text, summary = load_config(model).get_text_config(), header.check(file)
    window, kinds = getattr(text, "sliding_window", None) or 0, getattr(text, "layer_types", None)
    kept = f"{summary.metadata['general.architecture']}.attention.sliding_window" in summary.metadata
    kept &= text.model_type != "phi3"  # which reads it and does without
    reached = window < getattr(text, "max_position_embeddings", 2**30) and (not kinds or "sliding_attention" in kinds)
    return window if summary.tensors and reached and not kept else 0


def _refusal(model: Path, log: str, status: int) -> TunebookError:
    if "pre-tokenizer was not recognized" in log:
        return TunebookError(
            f"The tokenizer in {model} splits text in a way llama.cpp's converter does not know: its GGUF would "
            "read other tokens than were trained; keep the base's own tokenizer, with its tokens only added to."
        )
    if unknown := re.search(r"(?:Model|Architecture) '?(\w+)'? (?:is )?not supported", log):
        return TunebookError(
            f"llama.cpp's converter does not know {unknown[1]}, the architecture of {model}; choose another base, or "
            "set outputs='adapter,merged'."
        )
    return libraries.failure(f"converting {model} to GGUF", log, status)


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
    held = weights.Weights(model)
    places = header.places(layers, lambda layer: held.read(f"{layer}.weight"), f16)
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
        arrays |= {f"{name}.lora_a": a, f"{name}.lora_b": b.copy()}
        arrays[f"{name}.lora_b"][order] = b
    metadata = {"adapter.type": "lora", "adapter.lora.alpha": 0.0}  # 0: llama.cpp does not scale B again
    header.write(out, header.check(f16).metadata["general.architecture"], "adapter", metadata, arrays)
    return out


# ---------------------------------------------------------------- quantised


@dataclass(frozen=True)
class Quantised:
    """A finished file. bits_per_weight: of tensor data, without header and tokenizer; types: tensors of each, which for
    widths that are no multiple of 256 are others than the K-quants asked for."""

    type: str
    path: Path
    bytes: int
    bits_per_weight: float
    types: dict[str, int]


def parse_types(text: str) -> list[str]:
    """ "q8_0, Q4_K_M" -> ["q8_0", "q4_k_m"]. Raises TunebookError for a name that is none of `TYPES`."""
    names = list(dict.fromkeys(t.strip().lower() for t in text.split(",") if t.strip()))
    unknown = next((n for n in names if n not in TYPES), None)
    if unknown or not names:
        raise TunebookError(f"quantizations is {unknown or text!r}; it takes {', '.join(TYPES)}, separated by commas.")
    return names


def quantize(source: Path, out: Path, kind: str, imatrix: Path | None = None, again: bool = False) -> Quantised:
    """Write `out` from the 16-bit file `source`, whole or not at all. kind: a name of `TYPES`; imatrix: what
    `importance` wrote; again: `source` is quantised already. Raises TunebookError with llama.cpp's own message."""
    header.check(source)
    partial = out.with_name(f".{out.name}.partial")
    request: dict[str, Any] = {"library": str(libraries.for_quantizing()), "source": str(source), "out": str(partial)}
    request |= {"type": LlamaFileType[f"MOSTLY_{kind.upper()}"].value, "imatrix": str(imatrix or ""), "again": again}
    try:
        worker.run("helpers.gguf.libraries:quantize", request, wall_s=None, name="llama.cpp")
        header.check(partial)
        os.replace(partial, out)
    except TunebookError as error:
        raise libraries.failure(f"quantising {source.name} to {kind}", str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    return describe(out, kind)


def describe(path: Path, kind: str) -> Quantised:
    """Size and types of a file that is there."""
    summary = header.check(path)
    types = Counter(t.tensor_type.name for t in summary.tensors)
    bits = 8 * sum(int(t.n_bytes) for t in summary.tensors) / sum(int(t.n_elements) for t in summary.tensors)
    return Quantised(kind, path, summary.bytes, round(bits, 3), dict(types.most_common()))


# ---------------------------------------------------------------- importance


def importance(merged: Path, f16: Path, rows: Sequence[Sequence[int]], out: Path) -> Path:
    """Write the importance matrix `out` in llama.cpp's GGUF form: NAME.in_sum2 and NAME.counts for each tensor, of
    stacked experts one after another for those tokens that the router sent there.

    merged: the model folder that `f16` was converted from; rows: token ids of training conversations. Gathered in
    torch; llama.cpp's own `imatrix` tool gathers the same sums in its runtime.
    """
    import numpy as np
    import torch

    model, summary = load_model(merged).eval(), header.check(f16)
    files = {key: name for name, key in compat.Conversion(model, weights.Weights(merged).entries).target.items()}
    linear = ((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    layers = {files.get(f"{n}.weight", n).removesuffix(".weight"): m for n, m in linear}
    names = header.tensor_names(summary, layers)
    if not names:
        raise TunebookError(f"None of the layers of {merged} has a llama.cpp tensor name; set imatrix=False.")
    sums: dict[str, Any] = {}

    def add(name: str, x: Any, expert: int = 0, of: int = 1) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        total, counts = sums.setdefault(name, (np.zeros((of, x.shape[-1])), np.zeros(of)))
        total[expert] += (x * x).sum(0).double().cpu().numpy()
        counts[expert] += len(x)

    for layer, name in names.items():
        layers[layer].register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
    stacks = {w.untyped_storage().data_ptr(): (n, w) for n, w in layer_kinds.expert_weights(model)}
    model.set_experts_implementation("eager")  # one product for each expert
    shapes = {t.name: tuple(t.shape) for t in summary.tensors if t.name.endswith("_exps.weight")}

    def watch(x: Any, weight: Any) -> None:
        name, stack = stacks.get(weight.untyped_storage().data_ptr(), ("", None))
        if stack is None:
            return
        kinds = ("down",) if "down" in name else ("gate", "up", "gate_up")
        block = re.findall(r"\.(\d+)\.", f".{name}")[-1]
        first = (weight.storage_offset() - stack.storage_offset()) // stack.stride(0)
        for tensor in (f"blk.{block}.ffn_{kind}_exps.weight" for kind in kinds):
            if shapes.get(tensor, ())[:1] == x.shape[-1:] and shapes[tensor][2] == len(stack):
                for number, rows in enumerate(x if weight.dim() == 3 else [x], first):  # all experts in one product
                    add(tensor, rows[rows.any(-1)] if weight.dim() == 3 else rows, number, len(stack))

    with torch.no_grad(), _products(watch):
        for row in rows:
            model(torch.tensor([list(row)], device=model.device))
    metadata = {"imatrix.datasets": ["training data"], "imatrix.chunk_count": len(rows), "imatrix.chunk_size": 512}
    found = {f"{n}.{part}": v for n, both in sums.items() for part, v in zip(("in_sum2", "counts"), both, strict=True)}
    tensors = {n: v.astype(np.float32).reshape(len(v), -1) for n, v in found.items()}
    header.write(out, "imatrix", "imatrix", metadata, tensors)
    return out


def weighed(f16: Path, matrix: Path) -> str:
    """What an importance matrix covers of the matrices of `f16`, and what it does not."""
    inner = (t for t in header.check(f16).tensors if t.name.startswith("blk.") and len(t.shape) > 1)
    every = [t.name for t in inner if t.tensor_type.name != "F32"]  # those are not quantised
    known = {t.name.removesuffix(".counts") for t in header.check(matrix).tensors}
    lost = [name for name in every if name not in known]
    without = f", not {', '.join(lost[:3])}" + f" and {len(lost) - 3} more" * (len(lost) > 3) if lost else ""
    return f"imatrix weighs {len(every) - len(lost)} of {len(every)} matrices{without}"


def _products(seen: Any) -> Any:
    """A context in which torch's matrix products tell `seen(x, weight)`: x (…, columns) as the kernels get it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    place = {aten.mm: 0, aten.bmm: 0, aten.linear: 0, aten.addmm: 1, aten.baddbmm: 1}

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            if (at := place.get(operation.overloadpacket)) is not None:
                seen(*given[at : at + 2])
            return operation(*given, **(named or {}))

    return Products()
