"""One probing step before training: it corrects the plan, and finds in seconds what would run out of memory after an hour.

The row with the most tokens goes forward and back through the job's own trainer; no weight and no random state changes.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from helpers.errors import TunebookError
from helpers.planner import cost_model
from helpers.planner.plan import grades_of, waits_in_main_memory
from helpers.train import distributed


def run(work: Any) -> Any:
    """The plan of a built `job.Job`, corrected by one row. With too little memory more is recomputed until the row fits.

    Raises TunebookError when nothing is left to recompute. Sharded jobs (FSDP2) are not probed: their model is put
    together only inside the training loop.
    """
    if distributed.sharded(work.params.method) or not hasattr(work.trainer, "rows"):
        return work.plan
    plan = work.plan
    while True:
        try:
            return plan.correct(**_measure(work, plan))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            plan = _lighter(work, plan)


def _measure(work: Any, plan: Any) -> dict[str, float | None]:
    """{peak_gib, tokens_per_s}: memory of the heaviest row and the middle time of three ordinary ones; on a CPU time of one, the second."""
    trainer, model = work.trainer, work.model
    card = plan.card.capability is not None
    sizes = trainer.rows.costs()
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    middle = len(order) // 2
    ordinary = [trainer.rows[i] for i in order[max(0, middle - 1) : middle + 2]]
    # First rows warm up: a GPU's of a shape compiles kernels, its second meets the gradients of the first where rows are
    # accumulated; a CPU's touches its memory for the first time.
    rows = [trainer.rows[order[-1]]] * 2 + ordinary[:1] + ordinary if card else ordinary[-2:]
    speeds = []
    device, training = trainer.accelerator.device, model.training
    if card:
        torch.cuda.reset_peak_memory_stats()
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if card else []):
            for row in rows:
                if plan.accumulation == 1:
                    model.zero_grad(set_to_none=True)
                batches, items = trainer.get_batch_samples(iter([trainer.row_collator([row])]), 1, device)
                inputs = trainer._prepare_inputs(batches[0])
                tokens = inputs["tokens"]
                began = _now(card)
                with trainer.accelerator.autocast():
                    loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
                loss.backward()
                speeds.append(tokens / (_now(card) - began))
                del loss, inputs, batches
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        trainer.trained_tokens = 0
        if hasattr(trainer, "_stored_metrics"):
            trainer._stored_metrics.clear()
    peak = None
    if card:
        state = (
            cost_model.trained_parameters(plan.shape, plan.option.setting)
            * cost_model.OPTIMIZER_BYTES[plan.option.setting.optimizer]
        )
        peak = (
            torch.cuda.max_memory_allocated() + state
        ) / 2**30  # the optimizer's state comes with the first real step
    timed = speeds[3:] if card else speeds[-1:]
    return {"peak_gib": peak, "tokens_per_s": statistics.median(timed) * plan.world_size}


def _now(card: bool) -> float:
    if card:
        torch.cuda.synchronize()
    return time.perf_counter()


def _lighter(work: Any, plan: Any) -> Any:
    """The plan with the next grade of recomputation, set on the model. Raises TunebookError when there is none."""
    from helpers.train import building

    s = plan.option.setting
    grades = [grade for grade in grades_of(plan.shape.layers) if grade > (s.recompute, s.offload, s.tile_mlp)]
    weighed = (replace(s, recompute=count, offload=offload, tile_mlp=tile) for count, offload, tile in grades)
    heavier = [setting for setting in weighed if waits_in_main_memory(plan.shape, setting, plan.card, plan.world_size)]
    if plan.backend != "hf" or getattr(work.params, "loss", "orpo") != "orpo" or not heavier:
        raise TunebookError(
            f"The longest row ({s.row_tokens:,} tokens) ran out of memory on {plan.card.name} before training began; lower max_length or "
            "row_tokens, or set recompute to 'offload'."
        )
    setting = heavier[0]
    building.recomputing(work.model, setting)
    peak = cost_model.peak_gib(plan.shape, replace(setting, accumulates=plan.accumulation > 1))
    option = replace(
        plan.option, setting=setting, peak_gib=peak, offloaded_gib=cost_model.offloaded_gib(plan.shape, setting)
    )
    why = (
        f"The probing step ran out of memory with {plan.option.recompute_text} recomputed: now {option.recompute_text}."
    )
    print(why, flush=True)
    return replace(plan, option=option, reasons=(*plan.reasons, why))
