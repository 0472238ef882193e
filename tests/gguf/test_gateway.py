"""What a served model refuses, sent to the real llama.cpp server with SmolLM2 as strangers would send it."""

import json
import socket
import time

import httpx
import pytest

from helpers.gguf import gateway

ASKED = {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 4}
CHAT = "/v1/chat/completions"


def post(server, body=ASKED, path=CHAT, key=None, **headers):
    headers = {"Authorization": f"Bearer {server.key if key is None else key}", **headers}
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=60, trust_env=False)


def message(reply):
    return reply.json()["error"]["message"]


def nested(depth, inner="0"):
    return "[" * depth + inner + "]" * depth


def test_with_the_key_it_answers_and_without_it_nobody_learns_anything(server):
    assert post(server).json()["choices"][0]["message"]["content"]
    for path in ("/v1/models", "/props"):
        assert httpx.get(server.url + path, trust_env=False).status_code == 401
    assert post(server, key="x").status_code == post(server, key=server.key + "x").status_code == 401
    assert "printed where the server was started" in message(post(server, key="none"))
    assert httpx.get(server.url + "/health", trust_env=False).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_another_host_name_is_refused(server, host):
    assert post(server, Host=host).status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_this_machines_names_are_not(server, host):
    assert post(server, Host=f"{host}:{server.port}").status_code == 200


def test_web_pages_may_not_ask_it(server):
    assert post(server, Origin="https://evil.example").status_code == 403
    assert post(server, Origin="null").status_code == 403
    assert post(server, Content_Type="text/plain").status_code == 415
    assert post(server, Origin=f"http://localhost:{server.port}").status_code == 200


@pytest.mark.parametrize(
    "body, what",
    [
        ({**ASKED, "grammar": "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000}, "grammar"),
        ({**ASKED, "grammar": "root ::= " + "(" * 1_000 + '"a"' + ")" * 1_000}, "nested"),
        ({**ASKED, "response_format": {"type": "json_schema", "json_schema": {"pattern": "(" * 500}}}, "nested"),
        ({**ASKED, "json_schema": json.loads(nested(90))}, "nested"),
        ({**ASKED, "tools": [{"x": "y" * 100_000}]}, "tools"),
        ({**ASKED, "n": 1_000_000}, "n is"),
        ({**ASKED, "max_tokens": "many"}, "whole number"),
        ("[" * 200_000, "JSON"),
        (b"\xff\xfe", "JSON"),
        ("[]", "JSON"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_choke_on_is_refused_before_it(server, body, what):
    reply = post(server, body)
    assert reply.status_code == 400 and what in message(reply)


def test_one_large_body_is_refused_and_small_grammars_work(server):
    assert post(server, {**ASKED, "x": "y" * (50 << 20)}).status_code == 413
    reply = post(server, {**ASKED, "grammar": 'root ::= "yes" | ("no" | "maybe")'})
    assert reply.json()["choices"][0]["message"]["content"] in ("yes", "no", "maybe")


def test_only_the_served_model_and_paths_are_answered(server):
    assert post(server, {**ASKED, "model": server.path.stem}).status_code == 200
    reply = post(server, {**ASKED, "model": "gpt-4"})
    assert reply.status_code == 404 and server.path.stem in message(reply)
    for path in ("/slots/0?action=save", "/lora-adapters", "/../etc/passwd", "/infill"):
        assert post(server, path=path).status_code == 404


def test_no_answer_is_longer_than_the_context(server):
    body = {**ASKED, "max_tokens": 10**9, "stop": [" "]}
    assert post(server, body).status_code == 200
    assert gateway.Gateway("k", "", "", "m", 512)._limit(body) is None and body["max_tokens"] == 512


def test_half_open_requests_stop_nobody(server, monkeypatch):
    began, held = time.monotonic(), []
    for _ in range(100):
        one = socket.create_connection(("127.0.0.1", server.port))
        one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        held.append(one)
    assert post(server).status_code == 200
    for one in held[:3]:
        one.settimeout(gateway.FIRST_REQUEST_S + 20)
        assert one.recv(100) == b"", "they are closed"
    assert time.monotonic() - began < gateway.FIRST_REQUEST_S + 60
    for one in held:
        one.close()


def test_the_key_stands_in_no_command_line(server):
    from pathlib import Path

    lines = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.parent.exists()]
    assert not any(server.key.encode() in line for line in lines)
