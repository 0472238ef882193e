"""Everything that overrides or calls a private part of another library, so that an upgrade is read here only.

`CHECKED` names the version that each was read in; tests/test_compat.py fails when a library changes under it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers.display import say

CHECKED = {"transformers": "5.17.0", "trl": "1.14.0", "accelerate": "1.15.0", "peft": "0.21.2"}
CHECKED |= {"bitsandbytes": "0.50.2", "liger-kernel": "0.8.5"}

# liger-kernel warns about each of its optional backends (CuTe DSL, cuTile) that is not installed; Triton's is there.
logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)

_asked: list[float] = []  # when a hub was asked, since it answered


def hub_in_time() -> None:
    """Make the hub's libraries give up on a server that says nothing for 30 s, and after 45 s that it was silent in at
    once: by themselves they wait for ever, or for 60 s at each of many retries."""
    from huggingface_hub import get_session

    session = get_session()
    hooks = session.event_hooks
    if _give_up not in hooks["request"]:
        answered = [*hooks["response"], lambda response: _asked.clear()]
        session.event_hooks = {"request": [*hooks["request"], _give_up], "response": answered}


def _give_up(request: Any) -> None:
    given, seconds = request.extensions.get("timeout") or {}, float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or 30)
    _asked.append(time.monotonic())
    if _asked[-1] - _asked[0] > 1.5 * seconds:
        seconds = min(1.0, seconds)
    parts = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {part: min(given.get(part) or seconds, seconds) for part in parts}


class CheckpointsOfEitherKind:
    """Mixin for a transformers Trainer: one process loads what a sharded run (FSDP2) saved, and the other way round.

    A sharded run keeps what is trained, and the optimizer's state, in pieces (`write_pieces` and `read_pieces` of the
    trainer). Overrides private methods of Trainer; nothing but tensors is unpickled. `trained`: the weights that have
    gradients; to look for them in every module of a small model takes as long as its GPU needs for a step.
    """

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        import torch

        self.write_pieces(Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.read_pieces(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self: Any) -> None:
        if not self.read_pieces(Path(self.state.best_model_checkpoint)):
            super()._load_best_model()  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        import torch

        own = getattr(self.optimizer, "optimizer", self.optimizer)  # PyTorch's inside accelerate's
        if checkpoint is None or not self.read_pieces(Path(checkpoint), own):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        else:
            schedule = torch.load(Path(checkpoint) / "scheduler.pt", map_location="cpu", weights_only=True)
            self.lr_scheduler.load_state_dict(schedule)

    def _clip_grad_norm(self: Any, model: Any) -> Any:
        if self.is_fsdp_enabled:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)


def drop_metrics(trainer: Any) -> None:
    """Forget what TRL's preference trainers stored for their next log line."""
    getattr(trainer, "_stored_metrics", {}).clear()


def use_one_gpu(arguments: Any) -> Any:
    """Trainer arguments held to one GPU a process: nn.DataParallel would tear packed rows and their losses apart."""
    if arguments.n_gpu > 1:
        count = arguments.n_gpu
        say(f"{count} GPUs are here and this process uses one; `tunebook train --gpus {count} …` uses them all.")
        arguments._n_gpu = 1
    return arguments


def shard(trainer: Any) -> None:
    """Finish the sharding that the trainer's `fsdp` arguments ask for; call it before the model is wrapped.

    accelerate shards on accelerators only: on CPUs its state is set to the same here. Losses, log-probabilities and
    sums of gradients stay in fp32, where accelerate's policy rounds them to the 16 bits that the products are in.
    """
    if trainer.args.fsdp_plugin_args is None:
        return
    import torch
    from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = trainer.accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    if hasattr(trainer.model, "reshard"):  # sharded already: accelerate would look for classes whose names changed then
        state.fsdp_plugin.set_auto_wrap_policy = lambda model: None
    if trainer.args.bf16 or trainer.args.fp16:
        dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


# ---------------------------------------------------------------- used by helpers.model


def liger_cross_entropy() -> Any:
    """liger-kernel's fused output head as (hidden, weight, target, ignored label, "sum" or "none") → loss; None where
    it is not installed. Its autograd function takes its arguments by place."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Head
    except ImportError:
        return None

    def loss(hidden: Any, weight: Any, target: Any, ignore: int, reduction: str) -> Any:
        return Head.apply(hidden, weight, target, None, None, ignore, 0.0, 0.0, reduction)[0]

    return loss


def liger_kernels(model: Any) -> str:
    """liger-kernel's kernels put into `model`, but for experts, which PEFT may have wrapped; what was done."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return "liger kernels left out: liger-kernel is not installed"
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger kernels left out: none for {model.config.model_type}"
    from transformers.integrations.liger import apply_liger_kernel

    dense = not any(".experts." in name for name, _ in model.named_parameters())
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False, "swiglu": dense})
    return "liger RMSNorm, rotary embedding" + " and activation" * dense


def lora_linears(model: Any) -> Iterator[tuple[str, Any]]:
    """(name in the base model, layer) of PEFT's plain and 4-bit LoRA linear layers, without variants such as DoRA."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.bnb import Linear4bit

    for name, layer in model.named_modules():
        plain = type(layer) in (Linear, Linear4bit) and not (layer.lora_variant or getattr(layer, "fan_in_fan_out", 0))
        if plain and "Embedding" not in type(layer.get_base_layer()).__name__:
            yield name.removeprefix("base_model.model."), layer


def plain_adapter(layer: Any) -> str:
    """Name of the one plain adapter that a LoRA layer applies now; "" where its own forward does more than that."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] in layer.lora_variant:
        return ""
    plain = layer.lora_B[active[0]].bias is None and not layer.get_base_layer().weight.requires_grad
    return active[0] if plain else ""


def keep_four_bit_layout(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a CPU's AVX512-BF16 in the first evaluation: the repacked
    bytes mean something else to training, and unpacking rounds the block scales again."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def fp8_product(a: Any, scale_a: Any, b: Any, scale_b: Any, out: Any) -> Any:
    """a bᵀ in bfloat16, of FP8 codes (rows, n) and (columns, n) with an fp32 scale a row of each. PyTorch's private
    call, which writes into `out`; its public one does not."""
    import torch

    scales = {"scale_a": scale_a[:, None], "scale_b": scale_b[None], "out_dtype": torch.bfloat16}
    return torch._scaled_mm(a, b.t(), use_fast_accum=True, out=out, **scales)


def checkpoint_layer(layer: Any, run: Any) -> None:
    """Let a decoder layer of transformers run through `run(forward, *inputs)` in training; None: plainly."""
    layer.gradient_checkpointing = run is not None
    if run is not None:
        layer._gradient_checkpointing_func = run


@contextlib.contextmanager
def adapters_off_meta(apart: bool) -> Iterator[None]:
    """apart: PEFT makes a new adapter's weights on the CPU and leaves them there: the base has none, and on the meta
    device, where it would put them, their first values would be lost."""
    import torch
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    own, replace = BaseTunerLayer._get_base_layer_device_and_dtype, LoraModel._replace_module
    if apart:
        BaseTunerLayer._get_base_layer_device_and_dtype = lambda *of: (torch.device("cpu"), own(*of)[1])
        LoraModel._replace_module = lambda _, parent, name, made, was: setattr(parent, name, made)
    try:
        yield
    finally:
        BaseTunerLayer._get_base_layer_device_and_dtype, LoraModel._replace_module = own, replace


def adapters_as_named() -> None:
    """Let PEFT take a LoRA config that names parameters (experts), and tensors that have a place by name, as they are.
    It renames what transformers 4 named: it would drop dense MLPs, adapt the router, or rename twice (Laguna)."""
    from peft.utils import transformers_weight_conversion as conversion

    own, renamed = (
        getattr(conversion, f"convert_peft_{one}_for_transformers") for one in ("config", "adapter_state_dict")
    )

    def targets(peft_config: Any, *given: Any, **named: Any) -> Any:
        return None if peft_config.target_parameters else own(peft_config, *given, **named)

    def tensors(model: Any, adapter_state_dict: Any, **given: Any) -> Any:
        there = {name.replace(".default", "") for name in model.state_dict()}
        fits = all(name in there for name in adapter_state_dict if ".lora_" in name)
        return adapter_state_dict if fits else renamed(model=model, adapter_state_dict=adapter_state_dict, **given)

    if own.__module__ != __name__:
        conversion.convert_peft_config_for_transformers = targets
        conversion.convert_peft_adapter_state_dict_for_transformers = tensors


def adapted(model: Any) -> dict[str, Any]:
    """Parameter name in the base → the module of a PEFT model that changes it: a layer of PEFT's, or a matrix that the
    adapter holds whole (the rest of the base being on the meta device)."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.")
        if isinstance(module, ParamWrapper):  # one for each parameter, nested around its module
            while name.endswith(".base_layer"):
                name = name.removesuffix(".base_layer")
            found[f"{name}.{module.parameter_name}"] = module
            continue
        if name.endswith((".token_adapter", ".base_layer", ".original_module")) or ".default" in name:
            continue  # parts of such a layer
        if isinstance(module, BaseTunerLayer):
            changes = any(getattr(module, part, None) for part in module.adapter_layer_names)
        else:
            own = dict(module.named_parameters(recurse=False)).get("weight")
            changes = isinstance(module, AuxiliaryTrainingWrapper) or (own is not None and not own.is_meta)
        if changes:
            found[f"{name}.weight"] = module
    return found


def merged_weight(module: Any, tensor: Any) -> Any:
    """One parameter of which `adapted` names the module, merged by PEFT in float32; `tensor` is the base's, with the
    rows of added tokens. Float32, of experts stacked into one in `tensor`'s type."""
    import torch
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]].weight.detach()
    if isinstance(module, ParamWrapper):
        return _merged_experts(module, tensor)
    layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
    inner = layer.get_base_layer() if hasattr(layer, "merge") else layer
    whole = inner.weight  # real where the adapter holds the matrix whole, else on the meta device
    tensor = tensor if whole.is_meta else whole.detach()
    if inner is layer:
        return tensor
    if layer is not module and layer.tied_adapter:
        layer.trainable_tokens_delta = layer.tied_adapter.trainable_tokens_delta
    inner.weight = torch.nn.Parameter(tensor.to(torch.float32, copy=True), requires_grad=False)  # merged in place
    layer.merge(safe_merge=False)  # the adapter was found finite, the sum needs no second look
    merged, inner.weight = inner.weight.detach(), whole
    layer.merged_adapters.clear()
    return merged


def _merged_experts(module: Any, tensor: Any) -> Any:
    """A parameter that PEFT targets by name, one expert after another: their sum in float32 would be several GiB."""
    import torch

    holder, name, adapter = module.get_base_layer(), module.parameter_name, module.active_adapters[0]
    own = getattr(holder, name)
    setattr(holder, name, torch.nn.Parameter(torch.empty(0), requires_grad=False))  # gives the factors type and place
    with torch.no_grad():
        left, right, scale = module.get_delta_factors(adapter)
    setattr(holder, name, own)
    if tensor.dim() == 2:  # of one layer, such as a router
        up, down = module.lora_B[adapter].weight, module.lora_A[adapter].weight
        return torch.addmm(tensor.float(), up.detach(), down.detach(), alpha=scale)
    merged = torch.empty_like(tensor)
    for expert, base in enumerate(tensor):
        merged[expert] = torch.addmm(base.float(), left[expert].detach(), right[expert].detach(), alpha=scale)
    return merged


class Conversion:
    """Which parameter of a transformers model each tensor of its files becomes, and the way back: its own renamings and
    converters (experts stacked into one, `language_model` prefixes), as `from_pretrained` uses them.

    model: on the meta device, without an adapter. target: name in the files → parameter; groups: parameter → the names
    that are converted into it together, where it isn't a matter of the name alone. Foreign names stay out of both.
    """

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(model)
        renamings, converters = ([e for e in mapping if isinstance(e, k)] for k in (WeightRenaming, WeightConverter))
        self.model, known, prefix = model, model.state_dict(), model.base_model_prefix
        self.target: dict[str, str] = {}
        self.groups: dict[str, list[str]] = {}
        self._by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        self._pattern: dict[str, str] = {}
        self._between: dict[str, str] = {}  # name in the files → after the renamings
        for name in sorted(names, key=dot_natural_key):
            key, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if key not in known and name in known:
                key, pattern = name, None
            if key not in known:
                continue
            self.target[name] = key
            if pattern is not None:
                self.groups.setdefault(key, []).append(name)
                self._pattern[name] = pattern
                self._between[rename_source_key(name, renamings, [], prefix, known)[0]] = name

    def missing(self) -> list[str]:
        """The parameters that no tensor of the files becomes, nor one that they are tied to."""
        made = {name for key in self.groups for name in self.targets(key)} | set(self.target.values())
        named = list(self.model.named_parameters(remove_duplicate=False))
        there = {id(weight) for name, weight in named if name in made}
        return [name for name, weight in named if id(weight) not in there]

    def targets(self, key: str) -> set[str]:
        """The parameters that a group becomes: `key`, and those that share its tensors."""
        names = self._by_pattern[self._pattern[self.groups[key][0]]].target_patterns
        return {key.replace(names[0], name) for name in names}

    def forward(self, key: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that the tensors of a group become."""
        converter = copy.deepcopy(self._by_pattern[self._pattern[self.groups[key][0]]])
        for name in self.groups[key]:
            converter.add_tensor(key, name, self._pattern[name], tensors[name])
        made = converter.convert(key, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def back(self, key: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The group's tensors by their names in the files, from the parameters that `forward` gave."""
        converter = self._by_pattern[self._pattern[self.groups[key][0]]].reverse_transform()
        for name, value in parameters.items():
            first, pattern = converter.rename_source_key(name)
            converter.add_tensor(first, name, pattern, value)
        made = converter.convert(first, model=self.model, config=self.model.config)
        return {self._between[n]: value[0] if isinstance(value, list) else value for n, value in made.items()}


# ---------------------------------------------------------------- bitsandbytes


def unpacked(tensor: Any, parts: dict[str, Any]) -> Any:
    """The matrix of a packed weight. parts: what its file keeps beside it, by the end of its name."""
    if "SCB" in parts:
        return tensor.float() * (parts["SCB"].float()[:, None] / 127)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    return dequantize_4bit(tensor, QuantState.from_dict(dict(parts), device=tensor.device))
