"""Claims about serving, on the real llama.cpp server with SmolLM2."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from helpers import machine, runs, serve
from helpers.errors import TunebookError

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def gguf():
    """SmolLM2 as a GGUF file."""
    from helpers.model import offline

    return offline.wheel_gguf()


@pytest.fixture(scope="module")
def server(gguf):
    running = serve.start(gguf, context=1024)
    yield running
    serve.stop_all()


def test_the_openai_client_works_against_it_and_streams(server):
    client = serve.client(server)
    assert [m.id for m in client.models.list()] == [server.path.stem]
    ask = {
        "model": server.path.stem,
        "messages": [{"role": "user", "content": "Say yes."}],
        "max_tokens": 8,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.content and whole.usage.completion_tokens <= 8
    pieces = [e.choices[0].delta.content or "" for e in client.chat.completions.create(**ask, stream=True) if e.choices]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 2


def test_it_renders_prompts_with_the_models_own_template(server, tokenizer):
    chat = [{"role": "user", "content": "你好 <b>"}]
    assert server.post("/apply-template", {"messages": chat})["prompt"] == tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


def test_a_client_that_asks_for_no_temperature_gets_the_measured_one(server):
    asked = urllib.request.Request(server.url + "/props", headers={"Authorization": f"Bearer {server.key}"})
    with urllib.request.urlopen(asked) as reply:
        assert json.load(reply)["default_generation_settings"]["params"]["temperature"] == 0.0


def test_it_listens_on_loopback_alone(server):
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    addresses = {address.split(":")[0] for _, address, *_ in listening if int(address.split(":")[1], 16) == server.port}
    assert "0100007F" in addresses and "00000000" not in addresses


def test_asking_again_gives_the_server_that_already_runs(server, gguf):
    assert serve.start(gguf, context=1024) is server
    assert serve.describe(server).count(server.url) >= 4


def test_a_taken_port_is_a_sentence(gguf):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TunebookError, match=r"Port \d+ on 127.0.0.1 cannot be used"):
            serve.start(gguf, port=taken.getsockname()[1])


def test_a_missing_or_damaged_model_is_a_sentence(gguf, tmp_path):
    with pytest.raises(TunebookError, match="There is no file"):
        serve.start(tmp_path / "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:5_000_000])
    with pytest.raises(TunebookError, match="truncated"):
        serve.start(broken)
    with pytest.raises(TunebookError, match=r"holds broken\.gguf, other\.gguf; name one"):
        (tmp_path / "other.gguf").touch()
        serve.find(tmp_path)


def test_too_little_memory_is_refused_with_the_context_that_would_fit(gguf, monkeypatch):
    _, need = serve.plan(gguf, 8192, 1)
    # SmolLM2-135M: 30 layers, 3 key-value heads of width 64, keys and values of 2 bytes
    assert need == pytest.approx((gguf.stat().st_size + 2 * 2 * 3 * 64 * 30 * 8192) / 2**30 + 0.2)
    monkeypatch.setattr(machine, "free_memory_gib", lambda: 0.4)
    with pytest.raises(
        TunebookError, match=r"needs 0\.\d GiB and 0\.4 GiB are free; a context of (\d+) tokens would fit"
    ) as refusal:
        serve.plan(gguf, 8192)
    fits = int(str(refusal.value).split("context of ")[1].split()[0])
    assert serve.plan(gguf, fits)[1] <= 0.4
    with pytest.raises(TunebookError):
        serve.plan(gguf, fits + 64)
    monkeypatch.setattr(machine, "free_memory_gib", lambda: 0.1)
    with pytest.raises(TunebookError, match="smaller quantisation"):
        serve.plan(gguf, 8192)
    with pytest.raises(TunebookError, match="longer than the 8192"):
        serve.plan(gguf, 10_000)


@pytest.fixture
def exported(runs_root, gguf):
    """A finished export with two files, one of them recommended."""
    folder = runs.folder("job", "gguf")
    folder.mkdir(parents=True)
    for kind in ("q8_0", "q4_k_m"):
        os.symlink(gguf, folder / f"model-{kind}.gguf")
    known = {"sha256": runs.sha256_file(gguf), "bytes": gguf.stat().st_size}
    artifacts = {f"model-{kind}.gguf": known for kind in ("q8_0", "q4_k_m")}
    runs.write_manifest(
        folder,
        {
            "schema_version": runs.SCHEMA_VERSION,
            "stage": "gguf",
            "run": "job",
            "status": "finished",
            "params": {},
            "metrics": {"recommended": {"type": "q4_k_m", "why": "small"}},
            "artifacts": artifacts,
            "parents": {},
        },
    )
    return folder


def test_a_runs_name_means_its_recommended_file_or_the_one_asked_for(exported):
    assert serve.find("job") == exported / "model-q4_k_m.gguf"
    assert serve.find("job", "q8_0") == exported / "model-q8_0.gguf"
    with pytest.raises(TunebookError, match="no q2_k; it has q4_k_m, q8_0"):
        serve.find("job", "q2_k")
    with pytest.raises(TunebookError, match="has not been run yet"):
        serve.find("nosuch")
    with pytest.raises(TunebookError, match="cannot name a folder"):
        serve.find("../nosuch")
    (exported / "model-q8_0.gguf").unlink()
    (exported / "model-q8_0.gguf").write_bytes(b"GGUF of somebody else's")
    with pytest.raises(TunebookError, match="missing or altered"):
        serve.find("job", "q8_0")


def test_the_command_serves_a_run_says_how_to_use_it_and_ends_on_an_interrupt(exported):
    with subprocess.Popen(
        [sys.executable, "-m", "helpers.serve", "job", "--port", "0", "--context", "512"],
        cwd=PROJECT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ},
    ) as command:
        said = [command.stdout.readline() for _ in range(5)]
        url = said[0].split(" served at ")[1].strip().removesuffix("/v1")
        with urllib.request.urlopen(url + "/health") as reply:
            assert json.load(reply) == {"status": "ok"}
        assert any("OPENAI_API_BASE_URL=" + url + "/v1" in line for line in said)
        command.send_signal(signal.SIGINT)
        assert command.wait(20) == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(url + "/health", timeout=2)


def test_a_bad_command_prints_a_sentence_and_no_traceback(runs_root):
    done = subprocess.run(
        [sys.executable, "-m", "helpers.serve", "nosuch"], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "has not been run yet" in done.stderr and "Traceback" not in done.stderr


def test_the_server_ends_with_the_process_that_started_it(gguf):
    """A kernel that is killed outright leaves no server behind."""
    code = f"import time; from helpers import serve; s = serve.start({str(gguf)!r}, context=256)"
    code += "; print(s.url, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True) as kernel:
        url = kernel.stdout.readline().strip()
        urllib.request.urlopen(url + "/health").close()
        kernel.kill()
        kernel.wait()
    for _ in range(100):
        try:
            urllib.request.urlopen(url + "/health", timeout=1).close()
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("the server outlived its kernel by ten seconds")
