"""Claims about the notebook chat, on real ipywidgets and a real llama.cpp server."""

import http.server
import threading
import time
from typing import ClassVar

import pytest

from helpers import chat, serve
from tests.conftest import PROJECT


@pytest.fixture(scope="module")
def server():
    from helpers.model import offline

    yield serve.start(offline.wheel_gguf(), context=1024, parallel=2)
    serve.stop_all()


def test_two_models_answer_side_by_side_and_remember_the_conversation(server):
    talk = chat.show({"base": server, "tuned": server}, max_tokens=16)
    talk.question.value = "Name a colour."
    talk.buttons["Send"].click()
    talk.wait(120)
    talk.send("Another one?")
    talk.wait(120)
    for name, said in talk.said.items():
        assert [m["role"] for m in said] == ["user", "assistant"] * 2
        assert said[1]["content"] in talk.boxes[name].value.replace("&#x27;", "'").replace("&quot;", '"')
        assert "tokens" in talk.notes[name]
    assert talk.question.value == ""
    talk.buttons["Clear"].click()
    assert talk.said == {"base": [], "tuned": []}


def test_stop_ends_an_answer_early_and_keeps_what_is_there(server):
    talk = chat.show(server, max_tokens=1000)
    talk.send("Count from one to one thousand, one number a line.")
    ((name, said),) = talk.said.items()
    for _ in range(600):
        if len(said) > 1 and said[1]["content"]:
            break
        time.sleep(0.05)
    talk.buttons["Stop"].click()
    talk.wait(60)
    assert talk.notes[name] == "stopped" and said[1]["content"] and not talk.busy()


class Recorder(http.server.BaseHTTPRequestHandler):
    """A model that answers with markup and writes down what it was asked."""

    asked: ClassVar[list] = []

    def do_POST(self):
        import json

        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in ("<script>alert(1)</script>", "<img src=x onerror=alert(2)>\x07"):
            event = {
                "id": "1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}],
            }
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        return


@pytest.fixture
def recorder():
    Recorder.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as endpoint:
        threading.Thread(target=endpoint.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{endpoint.server_port}/v1"
        endpoint.shutdown()


def test_markup_in_an_answer_is_shown_and_never_run(recorder):
    talk = chat.show({"<b>m</b>": recorder}, system="You write SQL.", temperature=0.5)
    talk.send("<i>hi</i>")
    talk.wait(30)
    html = talk.boxes["<b>m</b>"].value
    assert (
        "&lt;script&gt;alert(1)" in html and "&lt;img src=x" in html and "&lt;i&gt;hi" in html and "&lt;b&gt;m" in html
    )
    assert "<script" not in html and "<img" not in html and "<i>" not in html
    assert Recorder.asked[0]["messages"][0] == {"role": "system", "content": "You write SQL."}
    assert Recorder.asked[0]["temperature"] == 0.5 and Recorder.asked[0]["stream"] is True


def test_one_model_that_fails_does_not_silence_the_other(recorder):
    talk = chat.show({"gone": "http://127.0.0.1:9/v1", "here": recorder})
    talk.send("hi")
    talk.wait(60)
    assert talk.notes["gone"].startswith("no answer") and [m["role"] for m in talk.said["gone"]] == ["user"]
    assert talk.said["here"][1]["content"].startswith("<script>")


def press_enter(talk):
    """What the browser sends for it, in 7.7 and in 8."""
    talk.question._handle_string_msg(None, {"event": "submit"}, [])


def test_enter_and_an_example_send_a_question_and_an_empty_line_does_not(recorder):
    talk = chat.show(recorder, examples=["How many cities?", "Name a river."])
    press_enter(talk)
    assert not Recorder.asked
    talk.question.value = "hi"
    press_enter(talk)
    talk.wait(30)
    talk.examples[1].click()
    talk.wait(30)
    (said,) = talk.said.values()
    assert [m["content"] for m in said[::2]] == ["hi", "Name a river."] and talk.question.value == ""


def answers(text, monkeypatch):
    """Every model answers with this."""
    monkeypatch.setattr(chat, "stream", lambda *_: iter(text))


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("```sql\nSELECT name FROM cities ORDER BY name LIMIT 20\n```", "20 rows, of which 8 are shown"),
        ("SELECT count(*) AS number FROM cities", "1 row:"),
        ("SELECT name FROM nowhere", "does not run: no such table: nowhere"),
        ("DROP TABLE cities", "does not run: not authorized"),
        ("There is no query in this.", ""),
        ("SELECT '<b>x</b>' AS '<i>y</i>'", "&lt;b&gt;x"),
    ],
)
def test_the_query_in_an_answer_is_run_and_its_rows_are_shown_as_text(recorder, monkeypatch, answer, shown):
    answers(answer, monkeypatch)
    talk = chat.show(recorder, database=PROJECT / "datasets" / "atlas.sqlite")
    talk.send("?")
    talk.wait(30)
    (html,) = (box.value for box in talk.boxes.values())
    assert shown in html and "<b>x" not in html and "<i>y" not in html
    assert ("The query" in html) == bool(shown)
    assert [set(m) for m in next(iter(talk.said.values()))] == [{"role", "content"}] * 2  # rows are not sent back
    talk.clear()
    assert shown not in talk.view.children[-2].children[0].value or not shown


def test_a_chat_opens_with_the_system_prompt_and_questions_of_the_data(whole_run, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_RUNS", str(whole_run[1]))
    found = chat.opening("whole")
    assert "Tables: countries(" in found["system"] and found["database"].name == "database.sqlite"
    assert len(found["examples"]) == len(set(found["examples"])) == 3 and all(found["examples"])


def test_a_run_without_an_export_has_nobody_to_talk_to_and_says_so(runs_root):
    assert "There is no file to talk to" in repr(chat.of_run("nothing"))


def test_only_widgets_that_both_ipywidgets_share_are_used(server):
    shared = {"VBox", "HBox", "HTML", "Textarea", "Text", "Button"}
    seen, open_ = set(), [chat.show(server, examples=["Why?"]).view]
    while open_:
        widget = open_.pop()
        seen.add(type(widget).__name__)
        open_ += getattr(widget, "children", ())
    assert seen <= shared


def test_headless_nothing_is_started_and_the_command_is_said(capsys, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_HEADLESS", "1")
    assert chat.offer("runs/x/04_gguf_export/model-q8_0.gguf") is None
    assert "python -m helpers.serve runs/x/04_gguf_export/model-q8_0.gguf" in capsys.readouterr().out
