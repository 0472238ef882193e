"""Sets on a hub, read by Hugging Face's own client from a server that speaks the hub's protocol for one repository."""

import hashlib
import io
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

CARD = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train.parquet}
  - {split: full, path: en/full.parquet}
---
"""
REFUSED = {"owner/broken": (501, {}), "owner/gated": (403, {"X-Error-Code": "GatedRepo"})}
REVISIONS = {"main": "a" * 40, "v1": "b" * 40}
READ = """
import json, sys
from helpers.data.sources import read
from helpers.data.tables import Rejects
from helpers.errors import TunebookError
for spec in sys.argv[2:]:
    try:
        rows = read(spec, Rejects(), info=sys.argv[1] if spec == "listed" else "").table.rows()
        print(json.dumps([[row["messages"][0]["content"], row["messages"][1]["content"], row["file"]] for row in rows]))
    except TunebookError as error:
        print(json.dumps(str(error)))
"""


def parquet(word, answer, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"question": f"{word} {i}", "answer": answer} for i in range(rows)]), buffer)
    return buffer.getvalue()


def repositories():
    """Repository → revision → path → content."""
    found = {"owner/set": {}, "owner/script": {}}
    for revision, answer in ((REVISIONS["main"], "new"), (REVISIONS["v1"], "old")):
        files = {f"en/{split}.parquet": parquet(split, answer, rows) for split, rows in (("train", 2), ("full", 3))}
        found["owner/set"][revision] = {"README.md": CARD.encode(), **files}
        found["owner/script"][revision] = {"script.py": b"open('ran', 'w')"}
    return found


class Hub(Answering):
    content: typing.ClassVar = {}

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/").removeprefix("api/")
        kind, name, what, revision, inner = ([*path.split("/"), "", "", "", "", ""][at] for at in (0, 1, 3, 4, 5))
        name = f"{name}/{path.split('/')[2]}" if path.count("/") > 1 else name
        commit = REVISIONS.get(revision or "main", revision)
        files = self.content.get(name, {}).get(commit)
        if name in REFUSED:
            self.answer(b"{}", *REFUSED[name])
        elif kind != "datasets" or files is None:
            self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound" if name in self.content else "RepoNotFound"})
        elif what in ("", "revision"):
            self.answer(
                json.dumps({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}).encode()
            )
        elif what == "tree":
            self.answer(
                json.dumps([self.entry(file, files[file]) for file in files if file.startswith(f"{inner}/")]).encode()
            )
        elif (file := path.split(f"/resolve/{revision}/")[1]) in files:
            self.answer(
                files[file], 200, {"ETag": f'"{self.entry(file, files[file])["oid"]}"', "X-Repo-Commit": commit}
            )
        else:
            self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})

    def entry(self, file, content):
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@pytest.fixture
def hub():
    Hub.content = repositories()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_revision_subset_and_split_of_a_hub_set_are_obeyed_and_a_script_does_not_run(hub, tmp_path):
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"listed": {"hf_hub_url": "owner/set", "subset": "en", "split": "full", "num_samples": 1,
                                           "columns": {"prompt": "question", "response": "answer"}}}))  # fmt: skip
    specs = ["owner/set:en", "owner/set@v1:en:full[1:]", "listed", "owner/set@v9:en", "owner/none", "owner/script",
             "owner/broken", "owner/gated", "owner/set:de"]  # fmt: skip
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(PROJECT)}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(info), *specs], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", '"'))]
    assert said[:3] == [
        [["train 0", "new", "owner/set"], ["train 1", "new", "owner/set"]],
        [["full 1", "old", "owner/set"], ["full 2", "old", "owner/set"]],
        [["full 0", "new", "owner/set"]],
    ]
    assert (
        "does not know the dataset 'owner/set' at revision 'v9'" in said[3]
        and "owner/none" in said[4]
        and "script" in said[5]
        and not (tmp_path / "ran").exists()
    )
    assert "HTTP 501" in said[6] and "`hf auth login`" in said[7] and "accept its terms" in said[7]
    assert "'en'" in said[8]
