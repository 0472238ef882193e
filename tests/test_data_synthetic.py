"""Data written by a model: a real llama.cpp server with the real default model answers; a proxy before it counts and disturbs."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from helpers import llm_client as ep
from helpers.data import synthetic, toxicity
from helpers.data.tables import StepReport, make_row
from helpers.errors import TunebookError

TEXTS = [
    "The Eiffel Tower was completed in 1889 in Paris. It is 330 metres tall and was built by the company of the engineer Gustave Eiffel.",
    "Honey bees live in colonies of up to 60,000 bees. A colony has one queen, which lays up to 2,000 eggs a day in summer.",
    "The river Danube flows through ten countries and ends in the Black Sea. It is 2,850 kilometres long.",
]
DOCUMENTS = [
    make_row("text", [{"role": "text", "content": t}], source="docs", file="docs.txt", row=i + 1)
    for i, t in enumerate(TEXTS)
]
SMALL = synthetic.Settings(per_document=1, max_tokens=120, temperature=0.0)
MARK = {"type": "object", "properties": {"score": {"type": "integer", "enum": [1, 2, 3]}}, "required": ["score"]}


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the real server, counts them, and answers the first ones itself with `faults`: (status, headers)."""

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.faults, self.bodies, self.running, self.most = upstream, [], [], 0, 0
        self.lock, self.keys = threading.Lock(), set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        proxy, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        with proxy.lock:
            proxy.bodies.append(body)
            proxy.keys.add(self.headers.get("Authorization"))
            fault = proxy.faults.pop(0) if proxy.faults else None
            proxy.running += 1
            proxy.most = max(proxy.most, proxy.running)
        status, headers, reply = 200, {}, b"{}"
        if fault == "hang up":
            self.close_connection = True
        elif fault:
            status, headers = fault
            reply = json.dumps({"error": {"message": f"planted fault {status}"}}).encode()
        else:
            request = urllib.request.Request(proxy.upstream + self.path, body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=300) as answer:
                    reply = answer.read()
            except urllib.error.HTTPError as err:
                status, reply = err.code, err.read()
        with proxy.lock:
            proxy.running -= 1
        if fault != "hang up":
            try:
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(reply)),
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client was killed

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(smollm2):
    from helpers.gguf.server import server
    from helpers.model import offline

    with server(offline.wheel_gguf(), parallel=2, context=1024) as running:
        yield running


@pytest.fixture
def proxy(server):
    made = Proxy(server.url)
    yield made
    made.shutdown()
    made.server_close()


def at(proxy, **options):
    return ep.Endpoint(proxy.url, "smollm2", **{"key_name": "", "concurrency": 2, "retries": 3, **options})


def flat(steps):
    return [row for batch in steps for row in batch]


def marks(texts, **options):
    return [ep.Request([{"role": "user", "content": text}], MARK, max_tokens=24, **options) for text in texts]


# ---------------------------------------------------------------- with the real model


def test_pairs_come_from_documents_and_a_second_run_asks_nothing(proxy, tmp_path, capsys):
    report = StepReport("synthetic")
    made = flat(synthetic.question_answers([DOCUMENTS], report, at(proxy), tmp_path / "journal.jsonl", SMALL))
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
    assert flat(synthetic.question_answers([DOCUMENTS], again, at(proxy), tmp_path / "journal.jsonl", SMALL)) == made
    assert (
        len(proxy.bodies) == len(DOCUMENTS)
        and again.figures["asked"] == 0
        and again.figures["from_journal"] == len(DOCUMENTS)
    )
    assert "0 questions to ask (3 already answered)" in capsys.readouterr().out


CUT = synthetic.Settings(per_document=1, max_tokens=24, temperature=0.0)  # answers that break off are answers too
KILLED = """
import sys
from tests.test_data_synthetic import *
for _ in synthetic.question_answers([DOCUMENTS], StepReport("s"), ep.Endpoint(sys.argv[1], "smollm2", key_name="", concurrency=1), sys.argv[2], CUT):
    pass
"""


def test_a_killed_job_asks_nothing_twice(proxy, tmp_path):
    journal = tmp_path / "journal.jsonl"
    job = subprocess.Popen(
        [sys.executable, "-c", KILLED, proxy.url, str(journal)], cwd=os.path.dirname(os.path.dirname(__file__))
    )
    deadline = time.monotonic() + 300
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 1):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    answered = journal.read_bytes().count(b"\n")
    asked = len(proxy.bodies)
    assert answered <= asked <= answered + 1 and asked < len(DOCUMENTS) + 1
    report = StepReport("synthetic")
    flat(synthetic.question_answers([DOCUMENTS], report, at(proxy, concurrency=1), journal, CUT))
    assert report.seen == len(DOCUMENTS) and report.figures["from_journal"] == answered
    assert len(proxy.bodies) - asked == len(DOCUMENTS) - answered, "only what had no answer is asked"


def test_preference_pairs_by_rejection_sampling(proxy, tmp_path):
    questions = [
        make_row(
            "sft", [{"role": "user", "content": q}, {"role": "assistant", "content": a}], source="s", file="q", row=i
        )
        for i, (q, a) in enumerate([("Name a river in Europe.", "The Danube."), ("Name a colour.", "Blue.")])
    ]
    settings = synthetic.Settings(samples=2, max_tokens=40, temperature=1.0, margin=0.001, good=0.0)
    report = StepReport("pairs")
    judged = {}

    def judge(question, reference, answer):
        judged[answer] = min(1.0, len(answer) / 500)
        return judged[answer]

    made = flat(synthetic.preference_pairs([questions], report, at(proxy), tmp_path / "journal.jsonl", settings, judge))
    assert len(proxy.bodies) == 4 and report.seen == 2 and len(made) + sum(report.dropped.values()) == 2
    assert made, report.as_dict()
    for row in made:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert row["kind"] == "preference" and judged[chosen] > judged[rejected] and chosen != rejected
        assert row["messages"][-1]["role"] == "user"
    strict = StepReport("pairs")
    impossible = synthetic.Settings(samples=2, max_tokens=40, temperature=1.0, margin=1.1, good=0.0)
    assert (
        flat(synthetic.preference_pairs([questions], strict, at(proxy), tmp_path / "journal.jsonl", impossible, judge))
        == []
    )
    assert len(proxy.bodies) == 4, "other margins need no new answers"
    assert (
        set(strict.dropped) <= {"no clear winner", "fewer than two different answers"}
        and sum(strict.dropped.values()) == 2
    )


def test_an_endpoint_judges_and_scores_toxicity(proxy, tmp_path):
    row = make_row(
        "sft",
        [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "Two."}],
        file="f",
        row=1,
    )
    book = ep.Journal(tmp_path / "judge.jsonl")
    scores = synthetic._scores(row, ["Two.", "Blue."], at(proxy), book, StepReport("s"))
    book.close()
    assert len(scores) == 2 and all(0 <= s <= 1 for s in scores)
    kept = flat(
        toxicity.drop_toxic(
            [[row]], StepReport("t"), f"{proxy.url}#smollm2", threshold=1.1, journal=tmp_path / "toxic.jsonl"
        )
    )
    assert kept == [row] and len(proxy.bodies) == 3


# ---------------------------------------------------------------- faults on the way


def test_broken_and_refused_connections_are_retried(proxy, tmp_path):
    proxy.faults = [(503, {"Retry-After": "0"}), (429, {"Retry-After": "0"}), "hang up", (500, {"Retry-After": "0"})]
    book = ep.Journal(tmp_path / "j")
    replies = list(ep.ask_all(at(proxy, retries=5), marks(["one", "two"]), book))
    assert [r.error for r in replies] == ["", ""] and len(proxy.bodies) == 6
    assert all(r.value["score"] in (1, 2, 3) for r in replies)
    book.close()


def test_one_refused_question_does_not_stop_the_others(proxy, tmp_path):
    proxy.faults = [(400, {})]
    book = ep.Journal(tmp_path / "j")
    replies = list(ep.ask_all(at(proxy, concurrency=1), marks(["one", "two"]), book))
    assert replies[0].error == "the server refused the question: planted fault 400" and replies[0].value is None
    assert replies[1].error == "" and [r.request.messages[0]["content"] for r in replies] == ["one", "two"]
    book.close()


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([(401, {})], r"refused the key in \$THE_KEY"),
        ([(404, {})], "was not found.*ends in /v1"),
        ([(500, {"Retry-After": "0"})] * 9, "failed 2 times.*is kept"),
    ],
)
def test_what_stops_a_job_says_so_and_keeps_the_answers(proxy, tmp_path, monkeypatch, faults, message):
    monkeypatch.setenv("THE_KEY", "sk-secret-123")
    book = ep.Journal(tmp_path / "j")
    endpoint = at(proxy, concurrency=1, retries=1, key_name="THE_KEY")
    list(ep.ask_all(endpoint, marks(["one"]), book))
    proxy.faults = list(faults)
    with pytest.raises(TunebookError, match=message) as caught:
        list(ep.ask_all(endpoint, marks(["one", "two", "three"]), book))
    assert "sk-secret" not in str(caught.value) and proxy.keys == {"Bearer sk-secret-123"}
    assert len(book) == 1 and b"sk-secret" not in (tmp_path / "j").read_bytes()
    proxy.faults.clear()
    assert [r.from_journal for r in ep.ask_all(endpoint, marks(["one", "two"]), book)] == [True, False]
    book.close()


def test_a_server_that_is_not_there_is_named(tmp_path):
    book = ep.Journal(tmp_path / "j")
    with pytest.raises(TunebookError, match=r"'m' at http://127.0.0.1:9/v1 does not answer.*start the server"):
        list(ep.ask_all(ep.Endpoint("http://127.0.0.1:9/v1", "m", retries=0), marks(["one"]), book))
    with pytest.raises(TunebookError, match="is no address"):
        list(ep.ask_all(ep.Endpoint("localhost:8080", "m"), marks(["one"]), book))
    book.close()


def test_the_same_question_twice_is_sent_once(proxy, tmp_path):
    book = ep.Journal(tmp_path / "j")
    replies = list(ep.ask_all(at(proxy), marks(["same", "same", "same"]), book))
    assert len(proxy.bodies) == 1 and len({json.dumps(r.value) for r in replies}) == 1 and len(replies) == 3
    book.close()


# ---------------------------------------------------------------- journal, estimate, checks: nothing is asked


def test_a_torn_journal_is_read_to_its_last_whole_line(tmp_path):
    book = ep.Journal(tmp_path / "j")
    book.write("a", {"content": "1"})
    book.close()
    with (tmp_path / "j").open("ab") as file:
        file.write(b'garbage\n{"key": "b", "cont')
    book = ep.Journal(tmp_path / "j")
    assert "a" in book and "b" not in book and len(book) == 1
    book.write("b", {"content": "2"})
    book.close()
    book = ep.Journal(tmp_path / "j")
    assert book.read("a")["content"] == "1" and book.read("b")["content"] == "2"
    with pytest.raises(TunebookError, match="Another process is writing"):
        ep.Journal(tmp_path / "j")
    book.close()


def test_the_estimate_counts_before_anything_is_asked(tmp_path, tokenizer):
    endpoint = ep.Endpoint("http://127.0.0.1:9/v1", "m", price_in=1.0, price_out=10.0)
    requests = marks(["x" * 350] * 2)
    planned = ep.estimate(endpoint, requests)
    assert (planned.requests, planned.prompt_tokens, planned.completion_tokens) == (2, 200, 48)
    assert planned.cost == pytest.approx((200 + 480) / 1e6)
    assert ep.estimate(endpoint, requests, tokenizer=tokenizer).prompt_tokens == 2 * len(
        tokenizer("x" * 350)["input_ids"]
    )


def test_a_job_that_could_cost_too_much_is_refused_before_the_first_question(proxy, tmp_path):
    dear = at(proxy, price_out=1e6)
    settings = synthetic.Settings(per_document=1, max_tokens=96, max_cost=5.0)
    with pytest.raises(TunebookError, match=r"could cost 288.00, more than max_cost = 5.00; nothing was asked"):
        flat(synthetic.question_answers([DOCUMENTS], StepReport("s"), dear, tmp_path / "j", settings))
    assert proxy.bodies == []


def test_rows_that_are_no_documents_are_refused(tmp_path):
    row = make_row("sft", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], file="f", row=3)
    with pytest.raises(TunebookError, match="Row 3 of f is a sft row"):
        flat(
            synthetic.question_answers(
                [[row]], StepReport("s"), ep.Endpoint("http://127.0.0.1:9/v1", "m"), tmp_path / "j"
            )
        )


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
    from helpers.data.shingles import SeenHashes

    seen = SeenHashes()
    assert synthetic._pair_fault(question.strip(), answer.strip(), TEXTS[0], seen) == why
    if not why:
        assert synthetic._pair_fault(question.upper(), answer, TEXTS[0], seen) == "question asked before"


def test_overlap_orders_answers_by_their_nearness():
    score = [synthetic.overlap("q", "The Danube flows into the Black Sea.", a) for a in
             ("The Danube flows into the Black Sea.", "It flows into the Black Sea", "Into a sea", "Potatoes")]  # fmt: skip
    assert score[0] == 1.0 and score == sorted(score, reverse=True) and score[3] == 0.0
    assert synthetic.overlap("问", "多瑙河流入黑海", "它流入黑海") > synthetic.overlap(
        "问", "多瑙河流入黑海", "我不知道"
    )


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"score": 2}, ""), ([], "the answer is no object"), ({}, "lacks 'score'"), ({"score": "2"}, "'score' is no integer"),
        ({"score": True}, "'score' is no integer"), ({"score": 9}, "'score' is 9"), (None, "the answer is no object"),
    ],
)  # fmt: skip
def test_answers_are_held_to_the_schema_again(value, why):
    found = ep.breaks(value, MARK)
    assert found == "" if not why else why in found
    assert (
        ep.breaks({"pairs": [1]}, {"type": "object", "properties": {"pairs": {"type": "array", "minItems": 2}}})
        == "'pairs' has 1 items"
    )
