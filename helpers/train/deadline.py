"""How fast a job is and how many of its steps fit into `max_minutes`: measured before it, and again as it goes.

`probe`: before training, the row with the most tokens (on a GPU) and ordinary ones go forward and back through the
job's own trainer. It corrects the plan and finds in seconds what would run out of memory later; no weight and no random
state changes. What it says of a run's length is a first estimate, since a row is not a step and the machine may become
busy. `Deadline` estimates anew from the steps that were made, at the shares of the time in `REVIEWS`, and stretches or
shortens what is left of the schedule. The learning rate is a function of the share of the run that is done, and that
share goes on from where it is, faster or slower: no jump in the rate, and the run ends where the schedule does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from helpers import compat, machine
from helpers.display import percent, say
from helpers.errors import TunebookError
from helpers.params import TrainingParams
from helpers.planner import cost_model
from helpers.planner.cost_model import grades_of, offload_fits
from helpers.planner.plan import Plan
from helpers.train import config, distributed, examples, methods, task_score

REVIEWS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)  # shares of the time at which the steps are counted anew
STEP, FORWARD, SAVE_S = 1.1, 0.4, 1.0  # a step over its rows; forward alone; a checkpoint: until they are measured


def steps_that_fit(
    left_s: float, step_s: float, pause_s: float, timetable: Callable[[int], dict[str, Any]], done: int, whole: int
) -> int:
    """Total steps of a run that has made `done`: one more at least, as many as `left_s` has room for, `whole` at most.

    pause_s: an evaluation with its checkpoint, as often as the `timetable` of so many steps says and at the end.
    """
    total = whole
    for _ in range(4):  # how often a run pauses depends on how long it is
        times = timetable(total)
        every = min(times["eval_steps"], times["save_steps"])
        between = pause_s / every if every < total - done else 0.0
        total = min(whole, done + max(1, int((left_s - pause_s) / (step_s + between))))
    return total


def first_estimate(job: Any) -> tuple[int, float]:
    """(steps of a built `job.TrainJob` that fit, seconds of an evaluation with its checkpoint), by its plan."""
    limit, plan = job.deadline, job.planned
    left_s, step_s = limit.seconds - limit.elapsed, STEP * plan.tokens / plan.steps / plan.tokens_per_s
    lengths = examples.lengths_of(job.held_out) if job.held_out is not None else []
    pause_s = SAVE_S + FORWARD * sum(lengths) / plan.tokens_per_s
    free_s = left_s - (limit.score.reserve(pause_s) if limit.score else 0.0)
    total = steps_that_fit(free_s, step_s, pause_s, limit.timetable, 0, plan.steps)
    return (max(total, min(2, plan.steps)) if left_s > 0 else total), pause_s  # the second one can still be taken back


class Deadline(TrainerCallback, ExportableState):
    """Ends a run and its schedule when `max_minutes` are over; every decision is in the checkpoint, for a resumed run.

    total: steps that are to be made; pause_s: estimate of an evaluation with its checkpoint; both are set before the
    run. anchors: (step, share of the schedule done there) of every decision.
    """

    def __init__(self, params: TrainingParams, clock: Callable[[], float] = time.monotonic) -> None:
        self.params, self.seconds, self.clock, self.began = params, params.max_minutes * 60, clock, clock()
        self.total, self.pause_s, self.before, self.reviewed = 0, 0.0, 0.0, 0
        self.anchors: list[tuple[int, float]] = [(0, 0.0)]
        self.plain: list[float] = []  # seconds from the end of one step to that of the next
        self.paused: list[float] = []  # the same, of those with an evaluation or a checkpoint between
        self.pausing, self.scored = False, 0.0
        self.score: Any = None  # the `task_score.TaskScore` of the run

    def timetable(self, total: int) -> dict[str, Any]:
        """As `config.timetable`; where the task is scored, a short run pauses for that and at its end alone."""
        times, p = config.timetable(self.params, total), self.params
        if self.score and self.seconds <= 60 * task_score.SHORT_MINUTES and not (p.eval_steps or p.save_steps):
            times["eval_steps"] = times["save_steps"] = max(1, total)
        return times

    @property
    def elapsed(self) -> float:
        return self.before + self.clock() - self.began

    def state(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("total", "pause_s", "anchors", "reviewed")}
        return {"args": {}, "attributes": {**kept, "before": self.elapsed}}

    def done(self, step: int) -> float:
        """Share of the schedule that is behind a step."""
        steps, shares = zip(*self.anchors, (self.total, 1.0), strict=True)
        return float(np.interp(step, steps, shares))

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if state.global_step:
            for name, value in state.stateful_callbacks["Deadline"]["attributes"].items():
                setattr(self, name, value)
        self.whole, state.max_steps, self.last = state.max_steps, self.total, self.elapsed
        self.scored = self.score.spent if self.score else 0.0  # of a resumed run, or on what it begins with

        def in_time(rate: Callable[[float], float]) -> Callable[[int], float]:
            return lambda step: rate(self.done(step) * self.whole)

        lr_scheduler.lr_lambdas = [in_time(rate) for rate in lr_scheduler.lr_lambdas]

    def on_step_end(self, args, state, control, **kwargs):
        now, step, scored = self.elapsed, state.global_step, self.score.spent if self.score else 0.0
        # The score of the task has a budget of its own, so an expensive first time says nothing of the later ones.
        (self.paused if self.pausing else self.plain).append(now - self.last - max(0.0, scored - self.scored))
        self.last, self.scored, self.pausing = now, scored, control.should_evaluate or control.should_save
        if control.should_training_stop:
            return
        total = distributed.shared(lambda: self._review(step, now))  # by the first one's clock
        if total != self.total:
            if machine.kernel() is None:  # a notebook's bar shows it
                say(f"{percent(now / self.seconds, 0)} of the time: {total} steps fit, not {self.total}.")
            self.anchors.append((step, self.done(step)))
            times = self.timetable(total)
            self.total = state.max_steps = total
            state.eval_steps, state.save_steps = times["eval_steps"], times["save_steps"]

    def _review(self, step: int, now: float) -> int:
        """The number of steps, decided anew when it is time to, and before the last one."""
        due = sum(now >= share * self.seconds for share in REVIEWS)
        if due == self.reviewed and step < self.total - 1:
            return self.total
        self.reviewed = due
        # The machine as it is now; a process's first step prepares kernels and memory.
        step_s = statistics.mean(self.plain[max(1, len(self.plain) // 2) :] or self.plain or self.paused)
        pause_s = max(0.0, statistics.mean(self.paused) - step_s) if self.paused else self.pause_s
        left_s = self.seconds - now - (self.score.reserve(pause_s) if self.score else 0.0)
        return steps_that_fit(left_s, step_s, pause_s, self.timetable, step, self.whole)


# ---------------------------------------------------------------- the probing row


def probe(job: Any) -> Plan:
    """The plan of a built `job.TrainJob`, corrected by a few rows; more activations are checkpointed until they fit.

    Raises TunebookError when nothing is left to checkpoint. Sharded jobs (FSDP2) are not probed: their model is put
    together only inside the training loop.
    """
    plan = job.planned
    if distributed.sharded(job.params):
        return plan
    while True:
        try:
            return plan.correct(**_measure(job.trainer, job.model, plan))
        except torch.cuda.OutOfMemoryError:
            job.trainer.graphs = None  # of the pass that did not fit
            torch.cuda.empty_cache()
            plan = _lighter(job, plan)


def _measure(trainer: Any, model: Any, plan: Plan) -> dict[str, float | None]:
    """{peak_gib, tokens_per_s}: on a GPU memory of the heaviest row and median speed of three ordinary ones; on a CPU,
    where a row takes long, speed of one."""
    cuda = plan.card.capability is not None
    sizes = trainer.rows.costs()
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    median = len(order) // 2
    ordinary = [trainer.rows[i] for i in order[max(0, median - 1) : median + 2]]
    # First rows warm up: a GPU's of a shape compiles kernels, its second meets the gradients of the first where rows
    # are accumulated; a CPU's touches its memory for the first time.
    warm, heaviest = 3 if cuda else 1, trainer.rows[order[-1]]
    speeds, new = [], cost_model.new_share(plan.setting.params)
    visits = {False: new, True: 1 - new} if new < 1 else {False: 1.0}  # are a row's references known: share of the run
    device, training = trainer.accelerator.device, model.training
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if cuda else []):
            for row in [heaviest, heaviest, ordinary[0], *ordinary] if cuda else ordinary[:2]:
                took = 0.0
                for known, share in visits.items():
                    if plan.accumulation == 1:
                        model.zero_grad(set_to_none=True)
                    if not known:
                        getattr(trainer, "references", {}).clear()
                    began = _now(cuda)
                    batches, items = trainer.get_batch_samples(iter([trainer.row_collator([row])]), 1, device)
                    inputs = send_to_device(batches[0], device)
                    with trainer.accelerator.autocast():
                        loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
                    loss.backward()
                    took += share * (_now(cuda) - began) / inputs["tokens"]
                    del loss, inputs, batches
                speeds.append(1 / took)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        trainer.trained_tokens = 0
        compat.drop_metrics(trainer)
    speed, setting = statistics.median(speeds[warm:] or speeds) * plan.world_size, plan.option.setting
    # The optimizer's state comes with the first real step.
    state = cost_model.trained_parameters(plan.shape, setting) * cost_model.OPTIMIZER_BYTES[setting.params.optimizer]
    peak = (torch.cuda.max_memory_allocated() + state) / 2**30 if cuda else None
    return {"peak_gib": peak, "tokens_per_s": speed}


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _lighter(job: Any, plan: Plan) -> Plan:
    """The plan with the next grade of activation checkpointing, set on the model; TunebookError when there is none."""
    s, shape = plan.option.setting, plan.shape
    grades = [grade for grade in grades_of(shape.layers) if grade > (s.recompute, s.offload, s.tile_mlp)]
    s = replace(s, graphs=False)
    settings = (replace(s, recompute=layers, offload=offload, tile_mlp=tile) for layers, offload, tile in grades)
    fitting = (one for one in settings if offload_fits(shape, one, plan.card, plan.world_size))
    setting = next(fitting, None) if plan.backend == "hf" else None
    if setting is None:
        raise TunebookError(
            f"The longest row ({s.row_tokens:,} tokens) ran out of memory on {plan.card.name} before training began; "
            "lower max_length or row_tokens, or set recompute to 'offload'."
        )
    methods.checkpoint_activations(job.model, setting)
    peak = cost_model.peak_gib(shape, replace(setting, accumulates=plan.accumulation > 1))
    offloaded = cost_model.offloaded_gib(shape, setting)
    option = replace(plan.option, setting=setting, peak_gib=peak, offloaded_gib=offloaded)
    why = f"A probing row did not fit with checkpointing of {plan.option.recompute_text}: now {option.recompute_text}."
    say(why)
    return replace(plan, option=option, reasons=(*plan.reasons, why))
