"""The client of endpoints, with a real llama.cpp server and a proxy that counts and disturbs."""

import json

import pytest

from helpers import llm_client
from helpers.cache import Answers
from helpers.errors import TunebookError
from helpers.llm_client import Client, Endpoint, Request, breaks, shown_url

MARK = {"type": "object", "properties": {"score": {"type": "integer", "enum": [1, 2, 3]}}, "required": ["score"]}
NOWHERE = Endpoint("http://127.0.0.1:9/v1", "m", retries=0)


@pytest.fixture
def book(tmp_path):
    return Answers(tmp_path, "answers")


def client(proxy, book, **options):
    return Client(Endpoint(proxy.url, "", **{"key_name": "", "concurrency": 2, "retries": 3, **options}), book)


def short(count):
    return [Request([{"role": "user", "content": str(i)}], max_tokens=4) for i in range(count)]


def marks(texts):
    return [Request([{"role": "user", "content": text}], MARK, max_tokens=24) for text in texts]


def test_broken_and_refused_connections_are_retried(proxy, book):
    proxy.faults = [(503, {"Retry-After": "0"}), (429, {"Retry-After": "0"}), "hang up", (500, {"Retry-After": "0"})]
    replies = list(client(proxy, book, retries=5).ask(marks(["one", "two"])))
    assert [r.error for r in replies] == ["", ""] and len(proxy.bodies) == 6
    assert all(r.value["score"] in (1, 2, 3) for r in replies)


def test_one_refused_question_does_not_stop_the_others(proxy, book):
    proxy.faults = [(400, {})]
    replies = list(client(proxy, book, concurrency=1).ask(marks(["one", "two"])))
    assert replies[0].error == "the server refused the question: planted fault 400" and replies[0].value is None
    assert replies[1].error == "" and [r.request.messages[0]["content"] for r in replies] == ["one", "two"]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([(401, {})], r"refused the key in \$THE_API_KEY"),
        ([(404, {})], "was not found.*ends in /v1"),
        ([(500, {"Retry-After": "0"})] * 9, "failed 2 times.*is kept"),
    ],
)
def test_what_stops_a_job_says_so_and_keeps_the_answers(proxy, tmp_path, monkeypatch, faults, message):
    monkeypatch.setenv("THE_API_KEY", "sk-secret-123")
    book = Answers(tmp_path, "answers")
    asking = client(proxy, book, concurrency=1, retries=1, key_name="THE_API_KEY")
    list(asking.ask(marks(["one"])))
    proxy.faults = list(faults)
    with pytest.raises(TunebookError, match=message) as caught:
        list(asking.ask(marks(["one", "two", "three"])))
    assert "sk-secret" not in str(caught.value) and proxy.keys == {"Bearer sk-secret-123"}
    assert b"sk-secret" not in book.path.read_bytes()
    proxy.faults.clear()
    resumed = client(proxy, Answers(tmp_path, "answers"), concurrency=1, key_name="THE_API_KEY")
    assert [r.kept for r in resumed.ask(marks(["one", "two"]))] == [True, False]


def test_a_patient_job_gets_failures_as_replies_until_the_server_is_gone(proxy, book):
    proxy.faults = [None, (404, {}), None] + [(404, {})] * 20
    replies = list(client(proxy, book, concurrency=1).ask(short(20), patience=3))
    assert [bool(r.error) for r in replies[:4]] == [False, True, False, True]
    assert len(proxy.bodies) == 3 + 5 and "asked no more" in replies[-1].error
    proxy.faults = [(404, {})] * 20
    with pytest.raises(TunebookError, match="failed 3 times in a row"):
        list(client(proxy, None, concurrency=1).ask(short(20), patience=3))


def test_a_server_that_is_not_there_is_named(book):
    with pytest.raises(TunebookError, match=r"'m' at http://127.0.0.1:9/v1 does not answer.*start the server"):
        list(Client(NOWHERE, book).ask(marks(["one"])))
    with pytest.raises(TunebookError, match="is not a valid address"):
        Client(Endpoint("localhost:8080", "m"))


def test_a_password_in_an_address_is_never_shown(book):
    with pytest.raises(TunebookError, match=r"http://\*\*\*@127.0.0.1:9/v1") as caught:
        list(Client(Endpoint("http://anna:s3cret@127.0.0.1:9/v1", "m", retries=0), book).ask(marks(["one"])))
    assert "s3cret" not in str(caught.value) and "anna" not in str(caught.value)
    assert shown_url("at https://a:b@h/v1 and http://h/v1") == "at https://***@h/v1 and http://h/v1"


def test_the_same_question_twice_is_sent_once(proxy, book):
    replies = list(client(proxy, book).ask(marks(["same", "same", "same"])))
    assert len(proxy.bodies) == 1 and len({json.dumps(r.value) for r in replies}) == 1 and len(replies) == 3


def test_answers_of_another_model_on_the_same_port_are_not_used_again(proxy, tmp_path, tiny_llama, capsys):
    from helpers.gguf import convert
    from helpers.gguf.runner import Server

    question = [Request([{"role": "user", "content": "Name a river."}], max_tokens=8, temperature=0.0)]

    def ask(expected_kept):
        (reply,) = client(proxy, Answers(tmp_path, "answers")).ask(question)
        assert reply.kept is expected_kept and reply.error == ""
        return reply.text

    first = ask(False)
    assert ask(True) == first and capsys.readouterr().out == ""
    own, proxy.upstream = proxy.upstream, ""
    gguf = tmp_path / "smollm2.gguf"
    convert.convert(tiny_llama, gguf, "f16")
    with Server(gguf, parallel=2, context=1024) as other:
        proxy.upstream = other.url
        ask(False)
        assert "is another model than when its answers were kept" in capsys.readouterr().out
    proxy.upstream = own
    assert ask(True) == first, "and those of the first model are used when it is back"


def test_questions_are_counted_before_any_is_asked(proxy, book):
    asking = client(proxy, book)
    list(asking.ask(short(1)))
    assert asking.estimate(short(3)) == {"new": 2, "kept": 1, "tokens_in": 0, "tokens_out": 8}
    assert len(proxy.bodies) == 1


def test_the_estimate_counts_tokens_before_anything_is_asked():
    planned = Client(Endpoint("http://127.0.0.1:9/v1", "m")).estimate(marks(["x" * 350, "河" * 350]))
    assert planned == {"new": 2, "kept": 0, "tokens_in": 100 + 300, "tokens_out": 48}


def test_more_questions_than_are_read_ahead_come_back_in_order(proxy, book, monkeypatch):
    monkeypatch.setattr(llm_client, "WINDOW", 1)
    replies = list(client(proxy, book).ask(short(5)))
    assert [r.request.messages[0]["content"] for r in replies] == list("01234") and proxy.most == 2


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"score": 2}, ""),
        ([], "not of type 'object'"),
        (None, "not of type 'object'"),
        ({}, "'score' is a required property"),
        ({"score": "2"}, "not of type 'integer'"),
        ({"score": True}, "not of type 'integer'"),
        ({"score": 9}, "9 is not one of"),
    ],
)
def test_answers_are_held_to_the_schema_again(value, why):
    found = breaks(value, MARK)
    assert found == "" if not why else why in found
    assert "too short" in breaks({"pairs": [1]}, {"properties": {"pairs": {"type": "array", "minItems": 2}}})
