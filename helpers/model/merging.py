"""Merge a PEFT adapter into its 16-bit base, one tensor at a time.

The model is built without weights (torch's meta device) and PEFT puts its own layers into it, so that every variant it knows
(LoRA, rsLoRA, DoRA, ranks by pattern, saved modules, trained tokens) is merged by PEFT's code. Then the base's files are
streamed: one tensor is read, merged in float32, rounded once and written. Memory stays near the largest tensor.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import runs
from helpers.errors import TunebookError
from helpers.model.safetensors_files import count_weights, shards, write_safetensors

__all__ = [
    "Merged",
    "check_adapter",
    "count_weights",
    "merge",
    "merged_weight",
    "nf4_round_trip",
    "read_config",
    "shards",
]
COPIED = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md")
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Merged:
    """path: the merged folder; changed: tensors the adapter changed; tensors: all; bytes: of the weights; untied: output layer no longer shared."""

    path: Path
    changed: int
    tensors: int
    bytes: int
    untied: bool

    def __repr__(self) -> str:
        what = (
            f"{self.changed} of {self.tensors} tensors changed"
            if self.tensors
            else "merged before this run was gone on with"
        )
        return f"{self.bytes / 2**20:.0f} MiB in {self.path}: {what}" + (
            "; the output layer is no longer shared" if self.untied else ""
        )


def merge(base: Path, adapter: Path | None, out: Path, onto: str = "16bit", tokenizer: Path | None = None) -> Merged:
    """Write `out`, a model folder with the base's shards, the adapter merged in, and the tokenizer. Whole or not at all.

    base: folder of the 16-bit base model; adapter: PEFT folder, None for a plain copy in 16 bits. onto: "16bit", or "nf4" to merge onto the
    weights as they are after a round trip through 4-bit NormalFloat, which is the base that QLoRA training saw. tokenizer: folder
    to take the tokenizer from when the adapter has none. Raises TunebookError for a damaged adapter, one of another base, or a base that
    exists only quantised.
    """
    config = read_config(base)
    files = shards(base)
    if adapter is not None:
        check_adapter(adapter)
    model = _skeleton(base, config, adapter) if adapter is not None else None
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=_parent(out)) as temporary:
        partial = Path(temporary) / "model"
        partial.mkdir()
        try:
            with _few_threads():
                result = _write_shards(files, partial, model, config, onto)
        except OSError as error:
            raise runs.disk_error(error, out) from error
        _write_rest(base, adapter, tokenizer, partial, config, result["untied"])
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    return Merged(out, result["changed"], result["tensors"], result["bytes"], result["untied"])


def read_config(base: Path) -> Any:
    """The base's transformers config. Raises TunebookError for an unknown architecture or weights that are quantised."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise TunebookError(
            f"The model in {base} is of no architecture that this transformers knows ({str(error).splitlines()[0][:160]}); "
            "choose another base."
        ) from error
    if getattr(config, "quantization_config", None):
        method = (
            config.quantization_config.get("quant_method", "quantised")
            if isinstance(config.quantization_config, dict)
            else "quantised"
        )
        raise TunebookError(
            f"The base in {base} holds only {method} weights; a merge needs the 16-bit weights, so name the base it was made from."
        )
    return config


def check_adapter(adapter: Path) -> dict[str, Any]:
    """The adapter's config. Raises TunebookError when the folder is incomplete, damaged, or holds NaN."""
    import torch
    from safetensors import SafetensorError, safe_open

    if not (adapter / "adapter_config.json").is_file() or not (adapter / "adapter_model.safetensors").is_file():
        has = (
            "only pickled weights (adapter_model.bin), which are not read"
            if (adapter / "adapter_model.bin").is_file()
            else "no adapter"
        )
        raise TunebookError(
            f"{adapter} holds {has}; expected adapter_config.json and adapter_model.safetensors, as PEFT saves them."
        )
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            bad = next((k for k in file.keys() if not torch.isfinite(file.get_tensor(k)).all()), None)
    except (SafetensorError, ValueError, OSError) as error:
        raise TunebookError(
            f"The adapter in {adapter} is damaged ({str(error)[:160]}); train it again or copy it again."
        ) from error
    if bad:
        raise TunebookError(
            f"The adapter in {adapter} holds NaN or infinity in {bad}; its training diverged, so train again with a lower "
            "learning rate."
        )
    return config


# ---------------------------------------------------------------- the model without weights


def _skeleton(base: Path, config: Any, adapter: Path) -> Any:
    """The PEFT model on the meta device, with only the adapter's weights real."""
    import torch
    from peft import PeftConfig, get_peft_model
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}
    lora = PeftConfig.from_pretrained(adapter)
    lora.base_model_name_or_path = (
        None  # which base this is was checked; PEFT would warn that the folder has another name
    )
    rows = _rows(shapes, lora, config.get_text_config().vocab_size)
    if rows != config.get_text_config().vocab_size:  # tokens were added
        config.get_text_config().vocab_size = rows
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    try:
        wrapped = get_peft_model(model, lora, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise TunebookError(
            f"The adapter in {adapter} does not fit the base in {base} ({_first(error)}); "
            "name the base it was trained on."
        ) from error
    _fill(wrapped, adapter, base)
    return wrapped


def _rows(shapes: dict[str, tuple[int, ...]], config: Any, rows: int) -> int:
    """Rows of the embedding that the adapter was trained with: of the one it saved whole, or enough for the tokens it trained."""
    whole = next((s[0] for k, s in shapes.items() if "embed_tokens" in k and k.endswith(".weight")), None)
    trained = getattr(config, "trainable_token_indices", None) or []
    ids = [i for part in trained.values() for i in part] if isinstance(trained, dict) else list(trained)
    return whole or max([rows, *(i + 1 for i in ids)])


def _fill(model: Any, adapter: Path, base: Path) -> None:
    """Put the adapter's tensors into the skeleton, each into its place, none left over and none missing.

    PEFT's own loader would move them to the base's device, which here is meta. Embeddings that the file holds whole, because
    tokens were added, become `merged_weight`'s starting point.
    """
    import torch
    from safetensors import safe_open

    places = {}
    for name, parameter in model.named_parameters():
        if ".default" in name:
            places[_saved_name(name)] = (name, tuple(parameter.shape))
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():
            tensor = file.get_tensor(key).float()
            if key.removesuffix(".weight") not in places:
                owner = (
                    key.replace(".token_adapter.base_layer", "")
                    .replace(".base_layer", "")
                    .removesuffix(".weight")
                    .removeprefix(PREFIX)
                )
                known = {n.removeprefix(PREFIX): m for n, m in model.named_modules()}
                if getattr(known.get(owner.rpartition(".")[0]), "tied_adapter", None):
                    continue  # rows of trained tokens, the same as the embedding's
                if ".lora_" in key or owner not in known:
                    raise TunebookError(
                        f"The adapter in {adapter} does not fit the base in {base}: {key} has no counterpart there; "
                        "name the base it was trained on."
                    )
                known[owner].whole_weight = tensor
                continue
            name, shape = places.pop(key.removesuffix(".weight"))
            if shape != tuple(tensor.shape):
                raise TunebookError(
                    f"The adapter in {adapter} does not fit the base in {base}: {key} has shape {tuple(tensor.shape)} where "
                    f"the base needs {shape}; name the base it was trained on."
                )
            owner, _, leaf = name.rpartition(".")
            holder = model.get_submodule(owner)
            new = torch.nn.Parameter(tensor, requires_grad=False)
            if isinstance(holder, torch.nn.ParameterDict):
                holder[leaf] = new
            else:
                holder._parameters[leaf] = new
    left = [k for k in places if "lm_head.token_adapter" not in k]  # that one follows the embedding's
    if left:
        raise TunebookError(
            f"The adapter in {adapter} lacks {left[0]}, which its own adapter_config.json announces; copy it again."
        )


def _saved_name(name: str) -> str:
    """Name under which PEFT saves a parameter, less the closing ".weight" that some kinds have and some don't."""
    return name.replace(".modules_to_save.default", "").replace(".default", "").removesuffix(".weight")


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)[:240]


# ---------------------------------------------------------------- shard by shard


def _write_shards(shards: list[Path], out: Path, model: Any, config: Any, onto: str) -> dict[str, Any]:
    merger = _Merger(model, config, onto)
    weight_map, total, changed = {}, 0, 0
    for number, shard in enumerate(shards):
        entries = list(merger.plan(shard, last=number == len(shards) - 1))
        name = shard.name
        total += write_safetensors(
            out / name, [(n, shape) for n, shape, _ in entries], merger.dtype, (make() for _, _, make in entries)
        )
        weight_map.update((n, name) for n, *_ in entries)
    merger.check_done()
    changed = merger.changed
    if len(shards) > 1 or shards[0].name != "model.safetensors":
        runs.write_json(
            out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return {"changed": changed, "tensors": len(weight_map), "bytes": total, "untied": merger.untied}


class _Merger:
    """Turns one base tensor after another into its merged form."""

    def __init__(self, model: Any, config: Any, onto: str):
        import torch

        self.model, self.onto, self.changed = model, onto, 0
        self.tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        self.untied = False
        self.dtype = torch.float16 if config.dtype == torch.float16 else torch.bfloat16
        self.modules = {n.removeprefix(PREFIX): m for n, m in model.named_modules()} if model is not None else {}
        self.waiting = {n for n, m in self.modules.items() if _is_adapted(m) and not n.endswith(".token_adapter")}
        self.input, self.output = _embedding_names(model) if model is not None else ("", "")
        self.linear = _quantised_linears(self.modules, self.output) if onto == "nf4" else set()

    def plan(self, shard: Path, last: bool) -> Iterator[tuple[str, tuple[int, ...], Any]]:
        """(name, shape, function that returns the tensor) of what `shard` becomes."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(shard, "pt") as file:
                shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}
        except SafetensorError as error:
            raise TunebookError(f"{shard} is damaged ({error}); download the base again.") from error
        for name, shape in shapes.items():
            module, _, leaf = name.rpartition(".")
            adapted = self.modules.get(module) if leaf == "weight" else None
            shape = _shape_of(adapted, shape)
            yield name, shape, lambda n=name: self._make(shard, n)
            head = f"{self.output}.weight"
            if (
                self.tied
                and leaf == "weight"
                and module == self.input
                and head not in shapes
                and self._tie_broken(shard, name)
            ):
                self.untied = True  # input and output layer are no longer the same: the output gets weights of its own
                yield head, shape, lambda n=name: self._make(shard, n, as_module=self.output)

    def _tie_broken(self, shard: Path, name: str) -> bool:
        """Whether the adapter changes one of two shared embeddings alone."""
        import torch

        if not {self.input, self.output} & self.waiting:
            return False
        before = set(self.waiting)
        same = torch.equal(self._make(shard, name), self._make(shard, name, as_module=self.output))
        self.waiting = before - ({self.output} if same else set())
        self.changed -= len({self.input, self.output} & before)
        return not same

    def _make(self, shard: Path, name: str, as_module: str = "") -> Any:
        from safetensors import safe_open

        with safe_open(shard, "pt") as file:
            tensor = file.get_tensor(name)
        module, _, leaf = name.rpartition(".")
        module = as_module or module
        if leaf == "weight" and module in self.linear:
            tensor = nf4_round_trip(tensor, self.dtype)
        if module in self.waiting and leaf == "weight":
            self.waiting.discard(module)
            self.changed += 1
            tensor = merged_weight(self.modules[module], tensor)
        elif module in self.modules and leaf == "bias" and _is_adapted(self.modules[module]):
            tensor = _merged_bias(self.modules[module], tensor)
        return tensor.to(self.dtype).contiguous()

    def check_done(self) -> None:
        left = sorted(self.waiting)
        if left:
            raise TunebookError(
                f"The adapter changes {left[0]}, which the base's files do not hold under that name; "
                "name the base it was trained on."
            )


def _is_adapted(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper) or hasattr(module, "whole_weight"):
        return True
    return isinstance(module, BaseTunerLayer) and any(getattr(module, n, None) for n in module.adapter_layer_names)


def _shape_of(module: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows may have been added to an embedding that the adapter saved whole."""
    if module is None or not hasattr(module, "weight"):
        return shape
    own = tuple(module.weight.shape)
    return own if len(own) == len(shape) and own[1:] == shape[1:] else shape


def merged_weight(module: Any, tensor: Any) -> Any:
    """Float32 weight of one PEFT layer with its adapter merged in by PEFT; `tensor` is the base's weight. The layer is emptied again."""
    import torch
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]].weight.detach()
    tensor = getattr(module, "whole_weight", tensor)
    layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
    if not hasattr(layer, "merge"):
        return tensor
    if isinstance(module, TrainableTokensWrapper) and layer.tied_adapter:
        layer.trainable_tokens_delta = layer.tied_adapter.trainable_tokens_delta
    if (
        isinstance(module, TrainableTokensWrapper) and module.weight.shape[0] > tensor.shape[0]
    ):  # the rows of added tokens come from the adapter
        tensor = torch.cat([tensor, tensor.new_zeros(module.weight.shape[0] - tensor.shape[0], tensor.shape[1])])
    inner = layer.get_base_layer()
    inner.weight = torch.nn.Parameter(tensor.to(torch.float32, copy=True), requires_grad=False)  # merged in place
    if getattr(inner, "bias", None) is not None:
        inner.bias = torch.nn.Parameter(torch.zeros(inner.bias.shape), requires_grad=False)  # `_merged_bias` sees to it
    try:
        layer.merge(safe_merge=False)  # the adapter was found finite, the sum needs no second look
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise TunebookError(
            f"PEFT cannot merge this adapter ({_first(error)}); serve the adapter beside its base, or train without that "
            "option."
        ) from error
    weight = inner.weight.detach()
    inner.weight = torch.nn.Parameter(torch.empty(tensor.shape, device="meta"), requires_grad=False)
    layer.merged_adapters.clear()
    return weight


def _merged_bias(module: Any, tensor: Any) -> Any:
    """LoRA may train a bias of its own (lora_bias); else the base's is kept."""
    scaling, lora_b = getattr(module, "scaling", None), getattr(module, "lora_B", {})
    name = next(iter(lora_b), None)
    if name is None or lora_b[name].bias is None:
        return tensor
    return tensor.float() + lora_b[name].bias.detach().float() * scaling[name]


def nf4_round_trip(tensor: Any, dtype: Any) -> Any:
    """A weight as QLoRA's forward pass saw it: 4-bit NormalFloat with double quantisation, and back, in `dtype`."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(tensor.to(dtype), blocksize=64, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(packed, state).to(dtype).reshape(tensor.shape)


def _quantised_linears(modules: dict[str, Any], output: str) -> set[str]:
    """Linear layers that transformers puts into 4 bits: all but the output layer."""
    import torch

    return {
        n
        for n, m in modules.items()
        if n != output and isinstance(getattr(m, "base_layer", m), torch.nn.Linear) and ".lora_" not in n
    }


def _embedding_names(model: Any) -> tuple[str, str]:
    """Names of the input and the output embedding in the base's files."""
    inner = model.get_base_model()
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    names = {id(m): n.removeprefix(PREFIX) for n, m in model.named_modules()}
    return tuple(names.get(id(m), "").removesuffix(".base_layer") for m in ends)


# ---------------------------------------------------------------- files


def _write_rest(base: Path, adapter: Path | None, tokenizer: Path | None, out: Path, config: Any, untied: bool) -> None:
    """Config, generation settings, licence and tokenizer beside the weights."""
    import torch

    from helpers.model.loading import load_tokenizer

    config.dtype = torch.float16 if config.dtype == torch.float16 else torch.bfloat16
    if untied:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    config.save_pretrained(out)
    for name in COPIED:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    own = adapter is not None and (adapter / "tokenizer.json").is_file()
    load_tokenizer(adapter if own else tokenizer or base).save_pretrained(out)
    model_file = base / "tokenizer.model"
    if model_file.is_file():
        shutil.copyfile(model_file, out / model_file.name)


@contextmanager
def _few_threads() -> Iterator[None]:
    """Half the cores: small tensors gain nothing from more, and on a busy machine threads that wait for each other made the merge 4 times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parent(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent
