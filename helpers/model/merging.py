"""Merge a PEFT adapter into its 16-bit base, one tensor at a time.

The model is built without weights (torch's meta device) and PEFT puts its own layers into it, so that every variant it
knows (LoRA, rsLoRA, DoRA, ranks by pattern, saved modules, trained tokens) is merged by PEFT's code. Then the base's
files are streamed: one tensor is read, merged in float32, rounded once and written. Memory stays near the largest one.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import compat, display
from helpers.cache import write_json, writing
from helpers.errors import TunebookError
from helpers.model.loading import ADAPTER_REMEDY, check_adapter, load_config, load_tokenizer, reading

COPIED = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md")
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Merged:
    """path: the merged folder; changed: tensors that the adapter changed; tensors: all; bytes: of the weights; untied:
    the output layer is no longer shared with the embedding."""

    path: Path
    changed: int
    tensors: int
    bytes: int
    untied: bool

    def __repr__(self) -> str:
        untied = "; the output layer is no longer shared" * self.untied
        what = f"{self.changed} of {self.tensors} tensors changed{untied}" if self.tensors else "merged before"
        return f"{display.size(self.bytes)} in {self.path}: {what}"


def merge(base: Path, adapter: Path | None, out: Path, onto: str = "16bit") -> Merged:
    """Write `out`, a model folder with the base's shards with the adapter merged in, and the tokenizer; whole or not.

    base: folder of the 16-bit base model; adapter: PEFT folder, None for a plain copy in 16 bits. onto: "16bit", or
    "nf4" to merge onto the weights after a round trip through 4-bit NormalFloat, which is the base that QLoRA training
    saw. Raises TunebookError for a damaged adapter, one of another base, or a base that exists only quantised.
    """
    import torch

    config = read_config(base)
    files = shards(base)
    model = _skeleton(base, config, adapter) if adapter is not None else None
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        partial = Path(temporary) / "model"
        partial.mkdir()
        merger = _Merger(model, config, onto)
        threads = torch.get_num_threads()
        # Small tensors gain nothing from more, and threads that wait for each other made it 4 times slower when busy.
        torch.set_num_threads(max(1, threads // 2))
        try:
            with writing(out):
                tensors, size = merger.write(files, partial)
        finally:
            torch.set_num_threads(threads)
        _write_rest(base, adapter, partial, config, merger)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    return Merged(out, merger.changed, tensors, size, merger.untied)


def read_config(base: Path) -> Any:
    """The base's transformers config. Raises TunebookError for an unknown architecture or quantised weights."""
    config = load_config(base)
    if kept := getattr(config, "quantization_config", None):
        method = kept.get("quant_method", "quantised") if isinstance(kept, dict) else "quantised"
        raise TunebookError(
            f"The base in {base} holds only {method} weights; a merge needs the 16-bit weights, so name the base "
            "it was made from."
        )
    return config


# ---------------------------------------------------------------- safetensors files


def shards(base: Path) -> list[Path]:
    """The base's safetensors files; all that its index names must be there."""
    with reading("The list of weights", base, "download the base again."):
        index = base / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = [p.name for p in sorted(base.glob("*.safetensors"))]
        bad = next((n for n in names if not (base / n).is_file() or Path(n).name != n), None)
    if bad or not names:
        raise TunebookError(
            f"The base in {base} lacks its weights ({bad or 'no *.safetensors file'}); download it again."
        )
    return [base / n for n in names]


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a safetensors file, from its header."""
    from safetensors import safe_open

    with reading("The file of weights", file, "it is damaged: download or copy it again."), safe_open(file, "pt") as f:
        return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118  not a dict


def weight_reader(base: Path) -> Callable[[str], Any]:
    """Layer name -> its weight, read from the folder's safetensors when it is asked for."""
    from safetensors import safe_open

    shard_of = {name: shard for shard in shards(base) for name in shapes(shard)}

    def weight_of(layer: str) -> Any:
        with safe_open(shard_of[f"{layer}.weight"], "pt") as file:
            return file.get_tensor(f"{layer}.weight")

    return weight_of


def count_weights(base: Path) -> tuple[int, int]:
    """(weights of the model, weights of its largest tensor), from the headers of its files."""
    counts = [math.prod(shape) for shard in shards(base) for shape in shapes(shard).values()]
    return sum(counts), max(counts)


def write_safetensors(
    path: Path, entries: list[tuple[str, tuple[int, ...]]], dtype: Any, tensors: Iterable[Any]
) -> int:
    """Stream tensors into one safetensors file (the format's own layout); returns the bytes of tensor data.

    entries: (name, shape) in the order in which `tensors` yields them, all of `dtype`, two bytes a weight.
    """
    import torch

    label = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in entries:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), tensor in zip(entries, tensors, strict=True):
            if tuple(tensor.shape) != tuple(shape):
                raise TunebookError(
                    f"The merged {name} has shape {tuple(tensor.shape)} where {tuple(shape)} was expected; "
                    "the adapter belongs to another base."
                )
            file.write(memoryview(tensor.view(torch.int16).numpy()).cast("B"))
            del tensor
    return end


# ---------------------------------------------------------------- the model without weights


def _skeleton(base: Path, config: Any, adapter: Path) -> Any:
    """The PEFT model on the meta device, with only the adapter's weights real: each in its place, none left over."""
    import torch
    from peft import PeftConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    check_adapter(adapter)
    remedy = f"it does not fit the base in {base}: {ADAPTER_REMEDY}"
    with reading("The adapter", adapter, remedy):
        tensors = {k: v.float() for k, v in load_file(adapter / "adapter_model.safetensors").items()}
        lora = PeftConfig.from_pretrained(adapter)
        lora.base_model_name_or_path = None  # which base this is was checked; PEFT would warn of another name
        config.get_text_config().vocab_size = _rows(tensors, lora, config.get_text_config().vocab_size)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        wrapped = get_peft_model(model, lora, low_cpu_mem_usage=True)
        # PEFT's own loader would move the tensors to the base's device, which here is meta.
        places = {_saved_name(name): name for name in wrapped.state_dict() if ".default" in name}
        found = {places.get(_saved_name(key), key): tensor for key, tensor in tensors.items()}
        unexpected = wrapped.load_state_dict(found, strict=False, assign=True).unexpected_keys
    if unexpected:
        raise TunebookError(f"The adapter in {adapter} holds {unexpected[0]}, but {remedy}")
    missing = [n for n, weight in wrapped.named_parameters() if ".default" in n and weight.is_meta]
    if missing:
        raise TunebookError(
            f"The adapter in {adapter} lacks {missing[0]}, which its own adapter_config.json announces; copy it again."
        )
    return wrapped


def _rows(tensors: dict[str, Any], lora: Any, rows: int) -> int:
    """Rows of the embedding that the adapter was trained with, when tokens were added: those that it saved whole, or
    enough for the tokens that it trained."""
    whole = next((len(v) for k, v in tensors.items() if "embed_tokens" in k and k.endswith(".weight")), None)
    trained = getattr(lora, "trainable_token_indices", None) or []
    ids = [i for part in trained.values() for i in part] if isinstance(trained, dict) else trained
    return whole or max([rows, *(i + 1 for i in ids)])


def _saved_name(name: str) -> str:
    """Name under which PEFT saves a parameter, less the closing ".weight" that some kinds have and some don't."""
    return name.replace(".modules_to_save.default", "").replace(".default", "").removesuffix(".weight")


# ---------------------------------------------------------------- shard by shard


class _Merger:
    """Turns one base tensor after another into its merged form."""

    def __init__(self, model: Any, config: Any, onto: str) -> None:
        import torch

        self.changed, self.untied = 0, False
        self.tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        self.dtype = torch.float16 if config.dtype == torch.float16 else torch.bfloat16
        self.modules = {n.removeprefix(PREFIX): m for n, m in model.named_modules()} if model is not None else {}
        self.waiting = {n for n, m in self.modules.items() if compat.is_adapted(n, m)}
        self.input, self.output = _embedding_names(model) if model is not None else ("", "")
        self.rounded = set()
        if onto == "nf4":  # the linear layers that transformers puts into 4 bits: all but the output layer
            plain = {n: getattr(m, "base_layer", m) for n, m in self.modules.items() if ".lora_" not in n}
            self.rounded = {n for n, m in plain.items() if isinstance(m, torch.nn.Linear)} - {self.output}

    def write(self, files: list[Path], out: Path) -> tuple[int, int]:
        """Write every shard to `out`; returns (tensors, their bytes)."""
        weight_map: dict[str, str] = {}
        size = 0
        for shard in files:
            entries = list(self._entries(shard))
            names = [(name, shape) for name, shape, _ in entries]
            tensors = (self._merged(shard, *source) for _, _, source in entries)
            size += write_safetensors(out / shard.name, names, self.dtype, tensors)
            weight_map.update((name, shard.name) for name, _ in names)
        if self.waiting:
            raise TunebookError(
                f"The adapter changes {min(self.waiting)}, which the base's files do not hold under that name; "
                "name the base it was trained on."
            )
        if [f.name for f in files] != ["model.safetensors"]:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(out / "model.safetensors.index.json", index)
        return len(weight_map), size

    def _entries(self, shard: Path) -> Iterator[tuple[str, tuple[int, ...], tuple[str, str]]]:
        """(name, shape, (tensor of the shard, module that changes it)) of what `shard` becomes."""
        held = shapes(shard)
        head = f"{self.output}.weight"
        for name, shape in held.items():
            module = name.rpartition(".")[0]
            own = getattr(self.modules.get(module), "weight", None)
            if own is not None and name.endswith(".weight") and own.shape[1:] == shape[1:]:
                shape = tuple(own.shape)  # rows may have been added to an embedding
            yield name, shape, (name, module)
            if self.tied and name == f"{self.input}.weight" and head not in held and self._tie_broken(shard, name):
                self.untied = True  # the adapter changes one of two shared matrices: the output gets one of its own
                yield head, shape, (name, self.output)

    def _tie_broken(self, shard: Path, name: str) -> bool:
        import torch

        if not {self.input, self.output} & self.waiting:
            return False
        state = set(self.waiting), self.changed
        same = torch.equal(self._merged(shard, name, self.input), self._merged(shard, name, self.output))
        self.waiting, self.changed = state[0] - ({self.output} if same else set()), state[1]
        return not same

    def _merged(self, shard: Path, name: str, module: str) -> Any:
        from safetensors import safe_open

        with safe_open(shard, "pt") as file:
            tensor = file.get_tensor(name)
        if name.endswith(".weight") and module in self.rounded:
            tensor = nf4_round_trip(tensor, self.dtype)
        if name.endswith(".weight") and module in self.waiting:
            self.waiting.discard(module)
            self.changed += 1
            with reading("The adapter on the base", shard, "PEFT cannot merge it: serve it beside its base."):
                tensor = compat.merged_weight(self.modules[module], tensor)
        return tensor.to(self.dtype).contiguous()


def nf4_round_trip(tensor: Any, dtype: Any) -> Any:
    """A weight as QLoRA's forward pass saw it: 4-bit NormalFloat with double quantisation, and back, in `dtype`."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(tensor.to(dtype), blocksize=64, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(packed, state).to(dtype).reshape(tensor.shape)


def _embedding_names(model: Any) -> tuple[str, str]:
    """Names of the input and the output embedding in the base's files."""
    inner = model.get_base_model()
    names = {id(m): n.removeprefix(PREFIX).removesuffix(".base_layer") for n, m in model.named_modules()}
    return names.get(id(inner.get_input_embeddings()), ""), names.get(id(inner.get_output_embeddings()), "")


# ---------------------------------------------------------------- files


def _write_rest(base: Path, adapter: Path | None, out: Path, config: Any, merger: _Merger) -> None:
    """Config, generation settings, licence and tokenizer beside the weights."""
    config.dtype = merger.dtype
    if merger.untied:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    config.save_pretrained(out)
    own = adapter if adapter and (adapter / "tokenizer.json").is_file() else base
    load_tokenizer(own).save_pretrained(out)
    for name in (*COPIED, "tokenizer.model"):
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
