"""Notebook 01's steps on real rows: what is written, what stops the job."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers import params, runs
from helpers.data import prepare
from helpers.data.labels import Encoder
from helpers.display import plain
from helpers.errors import TunebookError
from helpers.evaluate import preferences
from helpers.evaluate.generate import HfModel
from helpers.model.loading import load_tokenizer
from helpers.report import data_page
from helpers.tasks import questions


class Asking(HfModel):
    """What notebook 05 asks, without weights."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


@pytest.fixture
def job(runs_root, tmp_path, smollm2, tokenizer, monkeypatch):
    """A job of these parameters on these rows; model and tokenizer the session's."""
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))

    def make(rows=None, name="data", **given):
        if rows is not None:
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
            given.setdefault("dataset", str(path))
        given = {"model": str(smollm2.path), "run": "t", "near_duplicates": 0.0, **given}
        made = prepare.open(params.resolve("data", given))
        made.stage.done = None  # a job of the same rows again is worked on, not shown
        made.tokenizer, made.source = tokenizer, smollm2
        return made

    return make


def run(job, pages=False):
    job.read()
    job.generate()
    job.clean()
    job.mix()
    job.split()
    job.encode()
    job.pairs()
    job.lengths()
    if pages:
        data_page.preview(job, 2)
        data_page.write(job)
    return job.finish()


def rows(count, start=0, words=6):
    return [
        {"question": f"What is number {i}?", "answer": f"It is {i} " * words, "topic": i % 7}
        for i in range(start, start + count)
    ]


def read(job, name):
    return pq.read_table(job.path / f"{name}.parquet").to_pylist()


def test_a_whole_job_writes_every_file_and_a_manifest_that_the_next_stage_accepts(job, tokenizer):
    done = job(rows(200), test_share=0.1, eval_share=0.1)
    run(done, pages=True)
    manifest = runs.load("t", "data")
    names = {
        "train.parquet",
        "eval.parquet",
        "test.parquet",
        "rejected.jsonl",
        "report.html",
        "preview.html",
        "README.md",
        "lengths.png",
        "metrics.json",
    }
    assert (
        names <= set(manifest.data["artifacts"]) and manifest.data["template_hash"] and manifest.data["tokenizer_hash"]
    )
    assert not [p.name for p in done.path.iterdir() if p.name.startswith(".")]
    train, held, test = (read(done, name) for name in ("train", "eval", "test"))
    assert (
        len(train) + len(held) + len(test) == 200 == sum(manifest.metrics["rows"].values())
        and min(map(len, (train, held, test))) > 5
    )
    ids = [row["id"] for part in (train, held, test) for row in part]
    assert len(set(ids)) == 200
    for row in train:
        assert len(row["input_ids"]) == len(row["completion_mask"]) and 0 < sum(row["completion_mask"]) < len(
            row["input_ids"]
        )
        messages = json.loads(row["messages"])
        said = tokenizer.decode([t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m])
        assert said == messages[-1]["content"] + "<|im_end|>"
    assert (
        set(json.loads(test[0]["meta"])) >= {"topic", "file", "row", "source"}
        and test[0]["prompt"][-1]["role"] == "user"
        and test[0]["reference"].startswith("It is")
    )
    share = manifest.metrics["trained_share"]
    assert share == pytest.approx(
        sum(sum(r["completion_mask"]) for r in train + held) / sum(len(r["input_ids"]) for r in train + held)
    )


STEPS = ("read", "generate", "clean", "mix", "split", "encode", "lengths", "pairs")


def test_steps_that_are_run_twice_count_and_mix_as_if_they_were_run_once(job, tmp_path):
    for name, start in (("a", 0), ("b", 1000)):
        found = [*rows(60, start), rows(1, start)[0], {"question": "q", "answer": ""}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    pairs = [{"prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    found = []
    for times in (1, 2):
        done = job(
            dataset=f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl",
            preference_dataset=str(tmp_path / "pairs.jsonl"),
            weights="a=3,b=1",
        )
        for name in STEPS:
            shown = getattr(done, name)()
            assert getattr(done, name)() is shown  # a cell that is run again shows what it showed
            for _ in range(times - 1):  # after an error, or an interrupt, a step works again
                getattr(prepare.Job, name).__wrapped__(done)
        metrics = done.metrics()
        data_page.write(done)
        card = (done.path / "README.md").read_text()
        found.append((metrics, read(done, "train"), (done.path / "rejected.jsonl").read_text(), card))
    assert found[0][0]["rejected"]["removed"]["exact duplicate"] == 2
    assert found[0] == found[1]


def test_a_finished_job_shows_every_step_from_disk(job, capsys):
    given = rows(60)
    first = job(given)
    run(first)
    again = prepare.open(first.params)
    assert again.stage.done is not None and again.template().markup
    for name in STEPS:
        assert repr(getattr(again, name)()) == repr(getattr(first, name)()) or name == "lengths"
    assert "tokens" in again.encode().text and not hasattr(again, "encoded") and again.finish() is again.stage.done


@pytest.mark.parametrize("share", [0.0, 1e-9])
def test_ten_pairs_of_which_none_is_held_out_are_written_and_it_is_said(job, tmp_path, share):
    pairs = [{"prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    done = job(rows(20), preference_dataset=str(tmp_path / "pairs.jsonl"), preference_eval_share=share)
    run(done)
    assert len(read(done, "preference")) == 10 and "none of 10 pairs is held out" in done.split().text


def test_trl_trains_exactly_the_masked_tokens_of_the_written_file(job, tokenizer, tiny_llama, tmp_path):
    from trl import SFTConfig, SFTTrainer

    from datasets import Dataset

    done = job(rows(40))
    run(done)
    table = Dataset.from_parquet(str(done.path / "train.parquet"), cache_dir=str(tmp_path / "hf"))
    settings = SFTConfig(
        output_dir=str(tmp_path / "out"),
        completion_only_loss=True,
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=None,
        per_device_train_batch_size=4,
    )
    trainer = SFTTrainer(str(tiny_llama), args=settings, train_dataset=table, processing_class=tokenizer)
    by_ids = {tuple(row["input_ids"]): row["completion_mask"] for row in table}
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels, seen in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        row = [int(t) for t, kept in zip(ids, seen, strict=True) if kept]
        wanted = [t for t, m in zip(row, by_ids[tuple(row)], strict=True) if m]
        assert [int(t) for t in labels if t != -100] == wanted and wanted[-1] == tokenizer.eos_token_id


def test_preference_pairs_are_written_for_trl_and_never_ask_a_held_out_question(job, tokenizer):
    pairs = [{"prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(150)]
    done = job(pairs, test_share=0.2, preference_eval_share=0.2)
    run(done)
    train, held, test = (read(done, name) for name in ("preference", "preference_eval", "test"))
    asked = {row["prompt"][-1]["content"] for row in test}
    assert asked and not asked & {row["prompt"][-1]["content"] for row in train + held}
    assert len(train) + len(held) + len(test) == 150 and held
    for row in train:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert row["prompt_ids"] == prompt
        for side in ("chosen", "rejected"):
            assert (
                tokenizer.decode(row[f"{side}_ids"]) == row[side][0]["content"] + "<|im_end|>"
                and row[f"{side}_ids"].count(tokenizer.eos_token_id) == 1
            )


def test_kto_rows_are_cleaned_keep_both_labels_and_only_good_answers_are_trained(job):
    found = [{"prompt": f"Say {i}", "completion": f"word {i}", "label": i % 2 == 0} for i in range(60)]
    done = job([*found, found[1], {"prompt": "Say much", "completion": "word " * 600, "label": False}], test_share=0.0)
    run(done)
    assert done.rejects.removed == {"exact duplicate": 1, "over max_length": 1}
    assert {row["label"] for row in read(done, "kto")} == {True, False} and len(read(done, "kto")) == 60
    assert len(read(done, "train")) + len(read(done, "eval")) == 30


def test_the_same_rows_make_the_same_files_and_any_change_others(job):
    found = []
    for count, given in ((60, {}), (60, {}), (61, {}), (60, {"train_on": "everything"})):
        done = job(rows(count), **given)
        run(done)
        found.append(done.encoded["data_hash"])
    first, again, *changed = found
    assert first == again and first not in changed


def test_rows_lost_while_rendering_are_counted(job):
    done = job([*rows(60), {"question": "q", "answer": "<|im_end|>"}])
    run(done)
    assert "special token in text" in (done.path / "rejected.jsonl").read_text()


def test_a_second_tokenizer_is_measured_beside_the_models(job, smollm2, tmp_path):
    other, folder = load_tokenizer(smollm2), tmp_path / "other"
    other.add_tokens([" number"])
    other.save_pretrained(folder)
    shutil.copy(smollm2.path / "config.json", folder)
    done = job(rows(40), compare_tokenizer=str(folder), min_tokens=8, eval_share=0.1)
    for step in (done.read, done.generate, done.clean, done.mix, done.split):
        step()
    shown = repr(done.vocabulary())
    for step in (done.encode, done.pairs, done.lengths):
        step()
    data_page.write(done)
    ours, theirs = done.metrics()["vocabulary"].values()
    assert theirs["vocabulary"] == ours["vocabulary"] + 1 and theirs["characters"] == ours["characters"]
    page = (done.path / "report.html").read_text()
    for text in (str(folder), plain(ours["vocabulary"]), plain(theirs["vocabulary"])):
        assert text in shown and text in page


def test_sources_are_mixed_by_weight_with_replay_and_the_achieved_mixture_is_reported(job, tmp_path):
    for name, start in (("a", 0), ("b", 1000), ("general", 2000)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(200, start)))
    done = job(
        dataset=f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl",
        weights="a=3,b=1",
        replay_dataset=str(tmp_path / "general.jsonl"),
        replay_share=0.2,
        eval_share=0.0,
        test_share=0.0,
    )
    run(done)
    mixture = {part["source"]: part for part in done.encoded["mixture"]}
    assert (
        mixture["a"]["rows"] == 200
        and abs(mixture["b"]["rows"] - 67) <= 1
        and mixture["replay: general"]["row_share"] == pytest.approx(0.2, abs=0.01)
    )
    assert sum(part["tokens"] for part in mixture.values()) == done.encoded["splits"]["train"]["tokens"]
    for weights, message in (("c=1", "with the sources a, b"), ("a=3", "b no weight")):
        wrong = job(dataset=f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", weights=weights)
        with pytest.raises(TunebookError, match=message):
            wrong.read(), wrong.clean(), wrong.mix()


def test_groups_and_near_duplicates_stay_together_through_the_job(job):
    done = job(rows(300), group_by="topic", eval_share=0.3, test_share=0.2)
    run(done)
    parts = [{row["meta"]["topic"] for row in done.splits[name].rows()} for name in ("train", "eval", "test")]
    assert sum(map(len, parts)) == 7


def test_pairs_of_one_source_stay_together_when_group_by_says_so(job, tmp_path):
    for name in "abcdef":
        pairs = [{"prompt": f"{name} asks {i}?", "chosen": f"right {i}", "rejected": f"wrong {i}"} for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    named = ",".join(f"{tmp_path}/{name}.jsonl" for name in "abcdef")
    done = job(rows(60), preference_dataset=named, preference_eval_share=0.5, group_by="source")
    done.read(), done.clean(), done.mix(), done.split()
    parts = [{row["source"] for row in done.pair_splits[name].rows()} for name in ("train", "eval")]
    assert sum(map(len, parts)) == 6


def test_training_rows_that_hold_a_test_question_are_taken_out_and_counted(job, tmp_path):
    question = "Which river flows through the largest number of European capitals on its long way?"
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": question, "answer": "The Danube"}) + "\n")
    done = job(
        [*rows(50), {"question": "Hello! " + question.upper(), "answer": "Danube"}],
        test_dataset=str(tmp_path / "test.jsonl"),
    )
    run(done)
    assert done.rejects.removed["holds an evaluation question"] == 1 and len(read(done, "test")) == 1
    assert next(s for s in done.steps if s.step == "decontamination").figures["items_found"] == 1


def test_replay_rows_are_cleaned_like_the_others(job, tmp_path):
    question = "Which river flows through the largest number of European capitals on its long way?"
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": question, "answer": "The Danube"}) + "\n")
    replayed = [*rows(30, 500), {"question": "Tell me: " + question, "answer": "Danube"}, rows(1, 500)[0]]
    (tmp_path / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in replayed))
    done = job(
        rows(30),
        test_dataset=str(tmp_path / "test.jsonl"),
        replay_dataset=str(tmp_path / "general.jsonl"),
        replay_share=0.5,
    )
    run(done)
    assert done.rejects.removed["holds an evaluation question"] == 1 and done.rejects.removed["exact duplicate"] == 1
    assert {part["source"]: part["rows"] for part in done.encoded["mixture"]} == {"data": 30, "replay: general": 30}


def test_the_embedded_companions_are_left_out_with_other_data(job, capsys):
    done = job(rows(20))
    assert "belong to the embedded data" in capsys.readouterr().out and not any(done.chosen.values())


def test_a_max_length_of_zero_takes_the_proposal(job):
    done = job([*rows(300), *rows(2, 5000, 300)], max_length=0, test_share=0.0)
    run(done)
    assert (
        done.encoded["max_length"] == done.encoded["lengths"]["proposed_max_length"] < 200
        and done.encoded["lengths"]["dropped"] == 2
    )


def test_texts_are_trained_whole(job):
    done = job([{"text": f"Paragraph {i} has some words."} for i in range(50)])
    run(done)
    assert all(np.mean(row["completion_mask"]) == 1 for row in read(done, "train")) and len(read(done, "test")) == 0


@pytest.mark.parametrize(
    "given, content, said",
    [
        ({}, [], "holds no rows; name a file that has some"),
        ({"dataset": "missing.jsonl"}, None, "missing.jsonl' is not there"),
        ({}, [*rows(5), '{"question": "broken'], r"1 of 6 rows \(16.7 %\).*malformed JSON.*row 6"),
        ({}, [*rows(5), {"question": "q", "answer": ""}], "no answer.*row 6.*column 'answer' is empty"),
        ({"max_length": 16, "over_long": "truncate"}, rows(30), "all tokens masked"),
        ({"max_length": 16}, rows(30), "over max_length.*Change max_length or over_long"),
        ({"min_chars": 5000}, rows(30), "answer too short.*Change min_chars or min_tokens"),
        ({"columns": "prompt=frage"}, rows(30), "wrong columns.*'frage'"),
        ({"database": "missing.sqlite"}, rows(30), "missing.sqlite is not there"),
        ({"preference_dataset": "{data}"}, rows(30), "needs a prompt, a chosen and a rejected"),
        ({"synthetic": "questions"}, rows(30), "needs endpoint"),
        ({"sql_negatives": True}, rows(30), "needs a database"),
        ({"group_by": "nothing"}, rows(30), "the other columns are topic"),
        ({"dataset_info": "missing.json"}, rows(30), "missing.json' is not there"),
    ],
)
def test_each_bad_input_ends_with_one_sentence_and_no_manifest(job, tmp_path, given, content, said):
    given = {
        name: value.format(data=tmp_path / "data.jsonl") if isinstance(value, str) else value
        for name, value in given.items()
    }
    with pytest.raises(TunebookError, match=said) as caught:
        run(job(content, **given))
    assert "\n" not in str(caught.value)
    with pytest.raises(TunebookError, match=r"did not finish|not been run"):
        runs.load("t", "data")


# ---------------------------------------------------------------- what is lost, and what has no room


def long(count):
    return [{"question": f"Long {i}?", "answer": "many words " * 300} for i in range(count)]


def test_a_loss_within_the_limit_is_one_line_in_notebook_terminal_report_and_manifest(job, capsys):
    given = [
        *rows(90),
        *long(9),
        rows(1)[0],
        {"question": "q", "answer": "<|im_end|>"},
        {"question": "no answer", "answer": ""},
    ]
    done = job(given, reject_limit=0.2, test_share=0.0)
    manifest = run(done, pages=True)
    line = "12 of 102 rows of dataset (11.8 %) are in no split: over max_length 9 (max_length or over_long), "
    assert line in done.pairs().text and line in capsys.readouterr().out
    assert line in (done.path / "report.html").read_text() and manifest.data["metrics"]["warnings"][-1].startswith(line)
    assert all(f"{why} 1" in done.pairs().text for why in ("exact duplicate", "special token in text", "no answer"))
    assert "(exact_duplicates)" in done.pairs().text


@pytest.mark.parametrize(
    ("lost", "limit", "stops"), [(40, 0.3, True), (40, 0.5, False), (25, 0.3, False), (25, 0.1, True)]
)
def test_a_loss_above_the_limit_stops_the_job_and_names_the_settings(job, lost, limit, stops):
    done = job([*rows(100 - lost), *long(lost)], loss_limit=limit, test_share=0.0)
    if not stops:
        assert run(done).data
        return
    with pytest.raises(
        TunebookError, match=rf"{lost} of 100 rows of dataset .* over max_length {lost} \(max_length or"
    ):
        run(done)
    assert not (done.path / "manifest.json").exists()


def test_each_set_has_its_own_share_and_what_is_left_out_on_purpose_is_no_loss(job, tmp_path):
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(500, start=900)))
    done = job(rows(100), caps="more=10", dataset=f"{tmp_path / 'data.jsonl'},{tmp_path / 'more.jsonl'}")
    run(done)
    assert not done.warnings["loss"] and done.encoded["written"]["train"] < 110
    pairs = [
        {"prompt": f"Say {i}", "chosen": "many words " * 300 * (i < 5) + f"{i}", "rejected": "no"} for i in range(10)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    done = job(rows(400), preference_dataset=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(TunebookError, match="5 of 10 rows of preference_dataset"):
        run(done)


def test_pairs_that_share_their_chosen_answer_are_not_lost(job):
    pairs = [{"prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": f"no {j}"} for i in range(40) for j in range(4)]
    done = job(pairs, test_share=0.0)
    run(done)
    assert not done.warnings["loss"] and len(read(done, "preference")) + len(read(done, "preference_eval")) == 160


@pytest.mark.parametrize("count", [1, 2, 5, 9, 12, 20])
def test_a_small_set_says_what_it_has_no_room_for(job, count):
    done = job(rows(count), eval_share=0.05, test_share=0.1)
    run(done)
    for name, share in (("eval", "0.05"), ("test", "0.1")):
        said = f"{name}.parquet is empty: {count} rows leave no room for {name}_share = {share}"
        assert (said in done.split().text) is not bool(read(done, name)), name
    assert read(done, "train")


def test_an_eval_part_that_is_lost_on_the_way_is_said(job):
    done = job([*rows(60), *long(60)], eval_share=0.5, loss_limit=1.0, test_share=0.0)
    done.read(), done.generate(), done.clean(), done.mix(), done.split()
    done.splits["eval"] = prepare.Table.collect([[row for row in done.mixed.rows() if "Long" in str(row["messages"])]])
    done.encode()
    assert done.warnings["eval"].startswith("eval.parquet is empty: each of its 60 rows was lost on the way")


@pytest.mark.parametrize("shuffle", [False, True])
def test_max_rows_takes_the_first_or_drawn_rows_and_counts_the_others(job, shuffle):
    made = job(rows(60), max_rows=25, shuffle=shuffle)
    assert "max_rows: 25 of 60 rows of dataset are taken" in str(made.read())
    taken = [row["row"] for row in made.training_rows.rows()]
    assert len(taken) == 25 and taken == sorted(taken) and (taken == [*range(1, 26)]) != shuffle
    made.read()
    assert [row["row"] for row in made.training_rows.rows()] == taken
    assert made.rejects.removed == {"over max_rows": 35} and "over max_rows: 35" in str(made.clean())
    assert "max_rows" not in str(job(rows(20), "few", max_rows=20).read())


def test_the_test_files_of_a_snapshot_are_the_test_rows_and_it_is_said(job, tmp_path):
    for name, start, count in (("train", 0, 30), ("test", 900, 4), ("validation", 950, 3)):
        path = tmp_path / f"set/data/{name}-00000-of-00001.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, start)))
    (tmp_path / "set/README.md").write_text("# A set of numbers\n" * 20)
    done = job(dataset=str(tmp_path / "set"))
    shown = repr(done.read())
    assert "No test_dataset is named: the test files of" in shown and "validation: not read" in shown
    done.generate(), done.clean(), done.mix(), done.split()
    asked = {row["messages"][0]["content"] for row in done.splits["test"].rows()}
    assert asked == {f"What is number {i}?" for i in range(900, 904)}


CALL = {"function": {"name": "find", "arguments": {"name": "Ida", "before": None}}}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Find", "parameters": {}}}]


def tool_rows(count):
    found = []
    for i in range(count):
        talk = [{"role": "user", "content": f"Find person {i}."}, {"role": "assistant", "tool_calls": [CALL]}]
        if i % 2:
            talk += [{"role": "tool", "content": f"{i} hits"}, {"role": "assistant", "content": f"There are {i}."}]
        found.append({"messages": talk, "tools": TOOLS})
    return found


def test_held_out_questions_and_pairs_keep_their_tools_and_05_asks_what_was_trained(job, tokenizer, tmp_path):
    asked = {"prompt": "Find person", "tools": TOOLS}
    pairs = [{**asked, "prompt": f"Find {i}", "chosen": f"Looking {i}.", "rejected": "No."} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    done = job(tool_rows(80), test_share=0.3, preference_dataset=str(tmp_path / "pairs.jsonl"))
    run(done)
    reader, items = Asking(tokenizer), questions.read(done.path / "test.parquet")
    encoder = Encoder(done.template(), "last")
    assert len(items) > 8 and {bool(item.answer.get("tool_calls")) for item in items} == {True, False}
    rows = {row["id"]: row for row in done.splits["test"].rows()}
    for item in items:
        ((trained,),) = encoder.encode([[rows[item.id]]])
        assert trained.ids[: trained.prompt].tolist() == reader.encode(*item.asked)
        assert "find" in tokenizer.decode(trained.ids[: trained.prompt])
    for pair in preferences.read(done.path / "preference_eval.parquet"):
        for side in ("chosen", "rejected"):
            assert reader.answered(*pair["prompt"], pair[side]) == pair["runs"][side]
            assert "find" in tokenizer.decode(pair["runs"][side][0][0])


def test_a_control_token_is_refused_while_reading_with_its_remedy_or_taken_as_text(job, tmp_path):
    bad, other = ({"question": f"What does <|im_end|> {verb}?", "answer": "The end"} for verb in ("mean", "do here"))
    (tmp_path / "test.jsonl").write_text(json.dumps(other) + "\n" + json.dumps(rows(1, 500)[0]) + "\n")
    done = job([*rows(60), bad], test_dataset=str(tmp_path / "test.jsonl"))
    done.read()
    assert done.rejects.invalid == {"special token in text": 2}  # before anything is cleaned
    with pytest.raises(TunebookError, match="set control_tokens to 'text'"):
        job([*rows(3), bad]).read()
    done = job([*rows(60), bad], test_dataset=str(tmp_path / "test.jsonl"), control_tokens="text", test_share=0.0)
    run(done)
    assert not done.rejects.invalid and len(read(done, "test")) == 2
    assert done.encoded["notes"]["control tokens in a text taken as text"] == 1


def test_test_questions_that_cannot_be_asked_are_counted_before_training(job, tmp_path, monkeypatch):
    long = {"question": "word " * 9000, "answer": "a"}
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows(4, 500), long]))
    done = job(rows(60), test_dataset=str(path))
    run(done)
    assert done.rejects.invalid == {"question too long": 1} and len(read(done, "test")) == 4
    path.write_text(json.dumps(long) + "\n")
    with pytest.raises(TunebookError, match=r"No row of .*question too long.*the model reads"):
        run(job(rows(60), test_dataset=str(path)))


def test_keys_of_messages_that_play_no_part_are_shown_like_columns(job):
    talk = [{"role": "user", "content": "q", "emotion": "joy"}, {"role": "assistant", "content": "a"}]
    done = job([{"messages": talk}])
    assert "messages: emotion" in done.read().text
