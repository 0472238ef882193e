"""JupyterLab as set-up leaves it: a real server, asked what a browser asks it."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from ci import prepare
from tests.conftest import PROJECT


@pytest.fixture(params=[PROJECT, PROJECT / "notebooks"], ids=["project", "elsewhere"])
def server(request, tmp_path):
    prepare.jupyter(tmp_path / "config")
    known = {"JUPYTER_CONFIG_PATH": str(tmp_path / "config"), "HOME": str(tmp_path)}
    own = {n: str(tmp_path / n) for n in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    words = ["lab", "--no-browser", "--allow-root", "--ServerApp.port=0", "--IdentityProvider.token=", "--ip=127.0.0.1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyter", *words],
        cwd=request.param,
        env={**os.environ, **known, **own},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield request.node.callspec.id, address(tmp_path / "JUPYTER_RUNTIME_DIR", process)
    finally:
        process.terminate()
        process.wait(20)


def address(folder, process):
    while process.poll() is None:
        for file in folder.glob("jpserver-*.json"):
            if text := file.read_text():  # written before the server listens
                told = json.loads(text)
                with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", told["port"])):
                    return told["url"]
        time.sleep(0.1)
    raise AssertionError("JupyterLab did not start")


def test_jupyterlab_begins_with_readme_and_asks_nothing_about_news(server):
    where, url = server
    with urllib.request.urlopen(url) as page:
        assert page.url.endswith("/lab/tree/README.md" if where == "project" else "/lab")
    with urllib.request.urlopen(f"{url}lab/api/settings/@jupyterlab/apputils-extension:notification") as answer:
        found = json.load(answer)["schema"]["properties"]
    assert found["fetchNews"]["default"] == "false" and found["checkForUpdates"]["default"] is False


def test_an_environment_that_cannot_be_written_is_no_obstacle(tmp_path, capsys):
    (tmp_path / "file").touch()
    prepare.jupyter(tmp_path / "file" / "jupyter")
    assert "cannot be written" in capsys.readouterr().out
