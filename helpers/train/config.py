"""A stage's parameters as the trainers' arguments: steps, schedule, optimizer, precision; and which of them cannot work."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from helpers.errors import TunebookError
from helpers.model.loading import fast_bf16
from helpers.train import distributed

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion": "lion_32bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
LOGGERS = ("trackio", "wandb", "mlflow")
DECAY = 0.2  # share of the steps in which WSD brings the rate down (arXiv:2404.06395 uses 10 to 20 %)
Capability = tuple[int, int] | None


def loss_of(params: Any) -> str:
    """ "sft", "orpo", "dpo", "kto" or "simpo"."""
    return params.loss if params.stage == "orpo" else "sft"


# ---------------------------------------------------------------- what cannot work


def check(params: Any, capability: Capability = None) -> None:
    """Refuse combinations of parameters that cannot work, before anything is loaded.

    capability: the GPU's compute capability, None without one. Raises TunebookError with the reason and the remedy.
    """
    # What one of the two stages lacks has its neutral value here.
    missing = {"neftune_alpha": 0.0, "loss": "sft"}
    for reason in _refusals(SimpleNamespace(**{**missing, **params.as_dict()}), capability):
        raise TunebookError(f"This cannot work: {reason}.")


def _refusals(p: SimpleNamespace, capability: Capability) -> Iterator[str]:
    own_weights = p.method in ("full", "freeze")
    older = capability is not None and capability < (8, 0)
    if p.init == "loftq" and p.method == "lora":
        yield (
            "init 'loftq' starts the adapter at the error of the 4-bit base, and a 16-bit base has none; "
            "set method to 'qlora', or init to 'default'"
        )
    if p.init == "pissa" and p.method == "qlora":
        yield (
            "init 'pissa' takes the main directions out of the base's weights, which cannot be written back into 4 bits; "
            "set method to 'lora', or init to 'default'"
        )
    if p.dora and p.init != "default":
        yield f"dora keeps the base's column norms and init {p.init!r} changes the base; set dora to False or init to 'default'"
    if own_weights and (p.dora or p.rslora or p.init != "default" or p.lora_plus_ratio or p.dropout):
        yield (
            f"method {p.method!r} trains the model's own weights and has no adapter; "
            "take dora, rslora, init, lora_plus_ratio and dropout back, or set method to 'lora'"
        )
    if own_weights and p.start_from not in ("", "base", "sft"):
        yield (
            f"method {p.method!r} has no adapter, so it cannot start from {p.start_from}; "
            "set method to 'qlora' or 'lora', or start_from to nothing"
        )
    if p.lora_plus_ratio > 0 and "adamw" not in p.optimizer:
        yield (
            f"lora_plus_ratio sets two learning rates on AdamW, and optimizer is {p.optimizer!r}; "
            "set optimizer to 'adamw' or 'adamw_8bit', or lora_plus_ratio to 0"
        )
    if 0 < p.lora_plus_ratio < 1:
        yield (
            f"lora_plus_ratio {p.lora_plus_ratio} would make B learn slower than A, which LoRA+ is against; "
            "set it to 1 or more (16 in the paper), or 0 for none"
        )
    if capability is None and p.optimizer.startswith("paged"):
        yield f"optimizer {p.optimizer!r} needs a CUDA GPU and there is none here; set optimizer to 'adamw' or 'adamw_8bit'"
    if capability is None and p.precision == "fp16":
        yield "precision 'fp16' needs a GPU for its loss scaling; set precision to 'auto', 'bf16' or 'fp32'"
    if capability is not None and older and p.precision == "bf16":
        yield (
            f"precision 'bf16' is not native below compute capability 8.0 and this GPU has {capability[0]}.{capability[1]}; "
            "set precision to 'auto' (fp16 with fp32 adapters)"
        )
    if own_weights and (p.precision == "fp16" or (p.precision == "auto" and older)):
        yield (
            f"method {p.method!r} would update fp16 weights, which lose small updates and cannot be unscaled; "
            "set precision to 'fp32', or method to 'lora'"
        )
    if p.backend == "unsloth" and capability is None:
        yield "backend 'unsloth' needs a CUDA GPU and there is none here; set backend to 'auto' or 'hf'"
    if p.backend == "unsloth" and (own_weights or p.dora or p.init != "default"):
        yield f"backend 'unsloth' trains plain LoRA only here; set backend to 'hf' for method {p.method!r}, DoRA, PiSSA or LoftQ"
    if p.backend == "unsloth" and p.precision == "fp32":
        yield "backend 'unsloth' computes in 16 bits and precision is 'fp32'; set backend to 'hf', or precision to 'auto'"
    if p.backend == "unsloth" and p.loss not in ("sft", "orpo"):
        yield f"backend 'unsloth' trains SFT and ORPO only here; set backend to 'hf' for loss {p.loss!r}"
    if p.loss == "kto" and p.batch_size < 2:
        yield "loss 'kto' estimates its divergence from other rows of the batch, and batch_size is 1; set batch_size to 2 or more"
    if p.loss in ("dpo", "kto", "simpo") and p.beta == 0:
        yield f"beta is 0, which leaves {p.loss} no gradient; set beta above 0 (0.1 is usual for DPO and KTO, 2 for SimPO)"
    if p.early_stopping and not p.best_checkpoint:
        yield "early_stopping keeps the best held-out loss, and best_checkpoint is off; set best_checkpoint to True"
    if p.neftune_alpha and p.packing:
        yield (
            "neftune_alpha scales its noise by the length of a row, so packed rows would get less of it; "
            "set packing to False, or neftune_alpha to 0"
        )
    if p.warmup_ratio >= 1.0:
        yield f"warmup_ratio {p.warmup_ratio:g} spends the whole run warming up; set it below 1"


# ---------------------------------------------------------------- precision


@dataclass(frozen=True)
class Precision:
    """load: dtype of the frozen base ("bf16", "fp16", "fp32"); bf16, fp16: the trainer's autocast; reason: for people."""

    load: str
    bf16: bool
    fp16: bool
    reason: str


def precision_of(capability: Capability, asked: str = "auto") -> Precision:
    """bf16 where it is native, fp16 with loss scaling on older GPUs, fp32 as asked and on CPUs without bfloat16 kernels."""
    if asked == "fp32":
        return Precision("fp32", False, False, "fp32 everywhere, as asked")
    if capability is None and asked == "auto" and not fast_bf16():
        return Precision("fp32", False, False, "fp32: this processor has no kernels for bfloat16")
    if capability is None:
        return Precision("bf16", True, False, "bf16 on the CPU, adapters and optimizer in fp32")
    if asked == "fp16" or capability < (8, 0):
        which = f"compute capability {capability[0]}.{capability[1]}"
        return Precision("fp16", False, True, f"fp16 with loss scaling ({which}), adapters in fp32")
    return Precision("bf16", True, False, "bf16, adapters and optimizer in fp32")


# ---------------------------------------------------------------- steps and arguments


def intervals(total: int, params: Any) -> tuple[int, int]:
    """(evaluate every, save every) N steps in a run of `total`. Raises TunebookError where the two cannot go together."""
    save = params.save_steps or params.eval_steps or min(50, max(1, math.ceil(total / 5)))
    evaluate = params.eval_steps or save
    if params.best_checkpoint and save % evaluate:
        raise TunebookError(
            f"save_steps is {save} and eval_steps {evaluate}: the best checkpoint can only be kept where both fall together; "
            f"set save_steps to {math.ceil(save / evaluate) * evaluate}, or best_checkpoint to False."
        )
    return evaluate, save


def timetable(rows: int, params: Any, total: int = 0) -> dict[str, Any]:
    """The arguments that depend on how many optimizer steps there are: `total`, or as many as `rows` training rows take."""
    total = total or params.max_steps or math.ceil(math.ceil(rows / params.batch_size) * params.epochs)
    evaluate, save = intervals(total, params)
    warm = math.ceil(total * params.warmup_ratio)
    decay = {"num_decay_steps": max(1, math.ceil((total - warm) * DECAY))} if params.schedule == "wsd" else {}
    return {
        "max_steps": total,
        "warmup_steps": warm,
        "lr_scheduler_kwargs": decay,
        "eval_steps": evaluate,
        "save_steps": save,
    }


def shorten(arguments: Any, params: Any, total: int) -> None:
    """Change a trainer's arguments, before it trains, to a run of `total` optimizer steps."""
    for name, value in timetable(0, params, total).items():
        setattr(arguments, name, value)


def loggers(names: str) -> list[str]:
    """TensorBoard and the trackers in `names`. Raises TunebookError for an unknown or missing one."""
    found = ["tensorboard"]
    for name in filter(None, (n.strip() for n in names.split(","))):
        if name not in LOGGERS:
            raise TunebookError(
                f"loggers names {name!r}; it takes {', '.join(LOGGERS)}, separated by commas (TensorBoard is always on)."
            )
        if importlib.util.find_spec(name) is None:
            raise TunebookError(
                f"loggers names {name!r}, which is not installed; `pip install {name}`, or leave it out."
            )
        found.append(name)
        project = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME", "trackio": "TRACKIO_PROJECT"}[name]
        os.environ.setdefault(project, "tunebook")
    return found


def arguments(stage: Any, precision: Precision, rows: int, held_out: int, accumulation: int) -> dict[str, Any]:
    """Trainer arguments that all losses share. rows, held_out: how many training and held-out rows there are."""
    import torch

    params, cuda = stage.params, torch.cuda.is_available()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage.path / "tensorboard")
    optimizer = OPTIMIZERS[params.optimizer]
    best = bool(params.best_checkpoint and held_out)
    return {
        **distributed.options(params.method),
        **timetable(rows, params),
        "output_dir": str(stage.path / "checkpoints"),
        "run_name": f"{params.run}-{params.stage}",
        "report_to": loggers(params.loggers),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": params.epochs,
        "learning_rate": params.learning_rate,
        "lr_scheduler_type": SCHEDULES[params.schedule],
        "optim": "adamw_torch_fused" if optimizer == "adamw_torch" and cuda else optimizer,
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
        "seed": params.seed,
        "data_seed": params.seed,
        "bf16": precision.bf16,
        "fp16": precision.fp16,
        "use_cpu": not cuda,
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if held_out else "no",
        "save_strategy": "steps",
        "save_total_limit": params.keep_checkpoints,
        "load_best_model_at_end": best,
        "metric_for_best_model": "eval_loss" if best else None,
        "greater_is_better": False if best else None,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,
    }
