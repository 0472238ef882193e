"""A stage's parameters as the trainers' arguments."""

from __future__ import annotations

import math
import os
from typing import Any

from helpers.errors import TunebookError

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


def steps(rows: int, params: Any) -> tuple[int, int, int]:
    """(all optimizer steps, evaluate every, save every) for this many training rows."""
    total = params.max_steps or math.ceil(math.ceil(rows / params.batch_size) * params.epochs)
    return total, *intervals(total, params)


def intervals(total: int, params: Any) -> tuple[int, int]:
    """(evaluate every, save every) so many steps in a run of `total`."""
    save = params.save_steps or params.eval_steps or min(50, max(1, math.ceil(total / 5)))
    evaluate = params.eval_steps or save
    if params.best_checkpoint and save % evaluate:
        raise TunebookError(
            f"save_steps is {save} and eval_steps {evaluate}: the best checkpoint can only be kept where both fall together; "
            f"set save_steps to {math.ceil(save / evaluate) * evaluate}, or best_checkpoint to False."
        )
    return evaluate, save


def warmup(total: int, params: Any) -> tuple[int, dict[str, int]]:
    """(warm-up steps, the schedule's further arguments) of a run of `total` steps."""
    warm = math.ceil(total * params.warmup_ratio) if params.warmup_ratio else 0
    return warm, {"num_decay_steps": max(1, math.ceil((total - warm) * DECAY))} if params.schedule == "wsd" else {}


def shorten(args: Any, params: Any, total: int) -> None:
    """Change a trainer's arguments, before it trains, to a run of `total` optimizer steps."""
    args.max_steps = total
    args.warmup_steps, args.lr_scheduler_kwargs = warmup(total, params)
    args.eval_steps, args.save_steps = intervals(total, params)


def one_gpu(args: Any) -> Any:
    """A trainer's arguments, held to one GPU a process. On a machine with several, transformers would otherwise spread a
    single process's rows over all of them by nn.DataParallel, which packed rows and their losses do not survive."""
    if args.n_gpu > 1:
        print(
            f"{args.n_gpu} GPUs are here and this process uses one; torchrun --nproc-per-node {args.n_gpu} -m helpers.train uses them all."
        )
        args._n_gpu = 1
    return args


def loggers(names: str) -> list[str]:
    """What TensorBoard is joined by. Raises TunebookError for an unknown or missing one."""
    import importlib.util

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
    return found


def common(stage: Any, params: Any, precision: Any, rows: int, held_out: int, accumulation: int) -> dict[str, Any]:
    """Arguments that all trainers share. rows, held_out: how many training and held-out rows there are."""
    import torch

    total, evaluate, save = steps(rows, params)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage.path / "tensorboard")
    for name, value in (
        ("WANDB_PROJECT", "tunebook"),
        ("MLFLOW_EXPERIMENT_NAME", "tunebook"),
        ("TRACKIO_PROJECT", "tunebook"),
    ):
        os.environ.setdefault(name, value)
    warm, options = warmup(total, params)
    optimizer = OPTIMIZERS[params.optimizer]
    if optimizer == "adamw_torch" and torch.cuda.is_available():
        optimizer = "adamw_torch_fused"
    best = bool(params.best_checkpoint and held_out)
    from helpers.train import distributed

    return {
        **distributed.options(params.method),
        "output_dir": str(stage.path / "checkpoints"),
        "run_name": f"{params.run}-{params.stage}",
        "report_to": loggers(params.loggers),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": params.epochs,
        "max_steps": total,
        "learning_rate": params.learning_rate,
        "lr_scheduler_type": SCHEDULES[params.schedule],
        "lr_scheduler_kwargs": options,
        "warmup_steps": warm,
        "optim": optimizer,
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
        "seed": params.seed,
        "data_seed": params.seed,
        "bf16": precision.bf16,
        "fp16": precision.fp16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": evaluate,
        "save_strategy": "steps",
        "save_steps": save,
        "save_total_limit": params.keep_checkpoints,
        "load_best_model_at_end": best,
        "metric_for_best_model": "eval_loss" if best else None,
        "greater_is_better": False if best else None,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }
