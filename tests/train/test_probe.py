"""How long a run takes: the probing rows before it, and the steps that fit into a time, estimated anew as it goes."""

import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import train_data

from helpers import runs
from helpers.errors import Stopped
from helpers.train import config, deadline, resume, task_score, training

SMALL = {
    "batch_size": 4,
    "precision": "fp32",
    "epochs": 3.0,
    "best_checkpoint": False,
    "eval_rows": 2,
    "rank": 4,
    "recompute": "none",
}


@pytest.fixture
def prepared(runs_root, tiny_llama, tokenizer):
    train_data.data_stage(
        "r",
        tiny_llama,
        tokenizer,
        train=train_data.sft_rows(tokenizer, 24),
        held_out=train_data.sft_rows(tokenizer, 4, seed=1),
    )
    return lambda **given: training.open(train_data.settings("sft", **{**SMALL, **given}))


def test_a_probing_step_corrects_the_plan_and_changes_neither_weights_nor_random_numbers(prepared):
    job = prepared(dropout=0.1).build()
    before = {name: weight.detach().clone() for name, weight in job.model.named_parameters() if weight.requires_grad}
    state = torch.get_rng_state()
    job._probe()
    assert job.planned.measured and set(job.planned.errors) == {"tokens_per_s"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(weight, before[name]) and weight.grad is None
        for name, weight in job.model.named_parameters()
        if name in before
    )
    assert job.trainer.trained_tokens == 0 and not job.trainer.step_rows


def test_max_minutes_ends_the_run_and_its_schedule_at_the_steps_that_fit(prepared):
    job = prepared(max_minutes=1e-6, save_steps=1)
    job.train()
    lines = [json.loads(line) for line in job.log.read_text().splitlines()]
    assert job.result["steps"] == 1 == job.trainer.state.max_steps and job.planned.steps == 1
    assert any("what fits into" in note for note in job.notes)
    assert [line["step"] for line in lines if "loss" in line] == [1]
    assert resume.trainer_state(job.checkpoints / "checkpoint-1")["max_steps"] == 1


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def play(guess, step_s, pause_s=4.0, whole=1000, question_s=0.0, asked_first=False, **given):
    """(seconds that a run takes, rates of its linear schedule, totals that it decided) on a machine whose steps take
    `step_s(time)` and whose evaluations `pause_s`; the first estimates were `guess` and 2 seconds. question_s: how long
    each of the task's 32 held-out questions takes."""
    params = train_data.settings("sft", max_minutes=4.0, **given)
    clock = Clock()
    limit = deadline.Deadline(params, clock)
    planned, trainer = SimpleNamespace(tokens_per_s=1e4), SimpleNamespace(state=None)
    job = SimpleNamespace(params=params, deadline=limit, planned=planned, trainer=trainer, adapter=None)
    score = task_score.TaskScore(job, [None] * 32, [[0]] * 32, {}, 64)

    def answer(step, count):
        clock.now += count * question_s
        return {"step": step, "score": 0.5, "n": count, "seconds": count * question_s, "values": [1.0, 0.0] * count}

    score._asked, limit.score = answer, score if question_s else None
    limit.total, limit.pause_s = deadline.steps_that_fit(240.0, guess, 2.0, limit.timetable, 0, whole), 2.0
    course = SimpleNamespace(lr_lambdas=[lambda step: 1 - step / whole])
    times = config.timetable(params, limit.total)
    state = SimpleNamespace(
        global_step=0, max_steps=whole, save_steps=times["save_steps"], eval_steps=times["eval_steps"]
    )
    control = SimpleNamespace(should_evaluate=False, should_save=False, should_training_stop=False)
    trainer.state, args = state, SimpleNamespace(eval_strategy="steps", load_best_model_at_end=True)
    if asked_first:
        score.ask(0, 1.0)
    limit.on_train_begin(None, state, control, lr_scheduler=course)
    rates, totals = [course.lr_lambdas[0](0)], [state.max_steps]
    while not control.should_training_stop:
        clock.now += step_s(clock.now)
        state.global_step += 1
        control.should_training_stop = state.global_step >= state.max_steps
        control.should_evaluate = control.should_training_stop or state.global_step % state.eval_steps == 0
        if question_s:
            score.on_step_end(args, state, control)
        limit.on_step_end(args, state, control)
        rates.append(course.lr_lambdas[0](state.global_step))
        totals.append(state.max_steps)
        clock.now += pause_s * control.should_evaluate
        if question_s and control.should_evaluate:
            score.ask(state.global_step, 1.0, control.should_training_stop)
    return clock.now, rates, totals


@pytest.mark.parametrize("given", [{}, {"eval_steps": 20}], ids=["five evaluations", "one every 20 steps"])
@pytest.mark.parametrize(
    ("guess", "step_s", "within"),
    [
        (1.0, lambda time: 1.5, 0.03),  # the probing row was measured on a machine that was idle
        (3.0, lambda time: 1.5, 0.03),  # or on a busy one
        (100.0, lambda time: 1.5, 0.03),  # or on one that stood still
        (1.0, lambda time: 1.0 if time < 100 else 2.0, 0.05),  # it becomes busy
        (1.0, lambda time: 2.0 if time < 100 else 1.0, 0.05),
        (0.2, lambda time: 25.0, 0.12),  # a few long steps
    ],
)
def test_a_run_ends_when_its_time_is_over_whatever_the_first_estimate_was(guess, step_s, within, given):
    took, rates, totals = play(guess, step_s, **given)
    assert took == pytest.approx(240.0, rel=within)
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.0, abs=1e-9)
    falls = [a - b for a, b in itertools.pairwise(rates)]
    assert all(fall > 0 for fall in falls)
    assert max(falls) <= 4 / min(totals), "no jump"


@pytest.mark.parametrize("question_s", [0.05, 0.3, 0.7, 3.0])
@pytest.mark.parametrize("busy_after_s", [0, 100, 240])
def test_questions_on_the_way_shorten_a_run_by_what_they_take_alone(question_s, busy_after_s):
    """Once their share of the time is spent, the end has none, and no time is kept for them."""
    took, *_ = play(1.0, lambda time: 1.5 if time < busy_after_s else 2.5, 1.5, question_s=question_s)
    assert took == pytest.approx(240.0, rel=0.06)


def test_what_was_asked_before_the_first_step_is_no_part_of_it():
    _, _, totals = play(1.0, lambda time: 20.0, 0.0, question_s=0.1, asked_first=True)
    assert totals[1] in (10, 11, 12), "a step takes 20 seconds of 240 from the first on"


def test_a_run_with_time_to_spare_makes_every_step_of_its_epochs_and_no_more():
    took, _, totals = play(1.0, lambda time: 1.0, whole=100)
    assert set(totals) == {100} and took == 100 + 5 * 4
    assert play(5.0, lambda time: 1.0, whole=100)[2][-1] == 100, "what it was too careful about is taken back"


def test_steps_leave_room_for_evaluations_and_checkpoints():
    every_ten = deadline.Deadline(train_data.settings("sft", eval_steps=10)).timetable
    assert deadline.steps_that_fit(100.0, 1.0, 0.0, every_ten, 0, 1000) == 100
    assert deadline.steps_that_fit(100.0, 1.0, 10.0, every_ten, 0, 1000) == 45
    assert deadline.steps_that_fit(100.0, 1.0, 10.0, every_ten, 7, 1000) == 52
    assert deadline.steps_that_fit(1.0, 10.0, 0.0, every_ten, 0, 1000) == 1


def test_a_run_bounded_in_time_resumes_with_the_schedule_that_it_had_decided(prepared, monkeypatch, capsys):
    given = {"max_minutes": 1.0, "save_steps": 3, "epochs": 6.0, "schedule": "linear", "warmup_ratio": 0.0}
    given["learning_rate"] = 1e-3
    clock, seconds = Clock(), {"step": 3.0}
    monkeypatch.setattr(deadline, "first_estimate", lambda job: (20, 0.0))

    def timed(stop):
        """A run in which every step takes `seconds`, ended after `stop`."""
        from transformers import TrainerCallback

        class Time(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                clock.now += seconds["step"]

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop:
                    raise KeyboardInterrupt

        job = prepared(**given).build()
        job.deadline.clock, job.deadline.began = clock, clock()
        job.trainer.add_callback(Time())
        if stop:
            with pytest.raises(Stopped):
                job.train()
            runs.unlock("r", "sft")
        else:
            job.train()
        return job

    def logged(job):
        lines = [line for line in map(json.loads, job.log.read_text().splitlines()) if "loss" in line]
        return {(line["step"], line["of_steps"]): line["learning_rate"] for line in lines}

    seconds["step"] = 5.0  # twelve in a minute
    whole = timed(0)
    assert whole.result["steps"] == 12 == whole.planned.steps and "12 of 36 steps" in whole.notes[-1]
    expected = logged(whole)
    assert list(expected) == [(step, 12) for step in range(1, 13)]
    assert "12 steps fit, not 20" in capsys.readouterr().out and expected[(2, 12)] == pytest.approx(0.95 * 1e-3)
    shutil.rmtree(whole.stage.path)
    runs.unlock("r", "sft")
    timed(7)
    again = timed(0)
    assert again.stage.resumed and logged(again) == pytest.approx(expected)
