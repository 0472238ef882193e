"""One probing step before training: it corrects the plan, and finds in seconds what would run out of memory later.

The row with the most tokens goes forward and back through the job's own trainer; no weight and no random state changes.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from helpers import compat
from helpers.errors import TunebookError
from helpers.planner import cost_model
from helpers.planner.cost_model import grades_of, offload_fits
from helpers.planner.plan import Plan
from helpers.train import config, distributed, methods


def run(job: Any) -> Plan:
    """The plan of a built `job.TrainJob`, corrected by one row; more activations are checkpointed until the row fits.

    Raises TunebookError when nothing is left to checkpoint. Sharded jobs (FSDP2) are not probed: their model is put
    together only inside the training loop. DPO, KTO and SimPO are not either.
    """
    plan = job.planned
    if distributed.sharded(job.params.method) or config.loss_of(job.params) not in ("sft", "orpo"):
        return plan
    while True:
        try:
            return plan.correct(**_measure(job.trainer, job.model, plan))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            plan = _lighter(job, plan)


def _measure(trainer: Any, model: Any, plan: Plan) -> dict[str, float | None]:
    """{peak_gib, tokens_per_s}: memory of the heaviest row, median speed of three ordinary ones; on a CPU of one."""
    cuda = plan.card.capability is not None
    sizes = trainer.rows.costs()
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    median = len(order) // 2
    ordinary = [trainer.rows[i] for i in order[max(0, median - 1) : median + 2]]
    # First rows warm up: a GPU's of a shape compiles kernels, its second meets the gradients of the first where rows
    # are accumulated; a CPU's touches its memory for the first time.
    rows = [trainer.rows[order[-1]]] * 2 + ordinary[:1] + ordinary if cuda else ordinary[-2:]
    speeds = []
    device, training = trainer.accelerator.device, model.training
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if cuda else []):
            for row in rows:
                if plan.accumulation == 1:
                    model.zero_grad(set_to_none=True)
                batches, items = trainer.get_batch_samples(iter([trainer.row_collator([row])]), 1, device)
                inputs = compat.on_device(trainer, batches[0])
                tokens, began = inputs["tokens"], _now(cuda)
                with trainer.accelerator.autocast():
                    loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
                loss.backward()
                speeds.append(tokens / (_now(cuda) - began))
                del loss, inputs, batches
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        trainer.trained_tokens = 0
        compat.drop_metrics(trainer)
    speed = statistics.median(speeds[3:] if cuda else speeds[-1:]) * plan.world_size
    if not cuda:
        return {"peak_gib": None, "tokens_per_s": speed}
    setting = plan.option.setting  # the optimizer's state comes with the first real step
    state = cost_model.trained_parameters(plan.shape, setting) * cost_model.OPTIMIZER_BYTES[setting.optimizer]
    return {"peak_gib": (torch.cuda.max_memory_allocated() + state) / 2**30, "tokens_per_s": speed}


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _lighter(job: Any, plan: Plan) -> Plan:
    """The plan with the next grade of activation checkpointing, set on the model; TunebookError when there is none."""
    s = plan.option.setting
    for layers, offload, tile in grades_of(plan.shape.layers):
        setting = replace(s, recompute=layers, offload=offload, tile_mlp=tile)
        more = (layers, offload, tile) > (s.recompute, s.offload, s.tile_mlp)
        if plan.backend == "hf" and more and offload_fits(plan.shape, setting, plan.card, plan.world_size):
            break
    else:
        raise TunebookError(
            f"The longest row ({s.row_tokens:,} tokens) ran out of memory on {plan.card.name} before training began; "
            "lower max_length or row_tokens, or set recompute to 'offload'."
        )
    methods.checkpoint_activations(job.model, setting)
    peak = cost_model.peak_gib(plan.shape, replace(setting, accumulates=plan.accumulation > 1))
    offloaded = cost_model.offloaded_gib(plan.shape, setting)
    option = replace(plan.option, setting=setting, peak_gib=peak, offloaded_gib=offloaded)
    why = f"The probing row did not fit with activation checkpointing of {plan.option.recompute_text}: "
    why += f"now {option.recompute_text}."
    print(why, flush=True)
    return replace(plan, option=option, reasons=(*plan.reasons, why))
