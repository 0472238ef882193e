"""The tensors of a model folder: safetensors headers, read and checked before anything is loaded, and new files written
one tensor at a time. What bitsandbytes packed (NF4, FP4, int8) counts as the matrix that it stands for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from helpers import compat
from helpers.cache import write_json, writing
from helpers.errors import TunebookError

INDEX = "model.safetensors.index.json"
AGAIN = "download or copy it again."
ADAPTER_REMEDY = "name the base that it was trained on, or copy it again."
PICKLED = "pickled files (*.bin, *.pth) are not read, as they may run code: choose a copy of the model with safetensors"
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
WHOLE = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"} | WHOLE
# What bitsandbytes keeps beside a packed weight.
STATE = re.compile(r"(.+\.weight)\.((?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__\w+)$")
STATE_8BIT = re.compile(r"(.+)\.(SCB|weight_format)$")
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "quantization_config")
SAMPLE = 4096  # bytes of each tensor that name it


@contextmanager
def reading(what: str, path: Path, remedy: str) -> Iterator[None]:
    """The one door for foreign model files: whatever a library raises on them becomes one TunebookError.

    A folder that was cut off, edited or made by another version fails in libraries in dozens of ways, so every
    exception is meant; "no space left" keeps its own message.
    """
    try:
        with writing(path):
            yield
    except TunebookError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        said = next((line for line in lines if "size mismatch" in line), lines[0])[:300]
        raise TunebookError(f"{what} in {path} cannot be loaded ({said}); {remedy}") from error


class Entry(NamedTuple):
    """One tensor of a safetensors file; start: its first byte in the file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int

    def bytes(self, most: int | None = None) -> bytes:
        """Its data, or `most` bytes out of the middle."""
        with open(self.file, "rb") as file:
            file.seek(self.start + (max(self.size - most, 0) // 2 if most else 0))
            return file.read(min(self.size, most) if most else self.size)


def header(file: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file. Raises TunebookError for a damaged or truncated one, naming the tensor."""
    found: dict[str, Entry] = {}
    try:
        whole = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(whole - 8, 100_000_000):
                raise ValueError(f"its {whole:,} bytes hold no whole header")
            table = json.loads(opened.read(length))
        for name, entry in table.items():
            if name == "__metadata__":
                continue
            kind, shape, (start, end) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
            if min(shape, default=0) < 0 or (BYTES.get(kind, 0) and math.prod(shape) * BYTES[kind] != end - start):
                raise ValueError(f"{name} is {kind} {list(shape)} and has {end - start:,} bytes")
            if not 0 <= start <= end or 8 + length + end > whole:
                raise ValueError(f"it is truncated: {name} ends at byte {8 + length + end:,} of {whole:,}")
            found[name] = Entry(file, kind, shape, 8 + length + start, end - start)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        said = str(error) if isinstance(error, ValueError | OSError) else "its header is not one of safetensors"
        raise TunebookError(
            f"The weights in {file} cannot be loaded, they are damaged ({said[:300]}); {AGAIN}"
        ) from None
    return found


def shards(base: Path) -> list[Path]:
    """The files that transformers loads: model.safetensors, or those of the index; others beside them do not count.

    Raises TunebookError where one is missing, or where there are none of the kind.
    """
    index, names = base / INDEX, ["model.safetensors"]
    if not (base / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            if bad := next((n for n in names if Path(n).name != n), None):
                raise ValueError(f"{bad!r} is not a file's name")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TunebookError(f"The list of weights {index} cannot be read ({error}); {AGAIN}") from None
    for missing in (n for n in names if not (base / n).is_file()):
        others = sorted(p.name for p in base.glob("*.safetensors"))
        has = f"{missing}, which {INDEX} names" if index.is_file() else f"model.safetensors and {INDEX}"
        has += f"; it has {', '.join(others[:3])}" if others else ""
        raise TunebookError(f"The model in {base} lacks its weights ({has}). Download it again; {PICKLED}.")
    if not names:
        raise TunebookError(f"The list of weights {index} names no file; {AGAIN}")
    return [base / n for n in names]


class Weights:
    """The tensors of a model folder by name. entries: of those that the model has; states: what belongs to packed
    ones. Raises TunebookError for missing, damaged and truncated files, and a tensor that only the index has."""

    def __init__(self, base: Path) -> None:
        self.base, self.files = base, shards(base)
        held = {name: entry for file in self.files for name, entry in header(file).items()}
        self.stored_bytes = sum(entry.size for entry in held.values())
        self.states: dict[str, dict[str, Entry]] = {}
        for name, entry in held.items():
            if match := STATE.match(name) or STATE_8BIT.match(name):
                owner = match[1] if match[1] in held else f"{match[1]}.weight"
                self.states.setdefault(owner, {})[match[2]] = entry
        belonging = {id(entry) for parts in self.states.values() for entry in parts.values()}
        self.entries = {name: entry for name, entry in held.items() if id(entry) not in belonging}
        if self.files[0].name != "model.safetensors":
            named = json.loads((base / INDEX).read_bytes())["weight_map"]
            if lost := next((n for n, file in named.items() if n not in held or held[n].file.name != file), None):
                raise TunebookError(f"The model in {base} lacks {lost}, which {INDEX} puts in {named[lost]}; {AGAIN}")
        if lost := next((n for n in self.states if n not in self.entries), None):
            raise TunebookError(f"The model in {base} lacks {lost} and has only what belongs to it; {AGAIN}")
        for name in self.states:
            self._check_packed(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the matrix that a packed weight stands for, of any other as it is."""
        return tuple(self._state(name).get("shape", self.entries[name].shape))

    def _state(self, name: str) -> dict[str, Any]:
        """Shape and blocks of a 4-bit weight."""
        part = next((e for s, e in self.states.get(name, {}).items() if s.startswith("quant_state")), None)
        return json.loads(part.bytes()) if part else {}

    def _check_packed(self, name: str) -> None:
        """Raises TunebookError where a packed weight and what belongs to it do not fit: bitsandbytes' kernels would
        read past the end."""
        parts, entry = self.states[name], self.entries[name]
        with reading(f"The packed {name}", self.base, AGAIN):
            if "SCB" in parts:
                ought = {"SCB": entry.shape[0]}
            else:
                state = self._state(name)
                blocks = -(-math.prod(state["shape"]) // state["blocksize"])
                ought = {"absmax": blocks, "quant_map": 16}
                if "nested_blocksize" in state or "nested_absmax" in parts:
                    ought |= {"nested_absmax": -(-blocks // state["nested_blocksize"]), "nested_quant_map": 256}
                if entry.size != -(-math.prod(state["shape"]) // 2):
                    raise ValueError(f"it has {entry.size:,} bytes, packed from {state['shape']}")
            for part, count in ought.items():
                if part not in parts or math.prod(parts[part].shape) != count:
                    found = f"{part} {list(parts[part].shape)}" if part in parts else f"no {part}"
                    raise ValueError(f"it has {found} where it needs {count:,} numbers")

    def read(self, name: str) -> Any:
        """The tensor, unpacked where it is packed."""
        from safetensors import safe_open

        with reading("The model", self.base, AGAIN), safe_open(self.entries[name].file, "pt") as file:
            tensor = file.get_tensor(name)
            return compat.unpacked(tensor, self.parts(name)) if name in self.states else tensor

    def parts(self, name: str) -> dict[str, Any]:
        """What belongs to a packed weight, by the end of its name."""
        from safetensors import safe_open

        found = {}
        for part, entry in self.states[name].items():
            with safe_open(entry.file, "pt") as file:
                stem = name.removesuffix(".weight") if part in ("SCB", "weight_format") else name
                found[part] = file.get_tensor(f"{stem}.{part}")
        return found


def count_weights(base: Path) -> tuple[int, int]:
    """(weights of the model, weights of its largest tensor), from the headers of its files."""
    weights = Weights(base)
    counts = [math.prod(weights.shape(name)) for name in weights.entries]
    return sum(counts), max(counts, default=0)


def fingerprint(base: Path) -> str:
    """sha256 of what makes a base this one: its config, tokenizer and weights, of each tensor 4 KiB out of its middle:
    an 8B is named in a second, and any training changes them."""
    config = json.loads((base / "config.json").read_bytes())
    kept = {k: v for k, v in config.items() if k not in VOLATILE} if isinstance(config, dict) else config
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    if (base / "tokenizer.json").is_file():
        digest.update((base / "tokenizer.json").read_bytes())
    files = shards(base) if list(base.glob("*.safetensors")) else []
    for name, entry in sorted((n, e) for file in files for n, e in header(file).items()):
        digest.update(f"{name}:{entry.kind}:{entry.shape}".encode() + entry.bytes(SAMPLE))
    return digest.hexdigest()[:16]


def write_safetensors(path: Path, entries: list[tuple[str, tuple[int, ...], str]], tensors: Iterable[Any]) -> int:
    """Stream tensors into one safetensors file (the format's own layout); returns the bytes of tensor data.

    entries: (name, shape, kind as "BF16") in the order in which `tensors` yields them.
    """
    import torch

    head, end = _head(entries)
    with open(path, "wb") as file:
        file.write(head)
        for (name, shape, kind), tensor in zip(entries, tensors, strict=True):
            if tuple(tensor.shape) != tuple(shape):
                raise TunebookError(
                    f"The merged {name} has shape {tuple(tensor.shape)} where {tuple(shape)} was expected; "
                    "the adapter belongs to another base."
                )
            tensor = tensor.to(getattr(torch, TYPES[kind])).contiguous()
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            del tensor
    return end


def stand_in(shard: Path, out: Path, rows: int, wanted: int) -> None:
    """A file without data (sparse) for a shard whose embedding and head have `wanted` rows in place of `rows`."""
    entries = []
    for name, entry in header(shard).items():
        end = entry.shape[:1] == (rows,) and not re.search(r"\.\d+\.", name)
        entries.append((name, (wanted, *entry.shape[1:]) if end else entry.shape, entry.kind))
    head, size = _head(entries)
    with open(out, "wb") as file:
        file.write(head)
        file.truncate(len(head) + size)


def _head(entries: list[tuple[str, tuple[int, ...], str]]) -> tuple[bytes, int]:
    """A safetensors file's bytes before its data, and how many of those there will be."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, kind in entries:
        start, end = end, end + BYTES[kind] * math.prod(shape)
        table[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def sort_adapter_config(adapter: Path) -> None:
    """PEFT writes its sets of names in any order; sorted, the adapters of two identical runs have one hash."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    texts = {k: sorted(v) for k, v in config.items() if isinstance(v, list) and all(isinstance(x, str) for x in v)}
    write_json(file, config | texts)


def made_by(adapter: Path | None) -> dict[str, Any]:
    """The manifest of the training stage that an adapter's folder stands in; {} for an adapter from elsewhere."""
    manifest = adapter.parent / "manifest.json" if adapter else None
    return json.loads(manifest.read_text()) if manifest and manifest.is_file() else {}


def adapter_without_embedding(adapter: Path) -> bool:
    """Whether an adapter leaves the base's embedding and head as they are, but for what its own config names."""
    own = json.loads((adapter / "adapter_config.json").read_bytes()).get("modules_to_save")
    names = header(adapter / "adapter_model.safetensors")
    return bool(own) or not any(name.endswith(".weight") and "lora_" not in name for name in names)


def check_adapter(adapter: Path) -> dict[str, Any]:
    """The adapter's config. Raises TunebookError when the folder is incomplete or damaged, holds NaN, or announces what
    its tensors are not."""
    import torch
    from safetensors import safe_open

    file = adapter / "adapter_model.safetensors"
    if not (adapter / "adapter_config.json").is_file() or not file.is_file():
        pickled = (adapter / "adapter_model.bin").is_file()
        has = "only pickled weights (adapter_model.bin), which are not read" if pickled else "no adapter"
        raise TunebookError(
            f"{adapter} holds {has}; expected adapter_config.json and adapter_model.safetensors, as PEFT saves them."
        )
    held = header(file)
    with reading("The adapter", adapter, "it is damaged: train it again or copy it again."):
        config = json.loads((adapter / "adapter_config.json").read_bytes())
        if config.get("megatron_config"):
            raise ValueError("its megatron_config names code to import")
        ranks = [rank for rank in (config.get("r"), *(config.get("rank_pattern") or {}).values()) if rank is not None]
        largest = max((max(entry.shape, default=0) for entry in held.values()), default=0)
        if bad := next((rank for rank in ranks if not 0 < int(rank) <= largest), None):
            raise ValueError(f"its rank is {bad}, and no tensor in it has more than {largest} rows or columns")
        with safe_open(file, "pt") as opened:
            nan = next((name for name in held if not torch.isfinite(opened.get_tensor(name)).all()), None)
    if config.get("lora_bias"):
        raise TunebookError(f"The adapter in {adapter} has biases of its own (lora_bias); train it again without them.")
    if nan:
        raise TunebookError(
            f"The adapter in {adapter} holds NaN or infinity in {nan}; its training diverged, so train again with a "
            "lower learning rate."
        )
    return config
