"""The probing step before training: what it corrects, what it leaves alone, and how it bounds a run's time."""

import json

import pytest
import torch
import train_data

from helpers.errors import TunebookError
from helpers.train import resume, sft

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
    return lambda **given: sft.open(train_data.settings("sft", **{**SMALL, **given}))


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
    assert job.result["steps"] == 1 == job.trainer.args.max_steps and job.planned.steps == 1
    assert any("what fits into" in note for note in job.notes)
    assert [line["step"] for line in lines if "loss" in line] == [1]
    assert resume.total_steps(job.checkpoints / "checkpoint-1") == 1


def test_a_run_bounded_in_time_resumes_with_the_steps_it_began_with(prepared):
    job = prepared(max_minutes=100.0, save_steps=2, max_steps=6)
    job.build()
    job.trainer.args.max_steps = 4  # what a slower processor would have decided
    job._probe = lambda: None
    job.train()
    again = prepared(max_minutes=100.0, save_steps=2, max_steps=6)
    assert again.stage.resumed
    again.train()
    assert again.trainer.args.max_steps == 4 and again.result["steps"] == 4


def test_intervals_follow_a_shortened_run(prepared):
    from helpers.train import config

    job = prepared(max_steps=40, schedule="wsd").build()
    job._set_length(10)
    assert (job.trainer.args.max_steps, job.trainer.args.eval_steps, job.trainer.args.save_steps) == (10, 2, 2)
    assert job.trainer.args.lr_scheduler_kwargs == {"num_decay_steps": 2}
    with pytest.raises(TunebookError, match="best checkpoint"):
        config.timetable(0, train_data.settings("sft", save_steps=3, eval_steps=2), 10)
