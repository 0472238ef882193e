"""A stage's parameters as trainer arguments: steps, schedule, optimizer, precision; and which cannot work together."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Any

from helpers.errors import TunebookError
from helpers.model.loading import fast_bf16
from helpers.params import OrpoParams, TrainingParams
from helpers.planner import cost_model
from helpers.planner.plan import Plan
from helpers.runs import Stage
from helpers.train import distributed

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion": "lion_32bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
SCHEDULES = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}  # the others under their own names
LOGGERS = {"trackio": "TRACKIO_PROJECT", "wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
LOGGERS |= {"swanlab": "SWANLAB_PROJECT"}
ADAPTERS_OWN = ("dora", "rslora", "dropout", "init", "lora_plus_ratio", "modules_to_save")
NO_ADAPTER = ("", "base", "sft")  # values of start_from that name no folder
EMULATED = "TUNEBOOK_FP8_EMULATED"  # environment: an FP8 base on a CPU too, the same numbers and slow
DECAY = 0.2  # share of the steps in which WSD brings the rate down (arXiv:2404.06395 uses 10 to 20 %)
Capability = tuple[int, int] | None


def loss_of(params: TrainingParams) -> str:
    """ "sft", "orpo", "dpo", "kto" or "simpo"."""
    return params.loss if isinstance(params, OrpoParams) else "sft"


# ---------------------------------------------------------------- what cannot work


def check(params: TrainingParams, capability: Capability = None) -> None:
    """Refuse combinations of parameters that cannot work, before anything is loaded. What Unsloth cannot do,
    `planner.proposals.choose_backend` refuses.

    capability: the GPU's compute capability, None without one. Raises TunebookError with the reason and the remedy.
    """
    for reason in _refusals(params, loss_of(params), capability):
        raise TunebookError(f"This cannot work: {reason}.")


def _refusals(p: Any, loss: str, capability: Capability) -> Iterator[str]:
    own_weights, older = p.method in ("full", "freeze"), capability is not None and capability < (8, 0)
    of_adapter = [name for name in ADAPTERS_OWN if getattr(p, name) not in ("", "default", 0, False)]
    if own_weights and (of_adapter or p.start_from not in NO_ADAPTER):
        taken = f"take {', '.join(of_adapter or ['start_from'])} back, or set method to 'lora'"
        yield f"method {p.method!r} trains the model's own weights and has no adapter; {taken}"
    least, here = (".".join(map(str, version)) for version in (cost_model.FP8_SINCE, capability or ("no GPU",)))
    reasons = {
        f"it needs a GPU of compute capability {least} where here is {here}": not has_fp8(capability),
        f"it is a base for LoRA, and method is {p.method!r}": p.method not in ("auto", "lora"),
        f"its products come out in bf16, and precision is {p.precision!r}": p.precision in ("fp16", "fp32")
        and capability,
        f"{'dora' if p.dora else f'init {p.init!r}'} needs 16-bit weights": p.dora or p.init != "default",
        "backend 'unsloth' has no such base": p.backend == "unsloth",
        "each GPU holds all of it, against shard_weights or cpu_offload": distributed.sharded(p),
    }
    for why in (why for why, true in reasons.items() if true and p.quantize == "fp8"):
        yield f"quantize is 'fp8', and {why}; set quantize to 'auto'"
    if p.init == "loftq" and p.method == "lora":
        yield "init 'loftq' starts at the error of a 4-bit base, and this one has 16 bits; set method to 'qlora'"
    if p.init == "pissa" and p.method == "qlora":
        yield "init 'pissa' changes the base's weights, which 4 bits cannot take back; set method to 'lora'"
    if p.init == "pissa" and distributed.sharded(p):
        yield "init 'pissa' is undone on a whole adapter, and this run is sharded; set init to 'default'"
    if loss in ("dpo", "kto") and distributed.sharded(p) and (p.start_from != "base" or p.init != "default"):
        remedy = "start_from to 'base'" + ", or method to 'qlora'" * (p.method != "qlora")
        yield f"the reference of {loss} is a copy of the adapter, and this run is sharded; set {remedy}"
    if distributed.sharded(p) and p.optimizer not in ("adamw", "sgd"):
        yield f"optimizer {p.optimizer!r} takes no sharded weights, and this run is sharded; set optimizer to 'adamw'"
    if p.modules_to_save and p.init == "pissa":
        yield "init 'pissa' is undone on LoRA weights alone, and modules_to_save adds others; set init to 'default'"
    if p.dora and p.init != "default":
        yield f"dora keeps the base's column norms and init {p.init!r} changes the base; set init to 'default'"
    if p.lora_plus_ratio and "adamw" not in p.optimizer:
        yield f"lora_plus_ratio needs AdamW, and optimizer is {p.optimizer!r}; set optimizer to 'adamw'"
    if 0 < p.lora_plus_ratio < 1:
        yield f"lora_plus_ratio {p.lora_plus_ratio} makes B learn slower than A; set it to 16, or 0 for none"
    if loss == "sft" and p.neftune_alpha and p.packing:
        yield "neftune_alpha scales noise by a row's length, which packing changes; set packing to False"
    if capability is None and p.optimizer.startswith("paged"):
        yield f"optimizer {p.optimizer!r} needs a CUDA GPU and there is none here; set optimizer to 'adamw'"
    if capability is None and p.precision == "fp16":
        yield "precision 'fp16' needs a GPU for its loss scaling; set precision to 'auto', 'bf16' or 'fp32'"
    if older and p.precision == "bf16":
        yield f"precision 'bf16' needs compute capability 8.0 and this GPU has {capability}; set precision to 'auto'"
    if own_weights and (p.precision == "fp16" or (p.precision == "auto" and older)):
        yield f"method {p.method!r} would lose small updates in fp16; set precision to 'fp32', or method to 'lora'"
    if loss == "kto" and p.batch_size < 2 and p.batch_unit == "rows" and p.micro_batch * p.accumulation < 2:
        yield "loss 'kto' needs other rows of the batch, and batch_size is 1; set batch_size to 2 or more"
    if loss in ("dpo", "kto", "simpo") and p.beta == 0:
        yield f"beta is 0, which leaves {loss} no gradient; set beta to 0.1 for DPO and KTO, 2 for SimPO"
    if p.batch_unit != "rows" and not p.packing:
        yield f"batch_unit {p.batch_unit!r} counts what is packed, and packing is False; set batch_unit to 'rows'"
    if p.batch_unit == "packed" and loss != "sft":
        yield f"batch_unit 'packed' counts sequences of SFT, and loss is {loss!r}; set batch_unit to 'rows' or 'tokens'"
    if loss != "sft" and p.sft_as_long and (p.start_from != "sft" or distributed.size() > 1):
        found = f"start_from is {p.start_from!r}" if p.start_from != "sft" else "this is a run on several GPUs"
        yield f"sft_as_long trains the adapter of notebook 02 on one GPU, and {found}; set sft_as_long to False"
    if p.early_stopping and not p.best_checkpoint:
        yield "early_stopping keeps the best held-out loss, and best_checkpoint is off; set best_checkpoint to True"
    if p.warmup_steps and p.warmup_steps >= p.max_steps > 0:
        yield f"warmup_steps {p.warmup_steps} spends all of max_steps {p.max_steps} warming up; set it below that"
    if p.warmup_ratio >= 1.0 and not p.warmup_steps:
        yield f"warmup_ratio {p.warmup_ratio:g} spends the whole run warming up; set it below 1"


def has_fp8(capability: Capability) -> bool:
    """Whether there are FP8 products on a GPU of that compute capability; None: no GPU, where they can be emulated."""
    return capability >= cost_model.FP8_SINCE if capability else bool(os.environ.get(EMULATED))


# ---------------------------------------------------------------- precision


def precision_of(capability: Capability, asked: str = "auto") -> tuple[str, str]:
    """(dtype of the frozen base and of autocast, why): "bf16" where it is native, "fp16" with loss scaling on older
    GPUs, "fp32" when asked or on a CPU without bfloat16."""
    if asked == "fp32":
        return "fp32", "fp32 everywhere, as asked"
    if capability is None and asked == "auto" and not fast_bf16():
        return "fp32", "fp32: this processor has no kernels for bfloat16"
    if capability is None:
        return "bf16", "bf16 on the CPU, adapters and optimizer in fp32"
    if asked == "fp16" or capability < (8, 0):
        which = f"compute capability {capability[0]}.{capability[1]}"
        return "fp16", f"fp16 with loss scaling ({which}), adapters in fp32"
    return "bf16", "bf16, adapters and optimizer in fp32"


# ---------------------------------------------------------------- steps and arguments


def timetable(params: TrainingParams, total: int) -> dict[str, Any]:
    """The arguments that depend on how many optimizer steps there are.

    Raises TunebookError where evaluations and checkpoints do not fall together and the best checkpoint is to be kept.
    """
    save = params.save_steps or params.eval_steps or min(50, max(1, math.ceil(total / 5)))
    evaluate = params.eval_steps or save
    if params.best_checkpoint and save % evaluate:
        raise TunebookError(
            f"save_steps is {save} and eval_steps {evaluate}: the best checkpoint can only be kept where both fall "
            f"together; set save_steps to {math.ceil(save / evaluate) * evaluate}, or best_checkpoint to False."
        )
    warm = min(params.warmup_steps, total) or math.ceil(total * params.warmup_ratio)
    decay = {"num_decay_steps": max(1, math.ceil((total - warm) * DECAY))} if params.schedule == "wsd" else {}
    given = {"max_steps": total, "warmup_steps": warm, "lr_scheduler_kwargs": decay}
    return {**given, "eval_steps": evaluate, "save_steps": save}


def loggers(names: str) -> list[str]:
    """TensorBoard and the trackers in `names`. Raises TunebookError for an unknown or missing one."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        unknown = name not in LOGGERS
        if unknown or importlib.util.find_spec(name) is None:
            why = f"it takes {', '.join(LOGGERS)}" if unknown else "it is not installed: `pip install -e .[trackers]`"
            raise TunebookError(f"loggers names {name!r}, and {why}.")
        os.environ.setdefault(LOGGERS[name], "tunebook")
    return ["tensorboard", *found]


def arguments(stage: Stage, precision: str, plan: Plan, held_out: int) -> dict[str, Any]:
    """Trainer arguments that all losses share. held_out: how many held-out rows there are."""
    import torch

    params: Any = stage.params
    cuda = torch.cuda.is_available()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage.path / "tensorboard")
    optimizer = OPTIMIZERS[params.optimizer]
    return {
        **distributed.options(plan.setting.params),
        **timetable(params, plan.steps),
        "output_dir": str(stage.path / "checkpoints"),
        "run_name": f"{params.run}-{params.stage}",
        "report_to": loggers(params.loggers),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": SCHEDULES.get(params.schedule, params.schedule),
        "optim": "adamw_torch_fused" if optimizer == "adamw_torch" and cuda else optimizer,
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
        "seed": params.seed,
        "data_seed": params.seed,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not cuda,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if held_out else "no",
        "save_total_limit": params.keep_checkpoints,
        "load_best_model_at_end": bool(params.best_checkpoint and held_out),
        "remove_unused_columns": False,
        "gradient_checkpointing": False,  # `model.checkpointing` does it
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,
    }
