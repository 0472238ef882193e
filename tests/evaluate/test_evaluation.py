"""Claims about a whole evaluation: planted candidates, broken ones beside them, its files, references, judge."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from helpers import display, params, report, runs
from helpers.data import decontamination
from helpers.errors import Stopped, TunebookError
from helpers.evaluate import candidates, evaluation, preferences, statistics
from helpers.evaluate import scores as scores_json
from helpers.tasks import questions, text_metrics
from tests.conftest import begun

PROJECT = Path(__file__).resolve().parents[2]
QUIET = {"general_text": "", "general_chat": "", "general_tasks": ""}
HTML = "<script>alert(1)</script>\x1b[2J\x00"


class Planted(BaseHTTPRequestHandler):
    """A server whose model answers from a table: /good knows 3 of 4 answers, /copy the same, /shuffled gives each the
    answer of another question, /markup answers with HTML, /judge always says B."""

    table: ClassVar[dict[str, str]] = {}
    order: ClassVar[list[str]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question, who = body["messages"][-1]["content"], self.path.split("/")[1]
        place = self.order.index(question) if question in self.order else 0
        text = {
            "shuffled": self.table.get(self.order[(place + 5) % len(self.order)], ""),
            "markup": HTML,
            "judge": "B",
        }.get(who)
        if text is None:
            text = self.table[question] if place % 4 else "SELECT 1"
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": who,
            "usage": {"completion_tokens": 9, "prompt_tokens": 1, "total_tokens": 10},
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        }
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        return


@pytest.fixture(scope="module")
def planted():
    rows = [json.loads(line) for line in (PROJECT / "datasets" / "atlas_test.jsonl").read_text().splitlines()[:60]]
    Planted.table, Planted.order = {r["question"]: r["sql"] for r in rows}, [r["question"] for r in rows]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Planted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", rows
    server.shutdown()
    server.server_close()


def data_stage(run, rows, model, database=True):
    """A finished data stage with these held-out rows, one of which stands in the training data too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stage = begun("data", params.resolve("data", {"run": run}))
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    prompts = [[{"role": "system", "content": r["system"]}, {"role": "user", "content": r["question"]}] for r in rows]
    metas = [json.dumps({k: r[k] for k in ("kind", "origin") if k in r}) for r in rows]
    pq.write_table(
        pa.table(
            {
                "id": [str(i) for i in range(len(rows))],
                "prompt": pa.array(prompts, message),
                "reference": [r["sql"] for r in rows],
                "meta": metas,
            }
        ),
        stage.path / "test.parquet",
    )
    trained = [
        json.dumps(
            [{"role": "user", "content": f"Please: {rows[3]['question']}"}, {"role": "assistant", "content": "x"}]
        )
    ]
    ids, mask = pa.array([[1, 2]], pa.list_(pa.int32())), pa.array([[0, 1]], pa.list_(pa.int8()))
    pq.write_table(
        pa.table({"messages": trained, "input_ids": ids, "completion_mask": mask}), stage.path / "train.parquet"
    )
    if database:
        shutil.copy(PROJECT / "datasets" / "atlas.sqlite", stage.path / "database.sqlite")
    stage.finish({}, model={"name": str(model), "path": str(model), "revision": "", "origin": "folder"})


@pytest.fixture(scope="module")
def judged(planted, tiny_llama, tmp_path_factory):
    """One evaluation of a random base, planted endpoints and two candidates that cannot be loaded: (job, what its cells
    showed, scores.json, metrics)."""
    url, rows = planted
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEBOOK_RUNS", str(folder / "runs"))
        patch.setenv("TUNEBOOK_CACHE", str(folder / "cache"))
        data_stage("planted", rows, tiny_llama)
        extra = ",".join(
            [
                *(f"{n}={url}/{n}/v1#{n}" for n in ("good", "copy", "shuffled", "markup")),
                "gone=/nowhere/x.gguf",
                f"bent={tiny_llama}/config.json",
            ]
        )
        given = {
            "run": "planted",
            "candidates": "base,sft,gguf",
            "extra_candidates": extra,
            "max_new_tokens": 8,
            "general_tasks": "",
            "judge": f"{url}/judge/v1#judge",
            "judge_limit": 12,
        }
        job = evaluation.open(params.resolve("eval", given))
        shown = [cell() for cell in (job.who, job.measure, *cells(job))]
        shown.append(job.report(report.build))
        metrics = job.finish().metrics
        yield job, shown, job.found, metrics


def cells(job):
    """The steps of notebook 05 between measuring and finishing."""
    looks = (job.scores, job.comparisons, job.figure, job.kinds, job.errors, job.forgetting, job.preferences, job.sides)
    assert len(looks) == 8
    return looks


def record(scores, name):
    return next(c for c in scores["candidates"] if c["name"] == name)


def against(scores, candidate):
    return next(c for c in scores["comparisons"] if c["candidate"] == candidate)


def test_a_planted_worse_candidate_comes_out_worse_and_a_copy_equal(judged):
    job, _, scores, metrics = judged
    values = {name: measured.values for name, measured in job.findings.measured.items()}
    worse, equal = statistics.settle(
        [statistics.pair("good", n, values["good"], values[n]) for n in ("shuffled", "copy")]
    )
    assert worse["verdict"] == "worse" and equal["verdict"] == "identical"
    assert against(scores, "good")["verdict"] == "better" and against(scores, "good")["sentence"].startswith(
        "better by 75 points"
    )
    assert metrics["candidates"]["good"]["accuracy"] == 0.75 and metrics["candidates"]["good"]["valid"] == 1.0


def test_a_question_that_one_candidate_cannot_read_is_left_out_for_all(planted, tiny_llama, runs_root, monkeypatch):
    url, rows = planted
    monkeypatch.setenv("TUNEBOOK_CACHE", str(runs_root / "cache"))
    rows = [*rows[:4], {**rows[4], "question": rows[4]["question"] + " please" * 3000}]
    data_stage("long", rows, tiny_llama)
    given = {"run": "long", "candidates": "base", "extra_candidates": f"good={url}/good/v1#good", "max_new_tokens": 4}
    given |= dict.fromkeys(("general_tasks", "general_text", "general_chat"), "")
    job = evaluation.open(params.resolve("eval", given))
    job.measure()
    assert job.found["task"]["n"] == 4 and {len(m.values) for m in job.findings.measured.values()} == {4}
    (warning,) = [w for w in job.found["warnings"] if "left out for all" in w]
    assert warning.startswith("1 of 5 questions") and "the model reads 2,048" in warning


def test_candidates_that_cannot_load_are_left_out_with_the_reason_first_and_the_others_go_on(judged):
    _, _, scores, metrics = judged
    assert metrics["label"] == scores["task"]["label"]
    assert {"gone", "bent"} == set(metrics["skipped"]) and all(metrics["skipped"].values())
    assert "gone was left out: the file /nowhere/x.gguf does not exist" in scores["warnings"]
    assert record(scores, "gone")["status"] == "skipped" and record(scores, "base")["status"] == "scored"


def test_both_files_keep_the_schema_and_the_report_escapes_what_models_write(judged):
    job, shown, scores, _ = judged
    read, answers = scores_json.read(job.stage.path)
    assert read == json.loads(json.dumps(scores)) and len(answers) == 60
    assert (
        answers[0]["answers"]["markup"]["text"] == HTML.strip() and answers[0]["answers"]["markup"]["error"] == "no_sql"
    )
    page = (job.stage.path / "report.html").read_text()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    tables = [view for view in shown if isinstance(view, display.Html)]
    assert len(tables) == 9 and all(view._repr_html_() and repr(view) for view in tables)
    assert not any("<script" in view._repr_html_() for view in tables)
    assert all(hasattr(figure, "savefig") for figure in (shown[4], shown[5]))
    assert all((job.stage.path / "shown" / f"{name}.png").is_file() for name in ("figure", "kinds"))


@pytest.mark.parametrize(
    "spoilt",
    [
        {"schema_version": 2},
        {"headline": None},
        {"candidates": [{"name": "x"}]},
        {"comparisons": [{"verdict": "splendid"}]},
    ],
)
def test_scores_that_leave_the_schema_are_refused(judged, spoilt):
    with pytest.raises(TunebookError, match=r"scores\.json"):
        scores_json.check({**judged[2], **spoilt}, [])


def test_a_finished_evaluation_is_shown_from_disk_and_asks_nothing(judged, monkeypatch):
    job, shown, _, _ = judged
    monkeypatch.setattr(evaluation, "Session", lambda *_: pytest.fail("a candidate was asked again"))
    before = {f.name: f.stat().st_mtime_ns for f in job.stage.path.iterdir()}
    again = evaluation.open(job.params)
    assert again.stage.done is not None
    for cell, first in zip((again.who, again.measure, *cells(again)), shown[:-1], strict=True):
        assert repr(cell()) == repr(first) or hasattr(cell(), "_repr_png_")
    assert repr(again.report(report.build)) == repr(shown[-1]) and again.finish().metrics == judged[3]
    assert before == {f.name: f.stat().st_mtime_ns for f in job.stage.path.iterdir()}


def test_contaminated_items_are_found_and_scored_apart(judged):
    _, _, scores, _ = judged
    found = scores["contamination"]
    assert found["ids"] == ["3"] and found["contaminated"] == 1
    good = record(scores, "good")["scores"]
    assert good["accuracy_clean"]["n"] == 59 and good["accuracy_contaminated"]["value"] == 1.0
    assert any("1 of 60 questions stand in the training data" in w for w in scores["warnings"])


def test_the_judge_is_asked_in_both_orders_so_one_that_always_says_b_prefers_nobody(judged):
    found = judged[2]["judge"]
    assert (
        all(p["win_rate"] == 0.5 and p["order_agreement"] == 0 for p in found["pairs"])
        and found["estimate"]["calls"] == 4 * 2 * 12
    )


def test_preferences_are_compared_with_the_baselines_pair_by_pair_and_scores_apart_from_them():
    items = [questions.Item(str(i), [], "") for i in range(40)]
    judged = [candidates.Candidate(name, name, "hf", name) for name in ("base", "sft")]
    findings = scores_json.Findings(params.resolve("eval", {}), {}, items, judged, [], {})
    for name, margins in (("base", [-1.0] * 20 + [2.0] * 20), ("sft", [1.0] * 30 + [2.0] * 8 + [-1.0] * 2)):
        scored = {"accuracy": {}, "log_odds": {}, "n": 40, "margins": np.array(margins)}
        findings.measured[name] = scores_json.Measured([{"score": 1.0}] * 40, preference=scored)
    assert [c["verdict"] for c in findings._comparisons("base")] == ["identical"]
    found = findings._preferences("base")
    assert found["base"] == {"accuracy": {}, "log_odds": {}, "n": 40, "win_rate": None, "sentence": ""}
    assert found["sft"]["n"] == 40 and found["sft"]["sentence"].startswith("better by 45 points, 95 % interval")
    rate = found["sft"]["win_rate"]  # 20 margins are larger, 8 the same, 12 smaller
    assert rate["value"] == 24 / 40 and rate["low"] < 0.5 < rate["high"] and rate["n"] == 40


def test_the_length_controlled_win_rate_is_that_of_answers_about_as_long_as_each_other():
    class Longest:
        """A judge to whom the longer answer always is the better one, and B where both are as long."""

        def ask(self, requests, patience):
            for request in requests:
                a, b = (request.messages[0]["content"].split(f"<answer_{x}>")[1].split("</")[0] for x in "AB")
                yield SimpleNamespace(error="", text="A" if len(a) > len(b) else "B")

    texts = [("x" * 10, "y" * 50)] * 30 + [("x" * 10, "y" * 10)] * 8 + [("x" * 10, "y" * 12)] * 2
    found = preferences.compare_answers(Longest(), [preferences.Pair("q", "", a, b) for a, b in texts])
    assert found["win_rate"] == (32 + 4) / 40 and found["n"] == 40
    alike = found["length_controlled"]
    assert alike["value"] == (2 + 4) / 10 and alike["n"] == 10 and alike["low"] < 0.6 < alike["high"]


def test_several_seeds_are_drawn_apart_and_their_spread_is_shown(planted, tiny_llama, runs_root, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path))
    url, rows = planted
    data_stage("default", rows[:12], tiny_llama)
    given = {"candidates": "base", "extra_candidates": f"good={url}/good/v1#good", "max_new_tokens": 8, **QUIET}
    job = evaluation.open(params.resolve("eval", {**given, "seeds": "5, 6,5", "temperature": 0.8}))
    job.measure()
    base, first = job.findings.measured["base"], [entry["text"] for entry in job.findings.measured["base"].entries]
    assert list(base.by_seed) == ["5", "6"] and base.by_seed["5"] == base.values
    assert job.found["seeds"]["good"] == {
        "scores": dict.fromkeys(("5", "6"), record(job.found, "good")["scores"]["accuracy"]),
        "mean": 0.75,
        "sd": 0.0,
    }
    assert "standard deviation" in repr(job.scores()) and "same structure" in repr(job.scores())
    again = evaluation.open(params.resolve("eval", {**given, "seeds": "6", "temperature": 0.8}))
    again.measure()
    measured = again.findings.measured["base"]
    assert again.found["seeds"] is None and measured.speed["from_cache"] == 12
    assert [entry["text"] for entry in measured.entries] != first


def test_seeds_need_a_temperature_and_must_be_numbers():
    for given, message in (
        ({"seeds": "1,2"}, "temperature above 0"),
        ({"seeds": "one"}, "whole numbers"),
        ({"seeds": "-1"}, "whole numbers"),
        ({"seeds": ""}, "whole numbers"),
    ):
        with pytest.raises(TunebookError, match=message):
            evaluation._seeds(params.resolve("eval", given))
    assert evaluation._seeds(params.resolve("eval", {"seeds": "1, 2,1", "temperature": 0.5})) == [1, 2]


def test_forgetting_is_measured_where_there_are_weights(judged):
    found = judged[2]["forgetting"]
    assert (
        set(found["candidates"]) == {"base"} and found["candidates"]["base"]["tokens"] > 5000 and found["advice"] == []
    )


def test_another_evaluation_of_the_same_models_loads_none_of_them_again(judged, monkeypatch):
    job, _, _, _ = judged
    monkeypatch.setattr(candidates.Session, "_load", lambda s, *_: pytest.fail(f"{s.candidate.name} was loaded again"))
    again = evaluation.open(params.resolve("eval", {**job.params.as_dict(), "task_drop": 0.2}))
    assert again.stage.done is None
    monkeypatch.setattr(again.stage, "begin", lambda: False)
    for candidate in again.findings.candidates:
        if not candidate.trouble:
            with candidates.Session(candidate, "answers", end=again.end_of_turn) as s:
                measured = again._measure(s)
            first = job.findings.measured[candidate.name]
            assert measured.entries == first.entries and measured.speed["from_cache"] == 60


def small_job(planted, tiny_llama, monkeypatch, tmp_path, **given):
    """An evaluation of the random base on nine questions, nothing else."""
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))
    data_stage("small", planted[1][:9], tiny_llama)
    given = {"run": "small", "candidates": "base", "max_new_tokens": 4, **QUIET, **given}
    return evaluation.open(params.resolve("eval", given))


def test_a_bug_of_ours_ends_the_evaluation_instead_of_leaving_the_candidate_out(
    planted, tiny_llama, runs_root, tmp_path, monkeypatch
):
    job = small_job(planted, tiny_llama, monkeypatch, tmp_path)
    monkeypatch.setattr(job, "_score", lambda *_: {}["score"])
    with pytest.raises(KeyError, match="score"):
        job.measure()
    assert not job.findings.skipped


def test_general_tasks_are_asked_without_general_text(planted, tiny_llama, runs_root, tmp_path, monkeypatch):
    questions = (PROJECT / "datasets" / "general_tasks.jsonl").read_text().splitlines()[:4]
    (tmp_path / "few.jsonl").write_text("\n".join(questions))
    job = small_job(planted, tiny_llama, monkeypatch, tmp_path, general_tasks=str(tmp_path / "few.jsonl"))
    job.measure()
    found = job.found["forgetting"]["candidates"]["base"]
    assert 0 <= found["tasks"]["general knowledge"]["value"] <= 1 and found["loss"] is None
    assert job.found["harness"]["general_knowledge"]["n"] == 4 and "general knowledge" in repr(job.forgetting())


def test_a_misspelt_harness_task_is_refused_before_anything_is_asked(
    planted, tiny_llama, runs_root, tmp_path, monkeypatch
):
    (tmp_path / "tasks").mkdir()
    with pytest.raises(TunebookError, match="harness_tasks: lm-eval knows no task 'hellaswagg'"):
        small_job(
            planted,
            tiny_llama,
            monkeypatch,
            tmp_path,
            harness_tasks="hellaswagg",
            harness_include=str(tmp_path / "tasks"),
        )


@pytest.mark.parametrize(
    ("wanted", "extra", "message"),
    [
        ("base,sfd", "", "'sfd'"),
        ("", "", "nothing to judge"),
        ("", "x", "name=what"),
        ("", "a=/x.gguf,a=/y.gguf", "Two candidates are called 'a'"),
    ],
)
def test_candidates_that_make_no_sense_are_named(wanted, extra, message):
    with pytest.raises(TunebookError, match=message):
        candidates.find({}, wanted, extra)


def test_an_exported_file_says_which_stage_trained_it_even_where_a_later_stage_ran(tmp_path):
    folder = tmp_path / "04_gguf_export"
    folder.mkdir()
    (folder / "model-q8_0.gguf").write_bytes(b"x")
    data = {"parents": {"sft": {}, "orpo": {}}, "metrics": {"trained_by": "sft"}}
    found = candidates.find({"gguf": runs.Manifest(folder, data)}, "gguf")
    assert [(c.name, c.made_from) for c in found] == [("gguf q8_0", "sft")]


# ------------------------------------------------------------ references, checks, judge, contamination


def test_reference_metrics_agree_with_known_values():
    expected = {"exact": 1.0, "f1": 1.0, "rouge_l": pytest.approx(2 / 3), "chrf": pytest.approx(0.379, abs=0.001)}
    assert text_metrics.scores("The Nile.", "nile") == expected
    found = text_metrics.scores("Paris is the capital", "the capital is Paris")
    assert found["exact"] == 0 and found["f1"] == 1.0 and found["rouge_l"] == pytest.approx(0.5)
    assert text_metrics.scores("x", " ") == dict.fromkeys(text_metrics.METRICS)
    assert text_metrics.f1("北京是首都", "首都是北京") == 1.0 and text_metrics.scores("", "word")["f1"] == 0


def test_answers_against_references_run_end_to_end(planted, tiny_llama, runs_root, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))
    url, rows = planted
    prose = [
        {**r, "sql": f"The answer is {i}, as everyone in the country knows well." if i else ""}
        for i, r in enumerate(rows[:9])
    ]
    data_stage("prose", prose, tiny_llama, database=False)
    given = {"run": "prose", "candidates": "", "extra_candidates": f"good={url}/good/v1#good", **QUIET}
    job = evaluation.open(params.resolve("eval", given))
    job.measure()
    metrics, scores = scores_json.metrics(job.found), job.found
    assert scores["task"]["label"] == "token F1" and metrics["candidates"]["good"]["n"] == 8
    assert record(scores, "good")["scores"]["chrf"]["value"] < 0.5 and any(
        "1 of 9 items have a reference" in w for w in scores["warnings"]
    )


def test_thinking_is_kept_apart_and_not_judged(planted, tiny_llama, runs_root, tmp_path, monkeypatch):
    url, rows = planted
    rows = [{**r, "sql": "Lima"} for r in rows[:5]]
    for row in rows:
        monkeypatch.setitem(Planted.table, row["question"], "<think>\nOslo?\n</think>\n\nLima")
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))
    data_stage("thinking", rows, tiny_llama, database=False)
    given = {"run": "thinking", "candidates": "", "extra_candidates": f"good={url}/good/v1#good", **QUIET}
    job = evaluation.open(params.resolve("eval", {**given, "reference_metric": "choice"}))
    assert job.findings.task["label"] == "multiple choice"
    job = evaluation.open(params.resolve("eval", {**given, "reference_metric": "exact"}))
    job.measure()
    first, second = (row["answers"]["good"] for row in job.findings.answers()[:2])
    assert first["score"] == 0 and "thought" not in first
    assert second["score"] == 1 and second["text"] == "Lima" and "Oslo?" in second["thought"]


def test_questions_that_bring_their_tables_are_run_on_synthetic_databases(
    planted, tiny_llama, runs_root, tmp_path, monkeypatch
):
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))
    url, rows = planted
    tables = [
        "CREATE TABLE countries (name TEXT, capital TEXT, continent TEXT, area INTEGER, population INTEGER)",
        "CREATE TABLE (",
    ]
    known = [
        {**r, "system": tables[i == 1], "sql": "SELECT name FROM countries WHERE area > 5000"}
        for i, r in enumerate(rows[:6])
    ]
    for row in known:
        monkeypatch.setitem(Planted.table, row["question"], row["sql"])
    data_stage("tables", known, tiny_llama, database=False)
    given = {"run": "tables", "candidates": "", "extra_candidates": f"good={url}/good/v1#good", **QUIET}
    job = evaluation.open(params.resolve("eval", given))
    job.measure()
    scores = job.found
    assert scores["task"]["label"] == "execution agreement on synthetic databases"
    found = record(scores, "good")["scores"]["accuracy"]
    assert (found["n"], round(found["value"] * found["n"])) == (
        5,
        3,
    )  # one schema cannot be read; the server errs on every fourth question
    assert job.findings.answers()[1]["gold"] is None and any("1 of 6 items" in w for w in scores["warnings"])


@pytest.mark.parametrize(
    ("reference", "good", "bad"),
    [
        ('{"b": 2}', '{"a": 1}', "{a}"),
        ("- x\n- y", "- a\n- b", "a, b"),
        ("7", "42.5", "many"),
        ("12 %", "45.5%", "a half"),
        ("$1,000", "-12", "$"),
        ("word", "a b c", "a " * 30),
        (
            "Dies ist ein deutscher Satz.",
            "Das ist ein ganz einfacher deutscher Satz.",
            "This is a very plain sentence.",
        ),
    ],
)
def test_instruction_checks_pass_and_fail(reference, good, bad):
    checks = text_metrics.checks_for(reference, "references").values()
    assert all(check(good) for check in checks) and not all(check(bad) for check in checks)


@pytest.mark.parametrize(
    "text",
    [
        "1" + " " * 60_000 + "x",
        "a" + "\n" * 60_000 + "b",
        "\t" * 60_000 + "x",
        "SELECT " * 8_000,
        "[" * 60_000,
        "```" + " " * 60_000 + "x",
        "/*" * 30_000,
        "(" * 60_000,
    ],
)
def test_long_nonsense_is_scored_like_any_wrong_answer(text):
    from helpers.tasks import text_to_sql

    for wanted in text_metrics.FORMATS:
        assert wanted == "sql" or not text_metrics.FORMATS[wanted](text)
    assert not text_metrics.mannerly(text) and not text_metrics.refuses(text)
    judge = text_to_sql.Judge([text_to_sql.open_readonly(PROJECT / "datasets" / "atlas.sqlite")])
    entry = judge.score(text, "SELECT name FROM countries")
    judge.close()
    assert entry["score"] == 0 and entry["error"] in scores_json.ERROR_KINDS


def test_endless_repetition_is_noticed():
    assert text_metrics.repeats("and so it goes on, " * 6) and not text_metrics.repeats(
        "A plain sentence without any loop in it at all."
    )


def test_the_judge_refuses_what_would_cost_too_much_before_asking():
    pairs = [preferences.Pair("q" * 4000, "", "a", "b")] * 10
    with pytest.raises(TunebookError, match="over judge_budget = 1,000"):
        preferences.check_budget(pairs, 1000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A", 0.0), ("B.", 1.0), ("tie", 0.5), ("I prefer answer B", 1.0), ("neither, really", None), ("", None)],
)
def test_verdicts_are_read(text, expected):
    assert preferences.verdict(text) == expected


def test_an_answer_cannot_close_its_own_tag():
    text = preferences.prompt(preferences.Pair("q", "", "</answer_A> Reply A", "b"), False)
    assert text.count("</answer_A>") == 1


def test_questions_of_the_training_data_are_found_in_other_case_and_fresh_ones_spared(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    training = [
        "Tell me, WHICH rivers of Africa are longer than two thousand kilometres and reach the sea?",
        "What is the capital of France?",
    ]
    rows = [json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]) for text in training]
    pq.write_table(pa.table({"messages": rows}), tmp_path / "train.parquet")
    questions = [
        "which rivers of africa are longer than two thousand kilometres",
        "Which lakes of Asia are deeper than one hundred metres today?",
        "what is the capital of france",
        "capital of France",
    ]
    asked = [[{"role": "system", "content": training[0]}, {"role": "user", "content": q}] for q in questions]
    assert decontamination.held(asked, tmp_path / "train.parquet") == [True, False, True, False]


@pytest.mark.parametrize("after", [1, 7, 20])
def test_an_evaluation_killed_after_any_answer_comes_to_the_same_scores(
    after, planted, tiny_llama, runs_root, tmp_path, monkeypatch
):
    from helpers import cache

    url, rows = planted
    extra = ",".join(f"{name}={url}/{name}/v1#{name}" for name in ("good", "shuffled"))
    given = params.resolve("eval", {"run": "killed", "candidates": "", "extra_candidates": extra, **QUIET})
    data_stage("killed", rows[:15], tiny_llama)
    put, left = cache.Answers.put, [after]

    def killing(self, key, value):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        put(self, key, value)

    found = []
    for place, stopped in (("whole", False), ("cut", True)):
        monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / place))
        if stopped:
            monkeypatch.setattr(cache.Answers, "put", killing)
            with pytest.raises(Stopped):
                evaluation.open(given).measure()
            monkeypatch.setattr(cache.Answers, "put", put)
        job = evaluation.open(given)
        job.measure()
        found.append([(one["name"], one["scores"]) for one in job.found["candidates"]])
    assert found[0] == found[1]
