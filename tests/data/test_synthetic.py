"""Data written by a model: a real llama.cpp server with the real default model answers; a proxy before it counts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.cache import Answers
from helpers.data import synthetic
from helpers.data.tables import StepReport, Table
from helpers.data.turns import make_row
from helpers.errors import TunebookError
from helpers.llm_client import Client, Endpoint
from helpers.params import DataParams

TEXTS = [
    "The Eiffel Tower was completed in 1889 in Paris. It is 330 metres tall and was built by the company "
    "of the engineer Gustave Eiffel.",
    "Honey bees live in colonies of up to 60,000 bees. A colony has one queen, which lays up to 2,000 "
    "eggs a day in summer.",
    "The river Danube flows through ten countries and ends in the Black Sea. It is 2,850 kilometres long.",
]
DOCUMENTS = [
    make_row("text", [{"role": "text", "content": t}], source="docs", file="docs.txt", row=i + 1)
    for i, t in enumerate(TEXTS)
]
ONE = DataParams(pairs_per_document=1)


def at(proxy, folder, **options):
    endpoint = Endpoint(proxy.url, "", **{"key_name": "", "concurrency": 2, "retries": 3, **options})
    return Client(endpoint, Answers(folder, "synthetic"))


def flat(steps):
    return [row for batch in steps for row in batch]


# ---------------------------------------------------------------- with the real model


def test_pairs_come_from_documents_and_a_second_run_asks_nothing(proxy, tmp_path, capsys):
    report = StepReport("synthetic")
    made = flat(synthetic.question_answers([DOCUMENTS], report, at(proxy, tmp_path), ONE, 120, 0.0))
    assert len(proxy.bodies) == len(DOCUMENTS) == report.figures["asked"] and proxy.most <= 2
    assert (
        report.seen == len(DOCUMENTS)
        and report.kept == len(made)
        and len(made) + sum(report.dropped.values()) == len(DOCUMENTS)
    )
    assert made, report.as_dict()
    for row in made:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] and all(
            m["content"] for m in row["messages"]
        )
        assert (
            row["kind"] == "sft"
            and row["meta"]["document"] in {d["id"] for d in DOCUMENTS}
            and row["file"] == "docs.txt"
        )
    assert report.figures["completion_tokens"] > 0
    assert "3 questions to ask (0 already answered)" in capsys.readouterr().out

    again = StepReport("synthetic")
    assert flat(synthetic.question_answers([DOCUMENTS], again, at(proxy, tmp_path), ONE, 120, 0.0)) == made
    assert (
        len(proxy.bodies) == len(DOCUMENTS)
        and again.figures["asked"] == 0
        and again.figures["from_journal"] == len(DOCUMENTS)
    )
    assert "0 questions to ask (3 already answered)" in capsys.readouterr().out


def test_summaries_stand_beside_the_questions_in_one_strict_reply(proxy, tmp_path):
    asked = DataParams(pairs_per_document=1, synthetic="questions_summaries")
    report = StepReport("synthetic")
    made = flat(synthetic.question_answers([DOCUMENTS], report, at(proxy, tmp_path), asked, 200, 0.0))
    told = json.loads(proxy.bodies[0])["response_format"]["json_schema"]
    assert told["strict"] and told["schema"]["additionalProperties"] is False
    assert told["schema"]["required"] == ["pairs", "summary"]
    summaries = [row for row in made if row["messages"][0]["content"].startswith("Summarise")]
    broken = report.dropped.get("answer unusable", 0)  # a reply that was cut off loses all of its rows at once
    assert summaries and len(made) + sum(report.dropped.values()) == 2 * len(DOCUMENTS) - broken
    texts = [text for text in TEXTS if text in summaries[0]["messages"][0]["content"]]
    assert texts and summaries[0]["messages"][1]["content"] not in texts


# Answers of 24 tokens break off; they are answers too.
KILLED = """
import sys; sys.path[:0] = [".", "tests"]
from tests.data.test_synthetic import *
client = Client(Endpoint(sys.argv[1], "", key_name="", concurrency=1), Answers(Path(sys.argv[2]), "synthetic"))
for _ in synthetic.question_answers([DOCUMENTS], StepReport("s"), client, ONE, 24, 0.0):
    pass
"""


def test_a_killed_job_asks_nothing_twice(proxy, tmp_path):
    journal = tmp_path / "synthetic.jsonl"

    def lines():
        """Whole lines; one that is torn has no end."""
        return [line for line in journal.read_bytes().split(b"\n")[:-1] if line] if journal.exists() else []

    job = subprocess.Popen([sys.executable, "-c", KILLED, proxy.url, str(tmp_path)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 300
    while len(lines()) < 2:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    answered = len(lines()) - 1  # the first line names the server
    asked = len(proxy.bodies)
    assert answered <= asked <= answered + 1 and asked < len(DOCUMENTS) + 1
    report = StepReport("synthetic")
    flat(synthetic.question_answers([DOCUMENTS], report, at(proxy, tmp_path, concurrency=1), ONE, 24, 0.0))
    assert report.seen == len(DOCUMENTS) and report.figures["from_journal"] == answered
    assert len(proxy.bodies) - asked == len(DOCUMENTS) - answered, "only what had no answer is asked"


def test_preference_pairs_by_rejection_sampling(proxy, tmp_path):
    questions = [
        make_row(
            "sft", [{"role": "user", "content": q}, {"role": "assistant", "content": a}], source="s", file="q", row=i
        )
        for i, (q, a) in enumerate([("Name a river in Europe.", "The Danube."), ("Name a colour.", "Blue.")])
    ]
    drawn = {"samples": 2, "max_tokens": 40, "temperature": 1.0, "good": 0.0}
    report = StepReport("pairs")
    judged = {}

    def judge(answer, reference):
        judged[answer] = min(1.0, len(answer) / 500)
        return judged[answer]

    made = flat(synthetic.preference_pairs([questions], report, at(proxy, tmp_path), ONE, judge, margin=0.001, **drawn))
    assert len(proxy.bodies) == 4 and report.seen == 2 and len(made) + sum(report.dropped.values()) == 2
    assert made, report.as_dict()
    for row in made:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert row["kind"] == "preference" and judged[chosen] > judged[rejected] and chosen != rejected
        assert row["messages"][-1]["role"] == "user"
    strict = StepReport("pairs")
    assert (
        flat(synthetic.preference_pairs([questions], strict, at(proxy, tmp_path), ONE, judge, margin=1.1, **drawn))
        == []
    )
    assert len(proxy.bodies) == 4, "other margins need no new answers"
    assert (
        set(strict.dropped) <= {"no clear winner", "fewer than two different answers"}
        and sum(strict.dropped.values()) == 2
    )


# ---------------------------------------------------------------- nothing is asked


def test_a_job_that_could_cost_too_much_is_refused_before_the_first_question(proxy, tmp_path, capsys):
    p = DataParams(pairs_per_document=1, max_cost=2.0, price_in=1_000.0, price_out=10_000.0)
    with pytest.raises(TunebookError, match=r"could cost 3\.\d\d, more than max_cost = 2\.00; none of these was asked"):
        flat(synthetic.question_answers([DOCUMENTS], StepReport("s"), at(proxy, tmp_path), p, 96))
    assert "3 questions to ask (0 already answered), about 284 tokens" in (said := capsys.readouterr().out)
    assert "at most 288 out; cost at most 3." in said and proxy.bodies == []


def test_the_cost_of_questions_and_of_pairs_counts_against_one_limit(proxy, tmp_path):
    p = DataParams(pairs_per_document=1, max_cost=4.0, price_out=10_000.0)
    report, client = StepReport("s"), at(proxy, tmp_path)
    rows = flat(synthetic.question_answers([DOCUMENTS], report, client, p, 120, 0.0))
    assert report.figures["cost_at_most"] == pytest.approx(3.6)
    asked = len(proxy.bodies)
    with pytest.raises(TunebookError, match="more than max_cost"):
        flat(synthetic.preference_pairs([rows], report, client, p))
    assert rows and len(proxy.bodies) == asked


def test_a_limit_without_prices_is_refused(tmp_path):
    p = DataParams(synthetic="questions", endpoint="http://127.0.0.1:9/v1", endpoint_model="m", max_cost=5.0)
    with pytest.raises(TunebookError, match="needs price_in and price_out"):
        synthetic.generate(p, Table.collect([DOCUMENTS]), StepReport("s"), Answers(tmp_path, "synthetic"))


def test_rows_that_are_no_documents_are_refused():
    row = make_row("sft", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], file="f", row=3)
    with pytest.raises(TunebookError, match="Row 3 of f is a sft row"):
        flat(synthetic.question_answers([[row]], StepReport("s"), Client(Endpoint("http://127.0.0.1:9/v1", "m")), ONE))


@pytest.mark.parametrize(
    ("question", "answer", "why"),
    [
        ("How tall is the tower?", "It is 330 metres tall.", ""),
        ("", "It is tall.", "question or answer empty"),
        ("How tall is it?", " ", "question or answer empty"),
        ("What does the passage say?", "It is 330 metres tall.", "speaks of the document"),
        ("这座塔有多高？根据本文回答", "It is 330 metres tall.", "speaks of the document"),
        ("How tall is the tower?", "The document states 330 metres.", "speaks of the document"),
        ("Who sang it?", "Freddie Mercury performed that song wonderfully", "answer is not in the document"),
    ],
)
def test_poor_pairs_have_a_reason(question, answer, why):
    seen = set()
    assert synthetic.pair_fault(question.strip(), answer.strip(), TEXTS[0], seen) == why
    if not why:
        assert synthetic.pair_fault(question.upper(), answer, TEXTS[0], seen) == "question asked before"


def test_the_judge_orders_answers_by_their_nearness():
    reference = "The Danube flows into the Black Sea."
    answers = (reference, "It flows into the Black Sea", "Into a sea", "Potatoes")
    score = [synthetic.f1(answer, reference) for answer in answers]
    assert score[0] == 1.0 and score == sorted(score, reverse=True) and score[3] == 0.0
    assert synthetic.f1("它流入黑海", "多瑙河流入黑海") > synthetic.f1("我不知道", "多瑙河流入黑海")
