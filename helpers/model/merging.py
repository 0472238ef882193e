"""Merge a PEFT adapter into its base in 16 bits, one tensor at a time.

The model is built without weights (torch's meta device) and PEFT puts its own layers into it, so that every variant it
knows (LoRA, rsLoRA, DoRA, ranks by pattern, experts, saved modules, trained tokens) is merged by PEFT's code, and
transformers says which parameter each tensor of the files becomes. Then the base's files are streamed: one tensor, or
the experts that are one parameter, is read, unpacked where it is packed, merged in float32, rounded once and written.
Everything else in the folder stays the base's own, but for what training changed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from helpers import compat, display
from helpers.cache import write_json, writing
from helpers.errors import TunebookError
from helpers.model import loading
from helpers.model.loading import load_config
from helpers.model.weights import (
    ADAPTER_REMEDY,
    INDEX,
    TYPES,
    WHOLE,
    Weights,
    check_adapter,
    header,
    made_by,
    reading,
    write_safetensors,
)

# What a model folder holds beside its weights: kept as it is.
KEPT = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "tokenizer.json"),
    *("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md"),
)
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
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


def merge(
    base: Path,
    adapter: Path | None,
    out: Path,
    onto: str = "16bit",
    tokenizer_folder: Path | None = None,
    weights: Weights | None = None,
) -> Merged:
    """Write `out`, a model folder with the base's shards with the adapter merged in, and the tokenizer; whole or not.

    base: model folder; adapter: PEFT folder, None for a plain copy in 16 bits. onto: "16bit", or "nf4" or "fp8" for the
    weights that training saw: those of a 16-bit base after a round trip through that type, those of a packed one as
    they unpack. tokenizer_folder: of the run, for an adapter without a tokenizer. weights: in place of the base's,
    where those were trained. Raises TunebookError for a damaged adapter, one of another base, or "16bit" without such
    weights.
    """
    import torch

    config = load_config(base)
    if onto != "nf4" and (method := loading.quantizer(config)):
        raise TunebookError(
            f"The base in {base} holds only {method} weights, and a merge onto 16 bits needs the 16-bit weights; name "
            "their model in model_16bit, or set merge_onto to 'auto'."
        )
    weights = weights or Weights(base)
    own = adapter if adapter and (adapter / "tokenizer.json").is_file() else tokenizer_folder
    tokenizer = loading.load_tokenizer(own) if own else None
    merger = _Merger(weights, config, adapter, onto, tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        partial = Path(temporary) / "model"
        partial.mkdir()
        threads = torch.get_num_threads()
        # Small tensors gain nothing from more, and threads that wait for each other made it 4 times slower when busy.
        torch.set_num_threads(max(1, threads // 2))
        try:
            with writing(out):
                tensors, size = merger.write(partial)
        finally:
            torch.set_num_threads(threads)
        write_settings(base, partial, tokenizer, merger.dtype, merger.rows, merger.untied)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    return Merged(out, merger.changed, tensors, size, merger.untied)


# ---------------------------------------------------------------- the model without weights


def _skeleton(base: Path, model: Any, adapter: Path) -> Any:
    """The PEFT model on the meta device, with only the adapter's weights real: each in its place, none left over."""
    from peft import PeftConfig, get_peft_model
    from safetensors.torch import load_file

    remedy = f"it does not fit the base in {base}: {ADAPTER_REMEDY}"
    with reading("The adapter", adapter, remedy):
        tensors = {k: v.float() for k, v in load_file(adapter / "adapter_model.safetensors").items()}
        lora = PeftConfig.from_pretrained(adapter)
        lora.base_model_name_or_path = None  # which base this is was checked; PEFT would warn of another name
        compat.adapters_as_named()
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


def _rows(adapter: Path, config: dict[str, Any], rows: int) -> int:
    """Rows of the embedding that the adapter was trained with, when tokens were added: those that it saved whole, or
    enough for the tokens that it trained."""
    held = header(adapter / "adapter_model.safetensors")
    whole = next((e.shape[0] for k, e in held.items() if "embed_tokens" in k and k.endswith(".weight")), None)
    trained = config.get("trainable_token_indices") or []
    ids = [i for part in trained.values() for i in part] if isinstance(trained, dict) else trained
    return whole or max([rows, *(i + 1 for i in ids)])


def _saved_name(name: str) -> str:
    """Name under which PEFT saves a parameter, less the closing ".weight" that some kinds have and some don't."""
    return name.replace(".modules_to_save.default", "").replace(".default", "").removesuffix(".weight")


# ---------------------------------------------------------------- shard by shard


class _Merger:
    """Turns the base's tensors into their merged form. rows: of the embedding, with those of added tokens."""

    def __init__(self, weights: Weights, config: Any, adapter: Path | None, onto: str, tokenizer: Any) -> None:
        import torch

        text = config.get_text_config()
        self.weights, self.changed, self.untied, self.rows = weights, 0, False, text.vocab_size
        self.tied = bool(getattr(text, "tie_word_embeddings", False))
        self.kind = "F16" if config.dtype == torch.float16 else "BF16"
        self.dtype = getattr(torch, TYPES[self.kind])
        self.wide = config.dtype == torch.float32  # then every tensor is rounded, else vectors may have kept 32 bits
        self.waiting: dict[str, Any] = {}
        self.rounded: set[str] = set()
        self.round_trip: Any = partial(nf4_round_trip, dtype=self.dtype, double=double_quant(adapter))
        self.converted: dict[str, Any] = {}
        self.conversion: Any = None
        self.input = self.output = ""
        if adapter is None and onto == "16bit":
            return
        if adapter is not None:
            self.rows = _rows(adapter, check_adapter(adapter), self.rows)
            if tokenizer is not None and loading.grown(tokenizer, weights.base):
                self.rows = max(self.rows, len(tokenizer))
        text.vocab_size = self.rows
        with torch.device("meta"), reading("The model", weights.base, "this transformers does not know its shape."):
            model = loading.auto_class(config).from_config(config, trust_remote_code=False)
        names = {id(m): n for n, m in model.named_modules()}
        self.input = f"{names.get(id(model.get_input_embeddings()))}.weight"
        self.output = f"{names.get(id(model.get_output_embeddings()))}.weight"
        self.conversion = compat.Conversion(model, weights.entries)
        if onto == "nf4" and not weights.states:  # the linear layers that transformers puts into 4 bits
            linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            self.rounded = linear - {self.output}
        elif onto == "fp8":
            from helpers.model import fp8

            self.round_trip = lambda tensor: fp8.dense(*fp8.quantize(tensor))
            self.rounded = {f"{name}.weight" for name in fp8.layers(model)[0]}
        if adapter is not None:
            self.waiting = compat.adapted(_skeleton(weights.base, model, adapter))

    def write(self, out: Path) -> tuple[int, int]:
        """Write every shard to `out`; returns (tensors, their bytes)."""
        weight_map: dict[str, str] = {}
        size = 0
        for shard in self.weights.files:
            entries = list(self._entries(shard))
            tensors = (self._merged(name, key) for *_, name, key in entries)
            size += write_safetensors(out / shard.name, [entry[:3] for entry in entries], tensors)
            weight_map.update((name, shard.name) for name, *_ in entries)
        if self.waiting:
            raise TunebookError(
                f"The adapter changes {min(self.waiting)}, which the base's files do not hold under that name; "
                "name the base it was trained on."
            )
        if [f.name for f in self.weights.files] != ["model.safetensors"]:
            write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        return len(weight_map), size

    def _entries(self, shard: Path) -> Iterator[tuple[str, tuple[int, ...], str, str, str]]:
        """(name, shape, kind, tensor of the files, parameter that it becomes) of what `shard` becomes."""
        alone = self.output not in map(self._key, self.weights.entries)
        for name, entry in self.weights.entries.items():
            if entry.file != shard:
                continue
            shape, key = self.weights.shape(name), self._key(name)
            vector = entry.kind == "F32" and len(shape) < 2 and not self.wide
            kind = entry.kind if vector or (entry.kind in WHOLE and name not in self.weights.states) else self.kind
            if key in (self.input, self.output):
                shape = (max(self.rows, shape[0]), *shape[1:])  # rows may have been added
            yield name, shape, kind, name, key
            if self.tied and key == self.input and alone and self._tie_broken(name):
                self.untied = True  # the adapter changes one of two shared matrices: the output gets one of its own
                yield self.output, shape, kind, name, self.output

    def _key(self, name: str) -> str:
        return self.conversion.target.get(name, name) if self.conversion else name

    def _tie_broken(self, name: str) -> bool:
        import torch

        if not {self.input, self.output} & self.waiting.keys():
            return False
        waiting, changed = dict(self.waiting), self.changed
        same = torch.equal(self._merged(name, self.input), self._merged(name, self.output))
        if same:
            waiting.pop(self.output, None)
        self.waiting, self.changed = waiting, changed
        return not same

    def _merged(self, name: str, key: str) -> Any:
        """A tensor of the files as it is after the merge."""
        if name in self.converted:
            return self.converted.pop(name)
        group = self.conversion.groups.get(key) if self.waiting else None
        tensor = self.weights.read(name)
        if group and self.waiting.keys() & self.conversion.targets(key):
            made = self.conversion.forward(key, {n: tensor if n == name else self.weights.read(n) for n in group})
            merged = {k: self._changed(k, v).to(self.dtype) for k, v in made.items()}
            self.converted |= self.conversion.back(key, merged)
            return self.converted.pop(name)
        if key in self.rounded:
            tensor = self.round_trip(tensor.to(self.dtype))
        return self._changed(key, tensor)

    def _changed(self, key: str, tensor: Any) -> Any:
        import torch

        if key in (self.input, self.output) and self.rows > len(tensor):  # those that no adapter trained never win
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(self.rows - len(tensor), -1)])
        if (module := self.waiting.pop(key, None)) is None:
            return tensor
        self.changed += 1
        with reading("The adapter on the base", self.weights.base, "PEFT cannot merge it: serve it beside its base."):
            return compat.merged_weight(module, tensor)


def check_parent(original: Path, packed: Path) -> None:
    """Raises TunebookError unless the model in `original` is the one that `packed` was quantised from, by the shapes of
    all tensors and the values of some: packed again, they may differ by a third of what packing costs."""
    config, ours, theirs = load_config(original), Weights(original), Weights(packed)
    no = f"model_16bit names {original}, which is not what the base in {packed} was quantised from"
    if not theirs.states or loading.quantizer(config):
        what = "the base is not quantised" if not theirs.states else "that model is quantised itself"
        raise TunebookError(f"model_16bit names {original}, and {what}; leave it empty, or name 16-bit weights.")
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)  # then one file may hold the output too
    for name in sorted(ours.entries.keys() | theirs.entries.keys()):
        was, ought = (list(held.shape(name)) if name in held.entries else "missing" for held in (ours, theirs))
        if was != ought and not (tied and ought == "missing"):
            raise TunebookError(f"{no}: {name} is {was} there and {ought} in the base; name its parent.")
    names = sorted(theirs.states)
    for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1])):
        mine, saw = ours.read(name).float(), theirs.read(name).float()
        again = packed_again(mine, theirs.parts(name)).float()
        differs, cost = (float((x - again).square().mean().sqrt()) for x in (saw, mine))
        if not differs <= 0.3 * cost:
            found = f"differ by {differs:.2g} where packing costs {cost:.2g}"
            raise TunebookError(f"{no}: the weights of {name} {found} (root mean square); name its parent.")


def packed_again(tensor: Any, parts: dict[str, Any]) -> Any:
    """`tensor` after the round trip through the packing that `parts` tell of."""
    from bitsandbytes import functional

    if "SCB" in parts:
        largest = tensor.float().abs().amax(1, keepdim=True)
        return (tensor.float() * (127 / largest)).round() * (largest / 127)
    state = functional.QuantState.from_dict(dict(parts), device=tensor.device)
    options = {"blocksize": state.blocksize, "compress_statistics": state.nested, "quant_type": state.quant_type}
    packed, new = functional.quantize_4bit(tensor.to(state.dtype), **options)
    return functional.dequantize_4bit(packed, new).reshape(tensor.shape)


def double_quant(adapter: Path | None) -> bool:
    """Whether training rounded the scales of its 4-bit base too, as the manifest beside the adapter says."""
    return made_by(adapter).get("params", {}).get("double_quant", True)


def nf4_round_trip(tensor: Any, dtype: Any, double: bool = True) -> Any:
    """A weight as QLoRA's forward pass saw it: 4-bit NormalFloat (`double`: scales in 8 bits) and back, in `dtype`."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        tensor.to(dtype), blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    return functional.dequantize_4bit(packed, state).to(dtype).reshape(tensor.shape)


# ---------------------------------------------------------------- files


def write_settings(
    base: Path, out: Path, tokenizer: Any = None, dtype: Any = None, rows: int = 0, untied: bool = False
) -> None:
    """Write the base's own files beside the weights in `out`, changed only where training changed the model.

    tokenizer: the trained one; dtype: of the weights; rows: of the embedding; untied: it isn't shared any more.
    """
    for name in KEPT:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    with reading("The model's settings", base, "download it again."):
        raw = json.loads((base / "config.json").read_text())
        config = json.loads(json.dumps(raw))
        parts = [config, *(v for k, v in config.items() if k in ("text_config", "llm_config") and isinstance(v, dict))]
        config.pop("quantization_config", None)
        for part in parts:
            labels = {"dtype", "torch_dtype"} & set(part) or ({"dtype"} if part is config else set())
            part.update({label: str(dtype).removeprefix("torch.") for label in labels if dtype is not None})
            if rows and part.get("vocab_size", rows) < rows:
                part["vocab_size"] = rows
            if untied:
                part["tie_word_embeddings"] = False
        if tokenizer is not None:
            _write_tokenizer(base, out, tokenizer, parts)
        if config != raw:
            write_json(out / "config.json", config)


def _write_tokenizer(base: Path, out: Path, tokenizer: Any, parts: list[dict[str, Any]]) -> None:
    """What training changed of the tokenizer: tokens, template, special tokens and so the end of an answer."""
    own = loading.load_tokenizer(base, mended=False)
    if loading.tokenizer_hash(own) == loading.tokenizer_hash(tokenizer) and all(
        getattr(own, part) == getattr(tokenizer, part) for part in (*SPECIAL, "chat_template")
    ):
        return
    if loading.tokenizer_hash(own) != loading.tokenizer_hash(tokenizer):
        tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    file = out / "tokenizer_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    changed = {part: getattr(tokenizer, part) for part in SPECIAL if getattr(own, part) != getattr(tokenizer, part)}
    if "added_tokens_decoder" in settings or (out / "tokenizer.model").is_file():  # what the converter reads beside it
        fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        settings["added_tokens_decoder"] = {
            str(i): {f: getattr(token, f) for f in fields} for i, token in tokenizer.added_tokens_decoder.items()
        }
    if own.chat_template != tokenizer.chat_template:
        settings.pop("chat_template", None)
        (out / "chat_template.json").unlink(missing_ok=True)
        (out / "chat_template.jinja").write_text(tokenizer.chat_template or "", encoding="utf-8")
    write_json(file, settings | changed)
    if changed and (out / "special_tokens_map.json").is_file():
        write_json(out / "special_tokens_map.json", json.loads((out / "special_tokens_map.json").read_text()) | changed)
    ids = {f"{part}_id": getattr(tokenizer, f"{part}_id") for part in changed if part != "unk_token"}
    for part in parts:
        part |= {name: i for name, i in ids.items() if name in part or part is parts[0]}
    file = out / "generation_config.json"
    if ids and file.is_file():
        generation = json.loads(file.read_text())
        if "eos_token_id" in ids:  # generation stopped at these too
            before = generation.get("eos_token_id")
            before = before if isinstance(before, list) else [before]
            ids["eos_token_id"] = list(dict.fromkeys(i for i in (ids["eos_token_id"], *before) if i is not None))
        write_json(file, generation | ids)
