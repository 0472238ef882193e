"""The benchmark of learning: public tasks are read as they are, scores are compared question by question."""

import json
import sqlite3

import pytest
import train_data
from safetensors.torch import load_file

from ci import bench_learning as bench
from ci import learning_tasks
from helpers.errors import TunebookError


@pytest.fixture
def geography(tmp_path):
    """Two queries in text2sql-data's form with their database, one test question of which returns nothing."""
    asked = [
        ("train", "sentences to learn VAR0", "x"),
        ("test", "cities of VAR0", "texas"),
        ("test", "of VAR0", "mars"),
    ]
    sentences = [{"question-split": s, "text": text, "variables": {"VAR0": value}} for s, text, value in asked]
    query = {"sql": ['SELECT  NAME FROM CITY WHERE STATE = "VAR0" ;'], "sentences": sentences}
    broken = {"sql": ["SELECT nothing FROM nowhere"], "sentences": [{**sentences[1], "text": "broken"}]}
    (tmp_path / "geography.json").write_text(json.dumps([query, broken]))
    with sqlite3.connect(tmp_path / "geo.sqlite") as connection:
        connection.execute("CREATE TABLE city (name TEXT, state TEXT)")
        connection.execute("INSERT INTO city VALUES ('austin', 'texas')")
    connection.close()
    return tmp_path / "geography.json", tmp_path / "geo.sqlite"


def test_of_geoquery_only_test_questions_with_an_answer_are_asked(geography):
    train, test = learning_tasks.geoquery(*geography)
    assert [row["question"] for row in train] == ["sentences to learn x"]
    assert [(row["question"], row["sql"]) for row in test] == [
        ("cities of texas", 'SELECT NAME FROM CITY WHERE STATE = "texas"')
    ]
    assert test[0]["system"] == "Answer with one SQLite query. Tables: city(name, state)"


def test_a_public_file_that_is_not_the_one_that_was_measured_is_refused(tmp_path):
    with pytest.raises(TunebookError, match="--fetch"):
        learning_tasks.sources(f"banking77={tmp_path}", tmp_path / "made", fetch=False)
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("text,category\nhello,greeting\n")
    with pytest.raises(TunebookError, match="is not the file of"):
        learning_tasks.sources(f"banking77={tmp_path}", tmp_path / "made", fetch=False)


@pytest.mark.parametrize("task", ["mine", "mine=only.jsonl", "mine=a,b,c,d", "geo=folder"])
def test_a_task_that_is_no_task_names_those_that_there_are(task, tmp_path):
    with pytest.raises(TunebookError, match=r"geoquery.*NAME=TRAIN,TEST"):
        learning_tasks.sources(task, tmp_path, fetch=False)


@pytest.fixture
def trl_arm(runs_root, narrow_llama, tokenizer, monkeypatch):
    """Trains the TRL arm on 4 batches of 2 rows, with the small model, for that many minutes and epochs."""
    monkeypatch.setitem(bench.TRL, "batch", 2)
    for run in ("t", "t-whole"):
        train_data.data_stage(run, narrow_llama, tokenizer, train_data.sft_rows(tokenizer, 8))
    return lambda minutes, epochs: bench.rival(
        {"arm": "trl", "task": "t", "minutes": minutes, "epochs": epochs, "seed": 17}
    )


@pytest.mark.parametrize(
    ("step_s", "yes"),
    [
        ([9, 1, 1, 1, 1], False),  # too few to compare
        ([9, 1, 1, 1, 1, 1], True),
        ([9, 8, 1, 1, 1, 1], False),
        ([9, 8, 1, 1, 1, 1, 1], True),
        ([4, 4, 4, 3, 3, 3], False),
        ([1, 1, 1, 1, 1, 9], False),  # something was compiled once more
        ([1, 1, 1, 1.2, 1.1, 1.3], True),
    ],
)
def test_a_speed_has_settled_once_steps_get_no_faster(step_s, yes):
    assert bench.settled(step_s) is yes


def test_the_learning_rate_rises_for_the_warmup_and_is_zero_at_the_end():
    factors = [bench.rate_factor(share, 0.1) for share in (0, 0.05, 0.1, 0.55, 1, 1.2)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_a_rival_with_time_left_ends_with_the_epochs_and_so_does_its_schedule(trl_arm, monkeypatch):
    shares = []
    monkeypatch.setattr(bench, "rate_factor", lambda share, warmup: shares.append(share) or 0.0)
    adapter, _, made = trl_arm(minutes=600, epochs=1)
    assert made["steps"] == made["planned_steps"] == 4
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75], abs=0.1)
    assert 2 * bench.WINDOW <= made["probe_steps"] <= bench.PROBE_STEPS
    weights = load_file(adapter / "adapter_model.safetensors")  # a rate of 0: as they were before the probe
    assert not any(weight.any() for name, weight in weights.items() if "lora_B" in name)


def test_a_rival_without_time_left_ends_before_its_epochs(trl_arm):
    _, _, made = trl_arm(minutes=1e-6, epochs=100)
    assert made["steps"] == made["planned_steps"] == 1


def test_seeds_are_compared_question_by_question_and_drawn(tmp_path):
    right = {("trl", 1): "0" * 40 + "1" * 10, ("trl", 2): "0" * 45 + "1" * 5, ("ours", 1): "1" * 40 + "-" * 10}
    right["ours", 2] = "1" * 50
    lines = [
        {"task": "t", "minutes": 1.0, "arm": arm, "seed": seed, "right": bits, "score": bits.count("1") / 50}
        for (arm, seed), bits in right.items()
    ]
    found = {line["arm"]: line for line in bench.comparisons(lines)}
    assert found["trl"]["score"] == pytest.approx(0.15) and "difference" not in found["trl"]
    assert found["ours"]["n"] == 90  # those without a score are left out
    assert found["ours"]["difference"] == pytest.approx(85 / 90)
    assert 0.85 < found["ours"]["low"] < found["ours"]["difference"] < found["ours"]["high"] <= 1.0
    bench.plot([{**line, "low": 0.1, "high": 0.9} for line in lines], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000
