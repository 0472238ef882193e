"""The task's own score while training: on a real database, within its share of the time, and what it decides."""

import sqlite3

import pytest
import train_data

from helpers.errors import Stopped
from helpers.tasks.questions import Answer
from helpers.train import callbacks, task_score, training

EACH = {"score_rows": 8, "max_steps": 3, "eval_steps": 1, "save_steps": 1, "batch_size": 4, "eval_rows": 2}


@pytest.fixture
def scored(data, monkeypatch):
    """Opens a job of the questions about a small database, with all the time that scoring takes."""
    with sqlite3.connect(data.path / "database.sqlite") as database:
        for _, table, column in train_data.THINGS:
            database.execute(f"CREATE TABLE {table}(id INTEGER, name TEXT, country TEXT, {column} INTEGER)")
            rows = [(i, f"{table} {i}", place, 10 * i) for i, place in enumerate(train_data.PLACES)]
            database.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", rows)
    monkeypatch.setattr(task_score, "SHARE", 1e6)
    return lambda stage="sft", **given: training.open(train_data.settings(stage, **{**EACH, **given}))


def answering(monkeypatch, *right):
    """The model answers that many questions rightly the first time, the second time …"""
    times = iter(right)

    def answer(job, prompts, decoding):
        count = next(times)
        references = [item.reference for item in job.trainer.score.items]
        texts = [ref if i < count else "SELECT 'wrong'" for i, ref in enumerate(references[: len(prompts)])]
        return [Answer(text, 9, True) for text in texts]

    monkeypatch.setattr(callbacks, "answers", answer)


@pytest.mark.parametrize(
    ("right", "kept"),
    [((2, 8, 1), 2), ((2, 5, 5), 3), ((2, 6, 5), 3), ((8, 0, 0), 1), ((0, 0, 0), 3)],
    ids=["overfitted", "equal", "within chance", "worse from the first", "nothing"],
)
def test_the_last_checkpoint_is_kept_unless_an_earlier_one_is_clearly_better(scored, monkeypatch, right, kept):
    answering(monkeypatch, *right)
    job = scored()
    job.train()
    assert job.result["best_step"] == kept
    found = job.result["score_after"]
    assert [one["step"] for one in found] == [1, 2, 3] and [one["score"] for one in found] == [n / 8 for n in right]
    assert all(one["low"] <= one["score"] <= one["high"] and one["n"] == 8 for one in found)
    losses = {line["step"]: line["eval_loss"] for line in job.lines() if "eval_loss" in line}
    assert job.result["eval_loss"] == losses[kept] and job.result["last_eval_loss"] == losses[3]
    told = str(job.summary())
    assert told.count("score after") == 3 and "seconds of training" in told and "trained parameters" in told


def test_the_model_itself_is_asked_and_the_manifest_says_what_it_scored(scored, monkeypatch):
    monkeypatch.setattr(task_score, "LONGEST", 12)
    job = scored(max_steps=1)
    job.train()
    manifest = job.finish()
    (one,) = manifest.metrics["score_after"]
    assert set(one) == {"minutes", "step", "score", "low", "high", "n"} and one["n"] == 8 and one["step"] == 1
    assert manifest.params["score_rows"] == 8


def test_early_stopping_goes_by_the_score(scored, monkeypatch):
    answering(monkeypatch, 4, 3, 8)
    job = scored(early_stopping=1)
    job.train()
    assert job.result["steps"] == 2


def test_a_killed_run_goes_on_with_the_scores_that_it_had(scored, monkeypatch):
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    answering(monkeypatch, 1, 8, 0)
    job = scored().build()
    job.trainer.add_callback(Kill())
    with pytest.raises(Stopped):
        job.train()
    again = scored()
    again.train()
    assert [one["score"] for one in again.result["score_after"]] == [1 / 8, 1.0, 0.0]
    assert again.result["best_step"] == 2


def test_preference_training_is_compared_with_the_adapter_that_it_began_with(scored, monkeypatch):
    answering(monkeypatch, 8, 8, 0)
    sft = scored(max_steps=1)
    sft.train()
    sft.finish()
    orpo = scored("orpo", max_steps=1)
    orpo.train()
    assert [one["step"] for one in orpo.result["score_after"]] == [0, 1]
    assert "worse by 100 points" in orpo.result["against_start"]


def test_questions_and_times_stay_within_their_share(scored, monkeypatch):
    monkeypatch.setattr(task_score, "SHARE", 0.1)
    job = scored(score_rows=32, eval_steps=0, save_steps=0, max_steps=0, max_minutes=4.0).build()
    score = job.trainer.score
    assert score.ahead() == [60.0, 120.0] and len(score.items) == 8
    score.items = score.items * 4
    one = {"step": 5, "score": 0.5, "minutes": 1.02, "n": 32}
    score.found, score.spent, score.passed = [{**one, "seconds": 8.0}], 8.0, 61.0
    assert score.ahead() == [120.0] and score.affordable(1) == 32
    score.found, score.spent = [{**one, "seconds": 16.0}], 16.0
    assert score.affordable(1) == 8, "8 seconds are left for two times, each question takes half a second"
    score.found, score.spent = [{**one, "seconds": 20.0}], 20.0
    assert score.affordable(1) == 0 and score.ask(9, 1.0) == {"eval_kept": 9}
    monkeypatch.setattr(type(score), "elapsed", 130.0)
    assert score.ahead() == [120.0] and score.ask(10, 1.0) and score.ahead() == [], "what is not asked is not due again"
    times = job.deadline.timetable(50)
    assert times["eval_steps"] == times["save_steps"] == 50, "a short run pauses at its minutes and at its end"


@pytest.mark.parametrize("given", [{"score_rows": 0}, {"eval_rows": 0}], ids=["not asked for", "all rows held out"])
def test_without_a_score_the_loss_decides(data, given):
    job = training.open(train_data.settings("sft", **{**EACH, "score_rows": 0, **given})).build()
    assert job.trainer.score is None and job.trainer.args.metric_for_best_model == "loss"
