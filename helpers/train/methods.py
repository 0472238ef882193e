"""What is trained, and which combinations of settings cannot work.

`check` holds the whole table of refusals; `trainable` makes a loaded model ready: an adapter put on it or taken up
again, all weights freed, or all but the last layers frozen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError

TIED_TO_CUDA = ("paged_adamw", "paged_adamw_8bit")
# (name of the combination, when it is met, why it cannot work and what to do). Read top to bottom; the first one stops.
REFUSED = (
    (
        "LoftQ on a 16-bit base",
        lambda p, c: p.init == "loftq" and p.method == "lora",
        "init 'loftq' starts the adapter at the error of the 4-bit base, and a 16-bit base has none; set method to 'qlora', or init to 'default'",
    ),
    (
        "PiSSA on a 4-bit base",
        lambda p, c: p.init == "pissa" and p.method == "qlora",
        "init 'pissa' takes the main directions out of the base's weights, which cannot be written back into 4 bits; "
        "set method to 'lora', or init to 'default'",
    ),
    (
        "DoRA with PiSSA or LoftQ",
        lambda p, c: p.dora and p.init != "default",
        "DoRA keeps the base's column norms and {init} changes the base; set dora to False or init to 'default'",
    ),
    (
        "adapter settings without an adapter",
        lambda p, c: (
            p.method in ("full", "freeze")
            and (p.dora or p.rslora or p.init != "default" or p.lora_plus_ratio or p.dropout)
        ),
        "method {method!r} trains the model's own weights and has no adapter; "
        "take dora, rslora, init, lora_plus_ratio and dropout back, or set method to 'lora'",
    ),
    (
        "an adapter to start from without an adapter method",
        lambda p, c: p.method in ("full", "freeze") and _folder(p),
        "method {method!r} has no adapter, so it cannot start from {start_from}; set method to 'qlora' or 'lora', or start_from to nothing",
    ),
    (
        "LoRA+ with its own optimizer",
        lambda p, c: (
            p.lora_plus_ratio > 0 and p.optimizer not in ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
        ),
        "LoRA+ sets two learning rates on AdamW, and optimizer is {optimizer!r}; set optimizer to 'adamw' or 'adamw_8bit', or lora_plus_ratio to 0",
    ),
    (
        "LoRA+ below 1",
        lambda p, c: 0 < p.lora_plus_ratio < 1,
        "lora_plus_ratio {lora_plus_ratio} would make B learn slower than A, which LoRA+ is against; "
        "set it to 1 or more (16 in the paper), or 0 for none",
    ),
    (
        "paged memory without CUDA",
        lambda p, c: c is None and p.optimizer in TIED_TO_CUDA,
        "optimizer {optimizer!r} needs a CUDA card and there is none here; set optimizer to 'adamw' or 'adamw_8bit'",
    ),
    (
        "fp16 on a CPU",
        lambda p, c: c is None and p.precision == "fp16",
        "precision 'fp16' needs a GPU for its loss scaling; set precision to 'auto', 'bf16' or 'fp32'",
    ),
    (
        "bf16 on an older card",
        lambda p, c: c is not None and c < (8, 0) and p.precision == "bf16",
        "precision 'bf16' is not native below compute capability 8.0 and this card has {capability}; "
        "set precision to 'auto' (fp16 with fp32 adapters)",
    ),
    (
        "fp16 full tuning",
        lambda p, c: (
            p.method in ("full", "freeze")
            and (p.precision == "fp16" or (p.precision == "auto" and c is not None and c < (8, 0)))
        ),
        "method {method!r} would update fp16 weights, which lose small updates and cannot be unscaled; set precision to 'fp32', or method to 'lora'",
    ),
    (
        "Unsloth without CUDA",
        lambda p, c: p.backend == "unsloth" and c is None,
        "backend 'unsloth' needs a CUDA card and there is none here; set backend to 'auto' or 'hf'",
    ),
    (
        "Unsloth outside LoRA",
        lambda p, c: p.backend == "unsloth" and (p.method in ("full", "freeze") or p.dora or p.init != "default"),
        "backend 'unsloth' trains plain LoRA only here; set backend to 'hf' for method {method!r}, DoRA, PiSSA or LoftQ",
    ),
    (
        "Unsloth with other preference losses",
        lambda p, c: p.backend == "unsloth" and getattr(p, "loss", "orpo") != "orpo" and p.stage == "orpo",
        "backend 'unsloth' trains ORPO only here; set backend to 'hf' for loss {loss!r}",
    ),
    (
        "KTO in batches of one",
        lambda p, c: p.stage == "orpo" and p.loss == "kto" and p.batch_size < 2,
        "KTO estimates its divergence from other rows of the batch, and batch_size is 1; set batch_size to 2 or more",
    ),
    (
        "a preference loss without weight",
        lambda p, c: p.stage == "orpo" and p.loss in ("dpo", "kto", "simpo") and p.beta == 0,
        "beta is 0, which leaves {loss} no gradient; set beta above 0 (0.1 is usual for DPO and KTO, 2 for SimPO)",
    ),
    (
        "early stopping without evaluation",
        lambda p, c: p.early_stopping > 0 and not p.best_checkpoint,
        "early_stopping keeps the best held-out loss, and best_checkpoint is off; set best_checkpoint to True",
    ),
    (
        "packing and noise",
        lambda p, c: getattr(p, "neftune_alpha", 0) > 0 and p.packing,
        "NEFTune scales its noise by the length of a row, so packed rows would get less of it; set packing to False, or neftune_alpha to 0",
    ),
    (
        "warm-up only",
        lambda p, c: p.warmup_ratio >= 1.0,
        "warmup_ratio 1 spends the whole run warming up; set it below 1",
    ),
)


def _folder(params: Any) -> str:
    """The adapter folder named by start_from; "" for none."""
    return "" if params.start_from in ("", "base", "sft") else params.start_from


class _View:
    """Parameters of either stage under one set of names: what a stage lacks reads as its neutral value."""

    def __init__(self, params: Any):
        self._values = {"neftune_alpha": 0.0, "train_on": "completion", **params.as_dict(), "stage": params.stage}

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "_values")[name]
        except KeyError:
            raise AttributeError(name) from None


def check(params: Any, capability: tuple[int, int] | None = None) -> None:
    """Refuse combinations that cannot work, before anything is loaded.

    capability: the card's compute capability, None without a GPU. Raises TunebookError with the reason and the remedy.
    """
    view = _View(params)
    for name, met, reason in REFUSED:
        if met(view, capability):
            words = {**view._values, "capability": ".".join(map(str, capability or ()))}
            raise TunebookError(f"This cannot work ({name}): {reason.format_map(words)}.")


def lora_config(params: Any, base: str, token_ids: list[int] | None = None) -> Any:
    """PEFT's LoRA configuration for these parameters. base: the model's name, written into the adapter. token_ids: added tokens, trained whole."""
    from peft import LoraConfig

    modules = params.target_modules.strip()
    options = {"init_lora_weights": "pissa_niter_16"} if params.init == "pissa" else {}
    return LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        use_rslora=params.rslora,
        use_dora=params.dora,
        target_modules=modules if modules == "all-linear" else [m.strip() for m in modules.split(",") if m.strip()],
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        trainable_token_indices=token_ids or None,
        **options,
    )


def trainable(
    model: Any,
    params: Any,
    base: Any,
    adapter: str | Path | None = None,
    layers: int = 0,
    token_ids: list[int] | None = None,
) -> Any:
    """`model` ready to train: PEFT-wrapped with a new adapter or with the one in the folder `adapter`, or its own weights freed.

    base: the ModelSource; its name is written into the adapter, its 16-bit weights are what LoftQ starts from.
    layers: for method "freeze", how many of the last decoder layers stay trainable.
    Raises TunebookError for target modules that the model lacks or an adapter of another base.
    """
    import torch

    if params.method in ("full", "freeze"):
        return _own_weights(model, params.method, layers)
    if adapter:
        return _take_up(model, Path(adapter))
    from peft import get_peft_model

    torch.manual_seed(params.seed)  # the adapter's first noise is part of the run
    try:
        wrapped = get_peft_model(model, lora_config(params, base.name, token_ids))
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        linear = sorted(
            {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if "Linear" in type(m).__name__ and "head" not in n}
        )
        raise TunebookError(
            f"target_modules is {params.target_modules!r}, which names no layer of this model; its linear layers are "
            f"{', '.join(linear)}, or say 'all-linear'."
        ) from None
    wrapped.peft_config["default"].base_model_name_or_path = base.name
    if params.init == "loftq":
        _loftq(wrapped, base.path)
    return wrapped


def _loftq(model: Any, folder: Path) -> None:
    """Start every adapter at the main directions of what its layer lost to 4 bits (LoftQ, arXiv:2310.08659, one iteration).

    B·A·scaling is the best rank-r approximation of W - W4. The adapter belongs to the 4-bit base: merge it onto that.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora.bnb import Linear4bit
    from safetensors import safe_open

    files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in safe_open(file, "pt").keys()}
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        key = name.removeprefix("base_model.model.") + ".weight"
        weight = layer.get_base_layer().weight
        with safe_open(files[key], "pt") as opened:
            exact = opened.get_tensor(key).to(weight.device, torch.float32)
        lost = exact - dequantize_4bit(weight.data.view(-1, 1), weight.quant_state).float().view(exact.shape)
        rank = layer.r["default"]
        u, s, v = torch.svd_lowrank(lost, q=min(rank + 8, *lost.shape), niter=8)
        root = (s[:rank] / layer.scaling["default"]).sqrt()
        layer.lora_A["default"].weight.data = (root[:, None] * v[:, :rank].T).contiguous()
        layer.lora_B["default"].weight.data = (u[:, :rank] * root).contiguous()


def _own_weights(model: Any, method: str, layers: int) -> Any:
    from helpers.model.checkpointing import decoder_layers

    model.requires_grad_(method == "full")
    if method == "freeze":
        stack = decoder_layers(model)
        if layers > len(stack):
            raise TunebookError(
                f"freeze_layers is {layers} and the model has {len(stack)} layers; set it to {len(stack)} or less, or method to 'full'."
            )
        stack[-layers:].requires_grad_(True)
    import torch

    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.float32)  # 16-bit weights would round small updates away
    return model


def _take_up(model: Any, folder: Path) -> Any:
    """The adapter in `folder`, trainable, in fp32."""
    import torch
    from peft import PeftModel

    config = folder / "adapter_config.json"
    if not config.is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise TunebookError(
            f"start_from is {str(folder)!r}, which holds no adapter (adapter_config.json, adapter_model.safetensors); "
            "name the adapter folder of a finished run."
        )
    try:
        wrapped = PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (RuntimeError, ValueError, json.JSONDecodeError) as error:
        raise TunebookError(
            f"The adapter in {folder} does not fit this base model ({str(error).splitlines()[0][:200]}); "
            "start from an adapter that was trained on it."
        ) from error
    for weight in wrapped.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.float32)
    return wrapped


def counts(model: Any) -> dict[str, int]:
    """Trainable and all parameters (a packed 4-bit weight counts as the weights that it holds)."""

    def size(weight: Any) -> int:
        state = getattr(weight, "quant_state", None)
        return int(state.shape.numel()) if state is not None else weight.numel()

    return {
        "trainable": sum(size(w) for w in model.parameters() if w.requires_grad),
        "all": sum(size(w) for w in model.parameters()),
    }


def optimizer_of(model: Any, params: Any, arguments: Any) -> tuple[Any, None]:
    """(optimizer, None) for the trainer: LoRA+'s two learning rates, or (None, None) for what the arguments already say."""
    if not params.lora_plus_ratio:
        return None, None
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    rate = options.pop("lr")
    return create_loraplus_optimizer(
        model,
        kind,
        lr=rate,
        loraplus_lr_ratio=params.lora_plus_ratio,
        loraplus_weight_decay=params.weight_decay,
        **options,
    ), None
