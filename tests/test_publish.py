"""Claims about publishing, over real HTTP to a small hub that keeps what it is sent."""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from helpers import params, publish, runs
from helpers.errors import TunebookError
from tests.conftest import begun

PROJECT = Path(__file__).parents[1]
TOKEN = "hf_secretsecretsecretsecretsecretsecr"


class Hub(http.server.ThreadingHTTPServer):
    """The endpoints an upload needs: create, preupload, LFS batch and PUT, commit. break_after: PUTs that succeed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Endpoint)
        self.repositories: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.break_after = 10**6
        self.refuse = 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        return


class Endpoint(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.split("?")[0].removeprefix("/api/models/").split("/revision/")[0]
        if self.path.startswith("/api/models/") and name in self.server.repositories:
            return self.say(
                {
                    "id": name,
                    "modelId": name,
                    "sha": "0" * 40,
                    "private": True,
                    "siblings": [],
                    "xetEnabled": False,
                    "tags": [],
                }
            )
        return self.say({"error": "not found"}, 404)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuse or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.say(
                {"error": f"Invalid credentials for {self.headers.get('Authorization')}"}, self.server.refuse or 401
            )
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = (
                f"{wanted.get('organization') or 'user'}/{wanted['name']}"
                if "/" not in wanted["name"]
                else wanted["name"]
            )
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.server.repositories.setdefault(name, {"private": private, "files": {}, "commits": 0})
            return self.say({"url": f"{self.server.url}/{name}", "id": name})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self.say(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "shouldIgnore": False,
                            "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".gguf", ".png")) else "regular",
                        }
                        for f in files
                    ]
                }
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    **(
                        {}
                        if o["oid"] in self.server.blobs
                        else {"actions": {"upload": {"href": f"{self.server.url}/blob/{o['oid']}"}}}
                    ),
                }
                for o in json.loads(body)["objects"]
            ]
            return self.say({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            return self.commit(path, [json.loads(line) for line in body.splitlines() if line])
        if path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        return self.say({"error": path}, 404)

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if len(self.server.puts) >= self.server.break_after:
            return self.say(
                {"error": "the line went dead"}, 400
            )  # a status that the client does not try again by itself
        self.server.puts.append(self.path)
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        return self.say({})

    def commit(self, path, lines):
        name = path.removeprefix("/api/models/").split("/commit/")[0]
        repository = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository["files"][value["path"]] = self.server.blobs[value["oid"]]
        repository["commits"] += 1
        return self.say(
            {
                "success": True,
                "commitOid": "1" * 40,
                "commitUrl": f"{self.server.url}/{name}/commit/{'1' * 40}",
                "pullRequestUrl": None,
            }
        )

    def say(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        return


@pytest.fixture
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(runs_root):
    """A run with an adapter, a merged model in two shards and two GGUF files."""
    model = {
        "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "path": "/home/somebody/models/smol",
        "revision": "r1",
        "origin": "folder",
    }
    stages = {
        "data": {},
        "sft": {
            "adapter/adapter_config.json": json.dumps(
                {"base_model_name_or_path": "/home/somebody/models/smol", "r": 16}
            ),
            "adapter/adapter_model.safetensors": b"A" * 5000,
            "adapter/README.md": "PEFT's own",
            "log.jsonl": "{}",
            "checkpoints/optimizer.pt": b"x",
        },
        "gguf": {
            "merged/model-00001-of-00002.safetensors": b"M" * 9000,
            "merged/model-00002-of-00002.safetensors": b"N" * 9000,
            "merged/config.json": "{}",
            "model-q8_0.gguf": b"GGUF" + b"8" * 7000,
            "model-q4_k_m.gguf": b"GGUF" + b"4" * 4000,
            "Modelfile": "FROM ./model-q8_0.gguf",
            "fidelity.json": json.dumps({"files": [{"type": "q8_0", "mean_kl": 0.0047, "failed": {}}]}),
        },
    }
    for key, files in stages.items():
        stage = begun(key, params.resolve(key, {"run": "job"}))
        for name, content in files.items():
            runs.write_atomic(stage.path / name, content)
        stage.finish({}, template_hash="ab" * 32, model=model if key == "data" else None)
    return "job"


def command(hub, *arguments, token=TOKEN):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(runs.root().parent / "home"),
    }
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.run(
        [sys.executable, "-m", "helpers.publish", *arguments],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_dry_run_lists_files_and_sizes_and_sends_nothing(run, hub):
    done = command(hub, run, "user/atlas", token="")
    assert done.returncode == 0, done.stderr
    for line in (
        "user/atlas-lora (adapter)",
        "user/atlas (merged)",
        "user/atlas-GGUF (gguf)",
        "9 kB  model-00001-of-00002.safetensors",
        "model-q4_k_m.gguf",
        "Modelfile",
        "README.md",
        "Nothing was uploaded",
    ):
        assert line in done.stdout, (line, done.stdout)
    assert "optimizer" not in done.stdout and "log.jsonl" not in done.stdout
    assert not hub.repositories


def test_the_notebooks_last_cell_shows_a_dry_run_and_uploads_only_when_told_to(run, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)

    def offered(**given):
        return publish.offer(params.resolve("gguf", {"run": run, **given}))

    assert "Nothing is published" in repr(offered())
    shown = offered(publish_to="user/name")
    assert "user/name-GGUF" in repr(shown) and "dry run" in shown._repr_html_() and not hub.repositories
    with pytest.raises(TunebookError, match="No token for the hub"):  # it would have uploaded
        offered(publish_to="user/name", publish_dry_run=False)


def test_three_repositories_arrive_whole_with_cards_and_no_path_of_this_machine(run, hub):
    done = command(hub, run, "user/atlas", "--yes", "--licence", "apache-2.0", "--data-licence", "CC BY 4.0")
    assert done.returncode == 0, done.stderr
    assert set(hub.repositories) == {"user/atlas", "user/atlas-lora", "user/atlas-GGUF"}
    assert all(r["private"] for r in hub.repositories.values())
    merged, adapter, gguf = (hub.repositories[f"user/atlas{s}"]["files"] for s in ("", "-lora", "-GGUF"))
    assert merged["model-00002-of-00002.safetensors"] == b"N" * 9000 and set(adapter) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert set(gguf) == {"model-q8_0.gguf", "model-q4_k_m.gguf", "Modelfile", "fidelity.json", "README.md"}
    assert (
        json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    card = gguf["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert (
        head["license"] == "apache-2.0"
        and head["base_model_relation"] == "quantized"
        and "0.0047" in card
        and "CC BY 4.0" in card
    )
    everything = b"".join(content for r in hub.repositories.values() for content in r["files"].values())
    assert b"/home/somebody" not in everything and str(runs.root()).encode() not in everything


def test_the_token_is_neither_printed_nor_stored(run, hub):
    good, bad = (
        command(hub, run, "user/atlas", "--yes"),
        command(hub, run, "user/other", "--yes", token=TOKEN.replace("secret", "wrongs")),
    )
    assert good.returncode == 0 and bad.returncode == 1 and "no write access" in bad.stderr
    for done in (good, bad):
        assert "hf_" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    stored = [p for p in runs.root().parent.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert stored == []


def test_an_upload_that_broke_off_goes_on_without_sending_a_blob_twice(run, hub):
    hub.break_after = 1
    broken = command(hub, run, "user/atlas", "--only", "merged", "--yes")
    assert broken.returncode == 1 and "same command resumes" in broken.stderr, broken.stderr
    assert len(hub.puts) == 1
    hub.break_after = 10**6
    again = command(hub, run, "user/atlas", "--only", "merged", "--yes")
    assert again.returncode == 0, again.stderr
    assert len(hub.puts) == len(set(hub.puts)) == 2 and len(hub.repositories["user/atlas"]["files"]) == 4


def test_an_unchanged_run_published_again_sends_no_blob(run, hub):
    for _ in range(2):
        assert command(hub, run, "user/atlas", "--only", "gguf", "--yes").returncode == 0
    assert len(hub.puts) == 2


def test_a_missing_token_is_a_sentence(run, hub):
    done = command(hub, run, "user/atlas", "--yes", token="")
    assert done.returncode == 1 and "`hf auth login`" in done.stderr and not hub.repositories


def one_message(done, *wanted):
    """Status 1 and a single line on stderr that says what is wanted, no traceback and no token."""
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(w in done.stderr for w in wanted) and TOKEN not in done.stderr, done.stderr


def test_a_hub_that_is_down_is_one_message(run, hub):
    hub.shutdown()
    hub.server_close()
    one_message(command(hub, run, "user/atlas", "--only", "gguf", "--yes"), f"The hub at {hub.url} cannot be reached")


def test_an_error_of_the_hub_is_one_message_with_its_status(run, hub):
    hub.refuse = 418  # none that the client tries again
    done = command(hub, run, "user/atlas", "--only", "gguf", "--yes")
    one_message(done, "The hub answered 418 for user/atlas-GGUF", "same command resumes")


def test_an_altered_file_is_not_published(run):
    (runs.folder(run, "gguf") / "model-q8_0.gguf").write_bytes(b"GGUF" + b"9" * 7000)
    with pytest.raises(TunebookError, match=r"Stage 'gguf' .* as it stands there"):
        publish.plan(run, "user/atlas")


@pytest.mark.parametrize("name", ["atlas", "user/../up", "user/a b", "/user/atlas", "user/atlas/more", "user/a--b"])
def test_a_bad_repository_name_is_a_sentence(run, name):
    with pytest.raises(TunebookError, match="not a valid repository name"):
        publish.publish(run, name)


def test_a_run_without_results_is_a_sentence(runs_root):
    begun("data", params.resolve("data", {"run": "young"})).finish({})
    with pytest.raises(TunebookError, match="nothing to publish of adapter"):
        publish.publish("young", "user/atlas")
    with pytest.raises(TunebookError, match="nothing called weights"):
        publish.publish("young", "user/atlas", ["weights"])
