"""Models as hubs hold them, through Hugging Face's own client from a server that speaks the hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import typing
import urllib.parse
from http.server import ThreadingHTTPServer

import pytest
from hub_server import Answering

from tests.conftest import PROJECT

READ = """
import json, sys
from helpers.errors import TunebookError
from helpers.model import loading, weights
for name in sys.argv[1:]:
    try:
        found = loading.resolve_model(name)
        print(json.dumps([name, *weights.count_weights(found.path)]))
    except TunebookError as error:
        print(json.dumps([name, str(error)]))
"""
REFUSED = {"o/gated": (403, {"X-Error-Code": "GatedRepo"}), "o/broken": (501, {}), "o/token": (401, {})}


class Hub(Answering):
    content: typing.ClassVar[dict[str, dict[str, bytes]]] = {}
    taken: typing.ClassVar[list[str]] = []

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        path = path.strip("/").removeprefix("api/").removeprefix("models/")
        name, _, file = path.partition("/resolve/")
        name, file = "/".join(name.split("/")[:2]), file.partition("/")[2]
        files = self.content.get(name, {})
        if name in REFUSED:
            self.answer(b"{}", *REFUSED[name])
        elif not files:
            self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            listed = [
                {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for f, b in files.items()
            ]
            self.answer(json.dumps(listed).encode())
        elif not file:
            self.answer(
                json.dumps({"id": name, "sha": "a" * 40, "siblings": [{"rfilename": f} for f in files]}).encode()
            )
        elif file in files:
            self.taken += [f"{name}/{file}"] * (self.command == "GET")
            etag = hashlib.sha1(files[file]).hexdigest()
            self.answer(files[file], 200, {"ETag": f'"{etag}"', "X-Repo-Commit": "a" * 40})
        else:
            self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})


@pytest.fixture
def hub(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    one, many = ({f.name: f.read_bytes() for f in (tmp_path / place).iterdir()} for place in ("one", "many"))
    whole, config = one["model.safetensors"], {"config.json": one["config.json"]}
    native = {"consolidated.safetensors": whole, "original/params.json": b"{}", "original/consolidated.00.pth": b"x"}
    Hub.content = {
        "o/one": one,
        "o/many": {**many, **native, "metal/model.safetensors": whole},
        "o/native": {**config, **native},
        "o/pickled": {**config, "pytorch_model.bin": b"x"},
    }
    Hub.taken = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_hub_folders_as_they_are_come_once_and_count_once(hub, tmp_path):
    names = ["o/one", "o/many", "o/many", "o/native", "o/pickled", *REFUSED, "o/none"]
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(PROJECT)}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", READ, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line)[1:] for line in done.stdout.splitlines() if line.startswith("[")]
    assert said[0] == said[1] == said[2] and len(said[0]) == 2
    taken = [file for file in Hub.taken if file.startswith("o/many/")]
    assert len(taken) == len(set(taken)) and not [f for f in taken if "consolidated" in f or f.count("/") > 2]
    for refused, words in zip(
        said[3:],
        (
            "no weights in model.safetensors",
            "choose a copy",
            "accept its terms",
            "HTTP 501",
            "token",
            "check the spelling",
        ),
        strict=True,
    ):
        assert words in refused[0] and "huggingface-cli" not in refused[0], refused
    assert "hf auth login" in said[5][0]
