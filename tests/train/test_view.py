"""What is seen of a training: while it runs, when it is stopped, in another process, and what the model says then."""

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import time
import weakref

import pytest
import train_data

from helpers import machine, plots, runs
from helpers import params as parameters
from helpers.errors import TunebookError
from helpers.train import callbacks, training
from tests.conftest import PROJECT, begun


def job(**given):
    return training.open(train_data.settings("sft", **{"max_steps": 6, "save_steps": 2, "eval_steps": 2, **given}))


class Handle:
    """A notebook's output that is put there and replaced."""

    def __init__(self):
        self.frames = []

    def __call__(self, shown, display_id):
        assert display_id
        self.frames.append(shown)
        return self

    def update(self, shown):
        self.frames.append(shown)


@pytest.fixture
def handle(monkeypatch):
    import IPython.display

    seen = Handle()
    monkeypatch.setattr(machine, "kernel", lambda: object())
    monkeypatch.setattr(machine, "interactive", lambda: True)
    monkeypatch.setattr(IPython.display, "display", seen)
    return seen


def test_training_is_a_bar_with_numbers_and_one_picture_without_an_empty_first_frame(data, handle, monkeypatch, capsys):
    monkeypatch.setattr(callbacks.View, "show", unhurried(callbacks.View.show))
    first = job()
    before = first.plan()
    assert re.fullmatch(r"\w+ fits on CPU: [\d.]+ of [\d.]+ GiB, 6 steps in about .*; predicted\.", before.text)
    assert before.markup.count("<p>") == 1 and "<table" not in before.markup, "one line before the probe"
    shown = first.train()
    frames = handle.frames
    assert "step 0 of 6" in frames[0].text and "measured by a probing step" in frames[0].text
    assert "<img" not in frames[0].markup and "<img" not in frames[1].markup, "nothing to draw yet"
    assert all("<img" in frame.markup and "role='progressbar'" in frame.markup for frame in frames[2:-1])
    said = frames[-2].text
    for wanted in (
        r"step 6 of 6",
        r"gone, .* left",
        r"loss \d",
        r"held-out loss \d+\.?\d* at step",
        r"tokens/s",
        r"GiB",
    ):
        assert re.search(wanted, said), said
    assert frames[-1].markup == "", "what came out is what the cell ends with"
    assert shown.markup.count("<img") == 1 and "6 steps in" in shown.text
    assert shown.markup.count("measured by a probing step") == 1 == shown.markup.count("<details>")
    assert "chosen" in shown.markup and "Learning rate" in shown.markup, "with its reasons and what else was weighed"
    assert "probing step" not in capsys.readouterr().out, "the plan is said once"


def test_the_line_before_says_where_max_minutes_ends_it_and_what_is_warned_of(data):
    short = job(max_minutes=1e-4)
    assert "ended by max_minutes after 0.0 s" in short.plan().text
    assert "max_minutes" not in job(max_minutes=9999).plan().text
    other = dataclasses.replace(short.planned, reasons=("Warning: of another base.", "Attention: fast."))
    short.planned, short._results = other, {}
    assert short.plan().text.endswith("\nWarning: of another base.")


def unhurried(show):
    def now(view, lines):
        view.due = 0.0
        show(view, lines)

    return now


def test_axes_reach_to_the_last_step_from_the_first_frame_on():
    lines = [{"step": s, "loss": 3 / s, "of_steps": 200} for s in range(1, 4)]
    assert plots.training_curves(lines).axes[0].get_xlim() == (0, 200)
    shorter = [*lines, {"step": 4, "loss": 1.0, "of_steps": 6}]  # fewer steps turned out to fit
    assert plots.training_curves(shorter).axes[0].get_xlim() == (0, 6)


def test_without_a_notebook_a_line_of_text_says_it(data, capsys):
    job(max_steps=2).train()
    said = capsys.readouterr().out
    assert re.search(r"step 0 of 2\n.*measured by a probing step", said) and said.count("probing step") == 1


def test_prompts_and_verdicts_are_legible_on_a_dark_page(data):
    one = job(max_steps=1)
    shown = one.first_row().markup
    assert shown.count("<mark") == shown.count("<mark style='color:inherit;") > 1, "else it is black on dark"
    one.train()
    found = one.answers().markup
    assert "color:#fff;background:" in found and not re.search("<b style='color:#(?!fff)", found)


def test_a_loss_that_is_no_number_can_still_be_shown():
    said = callbacks.progress([{"step": 3, "of_steps": 9, "loss": "nan", "seconds": 4, "left_s": 8}]).text
    assert "step 3 of 9" in said and "loss nan" in said


def stop_at(step):
    class Interrupt(callbacks.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Interrupt()


@pytest.mark.parametrize(
    "step, said",
    [
        (5, "Stopped at step 5; checkpoint 4 is safe; run the cell again to go on."),
        (1, "Stopped at step 1; there is no checkpoint yet; run the cell again"),
    ],
)
def test_a_stop_is_one_message_that_says_what_is_safe_and_the_cell_goes_on(data, step, said):
    one = job().build()
    one.trainer.add_callback(stop_at(step))
    model = weakref.ref(one.model)
    with pytest.raises(TunebookError) as caught:
        one.train()
    assert said in str(caught.value) and caught.value._render_traceback_() == [str(caught.value)]
    gc.collect()
    assert model() is None, "and the model is gone from memory"
    one.train()
    steps = plots.series(callbacks.read(one.log), "loss")[0]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_after_finish_nothing_holds_the_model(data):
    one = job(max_steps=2)
    one.train()
    one.answers()
    model, trainer = weakref.ref(one.model), weakref.ref(one.trainer)
    one.finish()
    gc.collect()
    assert model() is None and trainer() is None


def test_answers_stand_beside_the_bases_each_right_or_wrong(data):
    one = job(max_steps=2)
    one.train()
    shown = one.answers()
    rows = callbacks.read(one.stage.path / "samples.jsonl")
    assert all({"base", "answer", "question", "reference"} <= set(row) for row in rows)
    labels = re.findall(r"<i>([a-z]+(?: training)?)", shown.markup)
    assert labels == ["base", "after training", "reference"] * len(rows)
    assert "of 4 answers stopped by themselves" in shown.text
    assert "Tables:" not in shown.text


@pytest.fixture
def atlas(tmp_path):
    import sqlite3

    with sqlite3.connect(tmp_path / "database.sqlite") as connection:
        connection.execute("CREATE TABLE city (name TEXT, country TEXT)")
        connection.execute("INSERT INTO city VALUES ('Oslo', 'Norway'), ('Bergen', 'Norway')")
    return tmp_path / "database.sqlite"


def test_queries_are_judged_by_running_them_and_other_answers_by_their_words(atlas, tmp_path):
    row = {"id": "1", "question": "Cities of Norway?", "reference": "SELECT name FROM city", "stopped": True}
    found = [row | {"base": "I cannot say", "answer": "SELECT name FROM city WHERE country = 'Norway'"}]
    shown = callbacks.side_by_side(found, atlas)
    assert "Right (execution accuracy): base 0 of 1, after training 1 of 1." in shown.text
    assert "wrong (no query was found in the answer): I cannot say" in shown.text and "right: SELECT" in shown.text
    row = {"id": "1", "question": "Capital?", "reference": "It is Oslo", "stopped": True}
    shown = callbacks.side_by_side([row | {"base": "", "answer": "It is Bergen"}], tmp_path / "none.sqlite")
    assert "wrong (the answer is empty)" in shown.text and "67 %: It is Bergen" in shown.text
    assert "ight" not in callbacks.side_by_side([row | {"reference": "", "answer": "x", "base": ""}], atlas).text
    assert "0 of 0 answers" in callbacks.side_by_side([], atlas).text
    assert "<b>x" not in callbacks.side_by_side([row | {"answer": "<b>x", "base": ""}], atlas).markup


def test_a_run_in_another_process_is_followed_and_then_shown_from_disk(data, runs_root, handle, capsys):
    values = train_data.settings("sft", max_steps=40, epochs=40, learning_rate=1e-3).changed()
    (runs_root / "sft.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-m", "helpers.train", str(runs_root / "sft.yaml")]
    worker = subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    log = runs.folder("r", "sft") / "log.jsonl"
    while not log.is_file() or not callbacks.read(log):
        assert worker.poll() is None
        time.sleep(0.05)
    mine = job(max_steps=40, epochs=40, learning_rate=1e-3, save_steps=0, eval_steps=0)
    shown = mine.train()
    worker.wait()
    said = capsys.readouterr().out
    assert f"process {worker.pid} trains this run" in said and "done at" in said
    assert any(f"process {worker.pid} is training" in frame.text for frame in handle.frames)
    assert "40 steps in" in shown.text and mine.finish().path == log.parent
    assert not list(runs_root.glob("r/*.old-*"))


def test_what_another_process_finished_since_it_was_opened_is_shown_and_not_set_aside(data, runs_root, capsys):
    other, mine = job(max_steps=2), job(max_steps=2)
    other.train()
    made = other.finish()
    capsys.readouterr()
    assert "2 steps in" in mine.train().text and "done at" in capsys.readouterr().out
    assert mine.finish().sha256 == made.sha256 and not list(runs_root.glob("r/*.old-*"))


def test_03_without_preference_pairs_is_a_line_and_its_cells_show_nothing(runs_root, capsys):
    begun("data", parameters.resolve("data", {"run": "r"})).finish({})
    skipped = training.open(train_data.settings("orpo"))
    assert "Skipped: the data has no preference pairs" in capsys.readouterr().out
    assert [skipped.plan(), skipped.train(), skipped.answers(), skipped.finish()] == [None] * 4
    assert not (runs_root / "r" / "03_orpo_alignment").exists()
